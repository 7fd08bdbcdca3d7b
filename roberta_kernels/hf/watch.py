"""The one mechanism that notices change: what a decision about some modules was made from, and whether it still holds.

Adapters, hooks, modes and quantisation arrive after patching, and at any time. A decision is therefore kept only while
nothing that it was made from has changed: modules and parameters in their places, types, modes, hooks, attributes, the
code of their classes, dtypes and devices. The values of weights are no part of it (prepacked.EncoderCall has them).
"""

from __future__ import annotations

from operator import attrgetter, is_, itemgetter

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from roberta_kernels.hf.known_code import ATTRIBUTES, methods

_DICTS = (
    *("_modules", "_parameters", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
)
_own = itemgetter("training", *_DICTS)
_parameter = attrgetter("dtype", "device", "requires_grad")


class Watch:
    """All modules under a root as they are now."""

    def __init__(self, root: nn.Module) -> None:
        self._modules = list(root.modules())
        self._dicts = [module.__dict__ for module in self._modules]
        self._types = list(map(type, self._modules))
        self._seen = list(map(_own, self._dicts))
        self._contents = [entry for seen in self._seen for entry in seen[1:]]
        self._sizes = list(map(len, self._contents))
        places = [(content, key) for seen in self._seen for content in seen[1:3] for key in content]
        places += [(own, name) for own in self._dicts for name in ATTRIBUTES if name in own]
        self._places = places
        self._found = [mapping[key] for mapping, key in places]
        # Whether a forward is bound to the instance, or a compiled call.
        self._bound = [(own.get("forward"), own.get("_compiled_call_impl")) for own in self._dicts]
        self._parameters = [p for seen in self._seen for p in seen[2].values() if p is not None]
        self._kinds = list(map(_parameter, self._parameters))
        self._classes = list(set(self._types))
        self._methods = [methods(cls) for cls in self._classes]
        self._global_hook = _has_any_global_hook()
        self.requires_grad = any(p.requires_grad for p in self._parameters)

    def holds(self) -> bool:
        """Whether all is as it was. In flat lists, as this runs in every call of a model."""
        if _has_any_global_hook() != self._global_hook or list(map(type, self._modules)) != self._types:
            return False
        try:
            found = [mapping[key] for mapping, key in self._places]
            seen = list(map(_own, self._dicts))
        except KeyError:  # a parameter became something else (pruning, a parametrisation)
            return False
        return (
            seen == self._seen
            and list(map(len, self._contents)) == self._sizes
            and all(map(is_, found, self._found))
            and [(own.get("forward"), own.get("_compiled_call_impl")) for own in self._dicts] == self._bound
            and list(map(_parameter, self._parameters)) == self._kinds
            and [methods(cls) for cls in self._classes] == self._methods
        )
