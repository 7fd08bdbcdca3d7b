"""The second half of every column reduction: partial sums of float32, added in a fixed order.

The first half lives in the kernels: each of P programs writes the sums of its own rows to row `program` of `[P,
H]`. Here one program owns BLOCK_C columns of one of up to three such arrays and walks the P rows from first to
last. No atomics, so the same launch gives the same bits. P * H floats are read once, and come from L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_P = 128
_BLOCK_C = 32


@triton.jit(do_not_specialize=["rows"])
def add_partials_kernel(
    partials_ptr,  # [arrays, rows, H] float32
    out0_ptr,  # [H]
    out1_ptr,  # [H], or None
    out2_ptr,  # [H], or None
    rows,
    H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    array = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_columns = columns < H
    base = partials_ptr + array.to(tl.int64) * rows * H + columns
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(0, rows, BLOCK_P):
        row = first + tl.arange(0, BLOCK_P)
        mask = (row < rows)[:, None] & in_columns[None, :]
        total += tl.load(base[None, :] + row[:, None] * H, mask=mask, other=0.0)
    result = tl.sum(total, 0)
    if array == 0:
        tl.store(out0_ptr + columns, result.to(out0_ptr.dtype.element_ty), mask=in_columns)
    if out1_ptr is not None:  # noqa: SIM102 (this test is made at compile time, the next one is not)
        if array == 1:
            tl.store(out1_ptr + columns, result.to(out1_ptr.dtype.element_ty), mask=in_columns)
    if out2_ptr is not None:  # noqa: SIM102
        if array == 2:
            tl.store(out2_ptr + columns, result.to(out2_ptr.dtype.element_ty), mask=in_columns)


def add_partials(partials: Tensor, *outs: Tensor) -> None:
    """Writes the sum over dim 1 of partials (`[arrays, P, H]` float32, P > 0) to outs, one `[H]` for each array."""
    _, rows, width = partials.shape
    out0, out1, out2 = (*outs, None, None)[:3]
    grid = (triton.cdiv(width, _BLOCK_C), len(outs))
    add_partials_kernel[grid](
        partials, out0, out1, out2, rows, H=width, BLOCK_P=_BLOCK_P, BLOCK_C=_BLOCK_C, num_warps=8
    )


def empty_partials(arrays: int, programs: int, width: int, device: torch.device) -> Tensor:
    """Room for the partial sums of `programs` programs."""
    return torch.empty((arrays, programs, width), dtype=torch.float32, device=device)
