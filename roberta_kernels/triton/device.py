"""What a launcher asks about the device: fixed for a process, so asked once."""

from __future__ import annotations

import contextlib
import functools
import os
from contextlib import AbstractContextManager

import torch
from torch import Tensor

_INTERPRETED_PROGRAMS = 4  # of a persistent kernel under the interpreter: enough to exercise its reduction
_ASYNCHRONOUS_PRODUCTS = (90, 100, 103, 110)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


@functools.cache
def capability(device: torch.device) -> int:
    """Compute capability times ten: 80 for A100, 90 for H100, 100 for B200."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def has_asynchronous_products(device: torch.device) -> bool:
    """True for Hopper and data-centre Blackwell: wgmma and tcgen05 read shared memory, of which there is 227 KiB."""
    return capability(device) in _ASYNCHRONOUS_PRODUCTS


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the device."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of tl.dot: float32 operands are rounded to TF32 only where torch is set to allow it."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: makes it the tensor's."""
    device = tensor.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
