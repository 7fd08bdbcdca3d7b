"""The one mechanism that notices change: what a decision about some modules was made from, and whether it still holds.

Adapters, hooks, modes and quantisation arrive after patching, and at any time. A decision is therefore kept only while
nothing that it was made from has changed: modules and parameters in their places, types, modes, hooks, attributes, the
code of their classes, where parameters are and of which dtype. The values of weights are no part of it:
kernels read them in place, and quantised copies have a look of their own (quantized/).

`holds` runs in every call of a model, over some two hundred modules: so it compares flat lists, made by loops in C.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter, itemgetter
from typing import Any

from torch import Tensor, is_grad_enabled, nn
from torch.nn.modules.module import _has_any_global_hook

from roberta_kernels.hf.structure import ATTRIBUTES, METHODS

_own = itemgetter("training", "_modules", "_parameters", "_forward_hooks", "_forward_pre_hooks")
_own_backward = itemgetter("_backward_hooks", "_backward_pre_hooks")
_dtype, _wants_grad, _place = map(attrgetter, ("dtype", "requires_grad", "device"))


class Watch:
    """All modules under a root as they are now."""

    def __init__(self, root: nn.Module) -> None:
        modules = list(root.modules())
        self._modules = modules
        self._types = list(map(type, modules))
        self._dicts = [module.__dict__ for module in modules]
        self._seen = list(map(_own, self._dicts))
        self._seen_backward = list(map(_own_backward, self._dicts))
        self._bound = ["forward" in own for own in self._dicts]
        self._compiled = ["_compiled_call_impl" in own for own in self._dicts]
        hooks = [entry for seen in self._seen for entry in seen[3:]]
        backward_hooks = [entry for seen in self._seen_backward for entry in seen]
        self._no_hooks = [hook for hook in hooks if not hook]
        self._no_backward_hooks = [hook for hook in backward_hooks if not hook]
        contents = [entry for seen in self._seen for entry in seen[1:3] if entry]
        self._contents = [*contents, *(hook for hook in (*hooks, *backward_hooks) if hook)]
        # Of dicts, compared by entry: one and the same object is equal at once. Two parameters of one element are
        # equal, too, while they hold the same number; which of them is read is then all the same.
        self._copies = [dict(content) for content in self._contents]
        self._attributes = [(own, name) for own in self._dicts for name in ATTRIBUTES if name in own]
        self._found = [own[name] for own, name in self._attributes]
        self._parameters = [p for seen in self._seen for p in seen[2].values() if p is not None]
        # Fake tensors and their like have no address.
        plain = all(type(p) in (nn.Parameter, Tensor) for p in self._parameters)
        self._address: Callable[[Tensor], Any] = Tensor.data_ptr if plain else _place
        self._addresses = list(map(self._address, self._parameters))
        self._dtypes = list(map(_dtype, self._parameters))
        self._want_grad = list(map(_wants_grad, self._parameters))
        self._contiguous = list(map(Tensor.is_contiguous, self._parameters))
        classes = {getattr(cls, "_rk_original", cls) for cls in self._types}
        self._methods = [(cls, name) for cls in classes for name in METHODS if hasattr(cls, name)]
        self._code = [getattr(cls, name) for cls, name in self._methods]
        self._global_hook = bool(_has_any_global_hook())

    def holds(self) -> bool:
        """Whether all is as it was."""
        try:
            return (
                list(map(_own, self._dicts)) == self._seen
                and not any(self._no_hooks)
                and self._contents == self._copies
                and [own[name] for own, name in self._attributes] == self._found
                and list(map(type, self._modules)) == self._types
                and ["forward" in own for own in self._dicts] == self._bound
                and ["_compiled_call_impl" in own for own in self._dicts] == self._compiled
                and list(map(self._address, self._parameters)) == self._addresses
                and list(map(_dtype, self._parameters)) == self._dtypes
                and list(map(Tensor.is_contiguous, self._parameters)) == self._contiguous
                and (not is_grad_enabled() or self._gradients_hold())
                and [getattr(cls, name) for cls, name in self._methods] == self._code
                and bool(_has_any_global_hook()) == self._global_hook
            )
        except (KeyError, AttributeError, RuntimeError, TypeError):  # something is of another kind altogether
            return False

    def _gradients_hold(self) -> bool:
        """What decides nothing while no gradients are recorded: a call that records them looks."""
        return (
            list(map(_wants_grad, self._parameters)) == self._want_grad
            and list(map(_own_backward, self._dicts)) == self._seen_backward
            and not any(self._no_backward_hooks)
        )
