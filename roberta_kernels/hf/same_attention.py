"""Whether a model's attention implementation is the mathematics that the fused attention computes."""

from __future__ import annotations

import contextlib
import functools
import sys
from typing import Any

from roberta_kernels.hf.fusable import tracing
from roberta_kernels.hf.names import ATTENTION

# Any other is somebody's own, and is left alone.
_SAME = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", ATTENTION)
_of_transformers: dict[Any, bool] = {}  # function -> whether it is transformers' own


def attention_difference(model: Any, implementation: str | None) -> str | None:
    """Why the fused attention does not stand in for an implementation, or None."""
    if implementation not in _SAME:
        return f"attention implementation {implementation!r}"
    if tracing() or implementation is None or implementation == ATTENTION:
        return None
    for function in _functions(model, implementation):
        if function not in _of_transformers:
            scope = getattr(function, "__globals__", {})
            _of_transformers[function] = str(scope.get("__name__")).partition(".")[0] == "transformers"
        if not _of_transformers[function]:
            return f"attention implementation {implementation!r} was replaced"
    return None


def _functions(model: Any, implementation: str) -> list[Any]:
    """What computes such attention and makes its mask. One that this release has under no known name is missing here;
    its mathematics was checked by running it."""
    found = []
    if implementation == "eager":
        module = sys.modules.get(type(model)._rk_original.__module__)
        found.append(getattr(module, "eager_attention_forward", None))
    for registry in _registries():
        with contextlib.suppress(KeyError):
            found.append(registry[implementation])
    return [function for function in found if function is not None]


@functools.cache
def _registries() -> list[Any]:
    """transformers' two tables of implementations: what computes attention, what makes masks."""
    places = (("modeling_utils", "ALL_ATTENTION_FUNCTIONS"), ("masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS"))
    modules = [(sys.modules.get(f"transformers.{module}"), name) for module, name in places]
    return [getattr(module, name) for module, name in modules if hasattr(module, name)]
