"""The ops as Triton kernels, for NVIDIA GPUs from Ampere on, and for CPU tensors under Triton's interpreter.

Importing this package does not import triton: `available` says whether it can run, and reading `KERNELS` loads
the kernels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from roberta_kernels.schemas import kernels_of
from roberta_kernels.triton.device import interpreting

KERNELS: dict[str, Callable[..., Any]]


def installed() -> bool:
    """Whether triton can be imported; looks, does not import."""
    spec = importlib.util.find_spec("triton")
    return spec is not None and spec.origin is not None  # no origin: a stray directory of that name


def available() -> tuple[bool, str]:
    """(True, what runs), or (False, why Triton kernels cannot run with this torch). Does not touch a device."""
    if not installed():
        return False, "triton is not installed (pip install triton)"
    if interpreting():
        return True, "interpreted (TRITON_INTERPRET=1): for tests, slow"
    if torch.version.cuda is None and torch.version.hip is None:
        return False, f"torch {torch.__version__} is a CPU build"
    return True, "compiles for NVIDIA GPUs on first use"


def _load() -> dict[str, Callable[..., Any]]:
    if interpreting():
        from roberta_kernels.triton import interpreter

        interpreter.repair()
    return kernels_of(__name__)


def __getattr__(name: str) -> Any:
    if name == "KERNELS":
        globals()["KERNELS"] = kernels = _load()
        return kernels
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
