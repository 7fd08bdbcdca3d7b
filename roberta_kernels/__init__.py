"""Fused kernels that make any Hugging Face RoBERTa-family model faster, in one line, with the same answers.

import roberta_kernels as rk
report = rk.patch(model)      # in place; print(report) says what was replaced, what was left, and why
rk.unpatch(model)             # exactly the model it was
"""

# ruff: noqa: F403, F405  # the names come from roberta_kernels.api, when they are asked for
from __future__ import annotations

import importlib
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roberta_kernels import requirements
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


def __getattr__(name: str) -> Any:
    if name in (*__all__, "attention_interface") or name.startswith("FastRoberta"):
        # The Fast classes are made when first asked for: importing this package touches no class of transformers.
        module = importlib.import_module(f"roberta_kernels.{'models' if name.startswith('Fast') else 'api'}")
        globals()[name] = value = getattr(module, name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_command() -> bool:
    """Whether this process is `roberta-kernels`, or `python -m roberta_kernels`."""
    program = sys.argv[0] if getattr(sys, "argv", None) else ""
    if program == "-m":  # until the module is found
        options = sys.orig_argv
        return "-mroberta_kernels" in options or ("-m", "roberta_kernels") in itertools.pairwise(options)
    return Path(program).stem == "roberta-kernels"


if not _is_command():  # which imports what it needs when it needs it, so that its help is there at once
    importlib.import_module("roberta_kernels.api")
