"""Fused kernels that make any Hugging Face RoBERTa-family model faster, in one line, with the same answers.

import roberta_kernels as rk
report = rk.patch(model)      # in place; print(report) says what was replaced, what was left, and why
rk.unpatch(model)             # exactly the model it was
"""

from __future__ import annotations

from typing import Any

from roberta_kernels import requirements

requirements.check()

from roberta_kernels import models, ops  # noqa: E402
from roberta_kernels._version import __version__  # noqa: E402
from roberta_kernels.backends import (  # noqa: E402
    BackendError,
    available_backends,
    backend,
    set_backend,
)
from roberta_kernels.encoding import EncodeReport, EncodingError, encode  # noqa: E402
from roberta_kernels.hf import attention_interface  # noqa: E402
from roberta_kernels.patching import (  # noqa: E402
    PatchReport,
    is_patched,
    patch,
    patch_transformers,
    unpatch,
    unpatch_transformers,
)
from roberta_kernels.verification import VerificationReport, verify  # noqa: E402

attention_interface.register()


def __getattr__(name: str) -> Any:
    """FastRoberta and its like: made when first asked for, so that importing this package touches no class of
    transformers."""
    if name.startswith("FastRoberta"):
        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
    "set_backend",
    "unpatch",
    "unpatch_transformers",
    "verify",
]
