"""Which modules are plainly what they look like, so that their own call may be skipped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from roberta_kernels import backends

FUSABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# --- calls ----------------------------------------------------------------------------------------------------------


def tracing() -> bool:
    """Whether a graph is being recorded, which must not depend on the data."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def fake(tensor: Any) -> bool:
    """Whether a tensor has a shape and no data, as in FakeTensorMode."""
    return type(tensor).__module__.startswith("torch._subclasses.")


def data_hidden(tensor: Tensor) -> bool:
    """Whether what runs must not depend on what a tensor holds: a graph is recorded, or it holds nothing."""
    if tracing() or fake(tensor):
        return True
    # Without CUDA's state (on a machine without a GPU) there is no capture, and asking is an error.
    return tensor.is_cuda and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def transform() -> str | None:
    """Which transform of torch the call is in that only plain torch can follow, or None.

    Forward-mode differentiation counts from dual_level() on, whatever has a tangent: an op without a formula for it
    would lose the tangent of a parameter as well as of an input, with gradients and without, and say nothing. Dynamo
    guards a graph by this level; of torch.func's other transforms it cannot be asked.
    """
    if not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None:
        return "inside a torch.func transform"
    if tracing() and not torch.compiler.is_dynamo_compiling() and torch.onnx.is_in_onnx_export():
        return "ONNX export, which knows none of the fused ops"
    return None if forward_ad._current_level < 0 else "forward-mode differentiation"


def unserved(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why no kernel supports this dtype on this device, or None."""
    if dtype not in FUSABLE_DTYPES:
        return f"no kernels for {dtype}"
    if device.type == "cuda":
        return backends.unserved(device)
    # Only the reference has it there: 1.1 to 2 times the time of the original.
    return "float16 on a CPU, where the original is faster" if dtype == torch.float16 and device.type == "cpu" else None


# --- hooks ----------------------------------------------------------------------------------------------------------


def foreign_hooks(module: Any) -> bool:
    """Whether something would notice that this module's own call is skipped: a hook, or a forward bound to the
    instance.

    Two of transformers' own do not count. Those that record hidden states and attentions: model.py handles these
    outputs itself. That of enable_input_require_grads, which gradient checkpointing sets: `embed` does what it does.
    """
    if (
        _has_any_global_hook()
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._forward_pre_hooks
        or own_forward(module)
    ):
        return True
    if not module._forward_hooks:
        return False
    return not all(own_hook(hook) for hook in module._forward_hooks.values())


def foreign_readers(module: Any) -> bool:
    """Whether somebody else's code sees what a module gets or gives: a hook, or a forward bound to the instance.
    torch's own hooks (fully_shard's) and transformers' move and record, and compute nothing."""
    if own_forward(module):
        return True
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        function = getattr(hook, "func", hook)  # of a functools.partial
        if str(getattr(function, "__module__", None)).partition(".")[0] not in ("torch", "transformers"):
            return True
    return False


def own_forward(module: Any) -> bool:
    """Whether a forward is bound to the instance, as accelerate's hooks are."""
    return "forward" in module.__dict__


def own_hook(hook: Any) -> bool:
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing" or input_grads_hook(hook)


def input_grads_hook(hook: Any) -> bool:
    """PreTrainedModel.enable_input_require_grads' hook on the word embeddings: what they give shall require grad."""
    name = getattr(hook, "__qualname__", "")
    return name.endswith("enable_input_require_grads.<locals>.make_inputs_require_grads")


def compiled(module: Any) -> bool:
    """Whether module.compile() gave its call a compiled code."""
    return module.__dict__.get("_compiled_call_impl") is not None


# --- modules --------------------------------------------------------------------------------------------------------


def _plain(tensor: Any) -> bool:
    """An ordinary weight: not quantised, not distributed, not on the meta device."""
    if type(tensor) not in (nn.Parameter, Tensor):
        # torch.export puts fake tensors in the place of weights.
        return torch.compiler.is_exporting() and fake(tensor)
    return tensor.device.type != "meta"


def plain_linear(module: Any) -> bool:
    """Exactly nn.Linear (adapters subclass it or take its name), with an ordinary weight."""
    return type(module) is nn.Linear and _plain(module._parameters.get("weight"))  # pruning takes it out


def plain_layer_norm(module: Any, hidden: int) -> bool:
    return (
        type(module) is nn.LayerNorm
        and module.normalized_shape == (hidden,)
        and module.weight is not None
        and module.bias is not None
        and _plain(module.weight)
    )


def plain_embedding(module: Any) -> bool:
    return (
        type(module) is nn.Embedding
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and not module.sparse
        and _plain(module.weight)
    )


def plain_dropout(module: Any) -> bool:
    return type(module) is nn.Dropout and module.p < 1.0


def dropout_of(module: Any) -> float:
    return module.p if module.training else 0.0


_gelu_kinds: dict[type, str | None] = {}  # transformers' activation classes that were run -> gelu_ffn's `approximate`


def gelu_kind(activation: Any) -> str | None:
    """gelu_ffn's `approximate` for this activation, or None where it is not a GELU that the op knows."""
    if type(activation) is nn.GELU:
        return activation.approximate
    if activation is F.gelu:
        return "none"
    cls = type(activation)
    if not tracing() and cls not in _gelu_kinds:
        _gelu_kinds[cls] = _run_gelu(activation)
    return _gelu_kinds.get(cls)


def _run_gelu(activation: Any) -> str | None:
    """Which GELU a module of transformers' activations computes, found out by running it: names may change."""
    cls = type(activation)
    if not (isinstance(activation, nn.Module) and cls.__module__.partition(".")[0] == "transformers"):
        return None
    if any(True for _ in activation.parameters()):
        return None
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with torch.no_grad(), torch.device("cpu"), unset_fake_temporarily():
        x = torch.linspace(-12.0, 12.0, 193, dtype=torch.float64)
        try:
            y = activation(x)
        except Exception:
            return None
        for kind in ("none", "tanh"):
            if isinstance(y, Tensor) and torch.allclose(y, F.gelu(x, approximate=kind), rtol=1e-9, atol=1e-9):
                return kind
    return None
