"""Hooks on modules: which would notice that a module's own call is skipped."""

from __future__ import annotations

from typing import Any

from torch.nn.modules.module import _has_any_global_hook


def foreign_hooks(module: Any) -> bool:
    """Whether something would notice that this module's own call is skipped: a hook, or a forward bound to the
    instance.

    Two of transformers' own do not count. Those that record hidden states and attentions: models.py handles these
    outputs itself. That of enable_input_require_grads, which gradient checkpointing sets: `embed` does what it does.
    """
    if (
        _has_any_global_hook()
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._forward_pre_hooks
        or "forward" in module.__dict__
    ):
        return True
    if not module._forward_hooks:
        return False
    return not all(own_hook(hook) for hook in module._forward_hooks.values())


def own_hook(hook: Any) -> bool:
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing" or input_grads_hook(hook)


def input_grads_hook(hook: Any) -> bool:
    """PreTrainedModel.enable_input_require_grads' hook on the word embeddings: what they give shall require grad."""
    name = getattr(hook, "__qualname__", "")
    return name.endswith("enable_input_require_grads.<locals>.make_inputs_require_grads")


def compiled(module: Any) -> bool:
    """Whether module.compile() gave its call a compiled code."""
    return module.__dict__.get("_compiled_call_impl") is not None
