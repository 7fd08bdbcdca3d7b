"""The ops as Triton kernels, for NVIDIA GPUs from Ampere on, and for CPU tensors under Triton's interpreter.

Importing this package does not import triton: `available` says whether it can serve, and reading `KERNELS` loads
the kernels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from roberta_kernels.triton.device import interpreting

KERNELS: dict[str, Callable[..., Any]]


def available() -> tuple[bool, str]:
    """(True, what serves), or (False, why Triton kernels cannot run here)."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:  # no origin: a stray directory of that name
        return False, "triton is not installed (pip install triton)"
    if interpreting():
        return True, "interpreted (TRITON_INTERPRET=1): for tests, slow"
    import torch

    if not torch.cuda.is_available():
        return False, "no CUDA device (TRITON_INTERPRET=1 interprets the kernels on CPU tensors)"
    return True, f"compiled for {torch.cuda.get_device_name()} on first use"


def _load() -> dict[str, Callable[..., Any]]:
    from roberta_kernels.triton import add_layer_norm, attention, embedding_layer_norm, gelu_ffn

    if interpreting():
        from roberta_kernels.triton import interpreter

        interpreter.repair()
    return {
        "attention_forward": attention.attention_forward,
        "attention_backward": attention.attention_backward,
        "add_layer_norm_forward": add_layer_norm.add_layer_norm_forward,
        "add_layer_norm_backward": add_layer_norm.add_layer_norm_backward,
        "gelu_ffn_forward": gelu_ffn.gelu_ffn_forward,
        "gelu_ffn_backward": gelu_ffn.gelu_ffn_backward,
        "embedding_layer_norm_forward": embedding_layer_norm.embedding_layer_norm_forward,
        "embedding_layer_norm_backward": embedding_layer_norm.embedding_layer_norm_backward,
    }


def __getattr__(name: str) -> Any:
    if name == "KERNELS":
        globals()["KERNELS"] = kernels = _load()
        return kernels
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
