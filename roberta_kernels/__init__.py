"""Fused kernels that make any Hugging Face RoBERTa-family model faster, in one line, with the same answers.

import roberta_kernels as rk
report = rk.patch(model)      # in place; print(report) says what was replaced, what was left, and why
rk.unpatch(model)             # exactly the model it was
"""

# ruff: noqa: F403, F405  # the names come from roberta_kernels.api when they are asked for: importing this imports no torch
from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from roberta_kernels import registration, requirements
from roberta_kernels._version import __version__

requirements.check()

if TYPE_CHECKING:
    from roberta_kernels.api import *

__all__ = [
    "BackendError",
    "EncodeReport",
    "EncodingError",
    "FastRoberta",
    "FastRobertaForCausalLM",
    "FastRobertaForMaskedLM",
    "FastRobertaForMultipleChoice",
    "FastRobertaForQuestionAnswering",
    "FastRobertaForSequenceClassification",
    "FastRobertaForTokenClassification",
    "PatchReport",
    "VerificationReport",
    "__version__",
    "available_backends",
    "backend",
    "encode",
    "is_patched",
    "ops",
    "patch",
    "patch_transformers",
    "refresh",
    "set_backend",
    "unpatch",
    "unpatch_transformers",
    "verify",
]


# Where a name is defined, unless it is in roberta_kernels.api. The Fast classes are made when first asked for: nothing
# else touches a class of transformers.
_ELSEWHERE = {"attention_interface": "roberta_kernels.hf.attention_interface", "ops": "roberta_kernels.ops"}


def __getattr__(name: str) -> Any:
    value: Any
    if name in _ELSEWHERE:
        value = importlib.import_module(_ELSEWHERE[name])
    elif name.startswith("FastRoberta"):
        value = getattr(importlib.import_module("roberta_kernels.models"), name)
    elif name in __all__:
        value = getattr(importlib.import_module("roberta_kernels.api"), name)
    elif not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")  # rk.models, whatever was imported before
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


registration.register()
