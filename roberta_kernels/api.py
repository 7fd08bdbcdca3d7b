"""The public names, with all that they need, which takes seconds to import: when the first of them is asked for."""

from __future__ import annotations

from roberta_kernels import models, ops
from roberta_kernels.backends import (
    BackendError,
    available_backends,
    backend,
    set_backend,
)
from roberta_kernels.encoding import EncodeReport, EncodingError, encode
from roberta_kernels.hf import attention_interface
from roberta_kernels.patching import (
    PatchReport,
    is_patched,
    patch,
    patch_transformers,
    refresh,
    unpatch,
    unpatch_transformers,
)
from roberta_kernels.verification import VerificationReport, verify

__all__ = [
    "BackendError",
    "EncodeReport",
    "EncodingError",
    "PatchReport",
    "VerificationReport",
    "attention_interface",
    "available_backends",
    "backend",
    "encode",
    "is_patched",
    "models",
    "ops",
    "patch",
    "patch_transformers",
    "refresh",
    "set_backend",
    "unpatch",
    "unpatch_transformers",
    "verify",
]
