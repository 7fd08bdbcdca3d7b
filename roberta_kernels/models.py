"""FastRoberta and its like, made when first asked for: drop-in classes for those of transformers.

Every class of a known family is here under its name with "Fast" before it: FastRobertaModel (also FastRoberta),
FastXLMRobertaForSequenceClassification, FastBertLayer.
"""

from __future__ import annotations

from typing import Any

from roberta_kernels.hf.fast_class import fast_class, fast_class_named

__all__ = ["fast_class"]


def __getattr__(name: str) -> Any:
    found = fast_class_named(name)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found
