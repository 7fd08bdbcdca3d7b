"""Whether a model's attention implementation is the mathematics that the fused attention computes."""

from __future__ import annotations

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
    function = _function(model, implementation)
    if function not in _of_transformers:
        scope = getattr(function, "__globals__", {})
        _of_transformers[function] = str(scope.get("__name__")).partition(".")[0] == "transformers"
    if not _of_transformers[function]:
        return f"attention implementation {implementation!r} was replaced"
    return None


def _function(model: Any, implementation: str) -> Any:
    if implementation == "eager":
        module = sys.modules.get(type(model)._rk_original.__module__)
        return getattr(module, "eager_attention_forward", eager_missing)
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    try:
        return ALL_ATTENTION_FUNCTIONS[implementation]
    except KeyError:
        return eager_missing


def eager_missing() -> None:
    """Stands for a function that this release has under no known name; its mathematics was checked by running it."""


_of_transformers[eager_missing] = True
