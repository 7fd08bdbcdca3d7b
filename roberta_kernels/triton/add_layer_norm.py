"""layer_norm(residual + dropout(x + x_bias)) in one pass over memory.

Forward: a program owns ROWS whole rows. They are read once, summed, masked and normalised in registers (two passes
over the registers for mean and variance, so no cancellation), and written once: 3 * T * H elements move, plus 8
bytes of statistics a row. The work is all bandwidth; ROWS keeps several 16-byte loads in flight a thread and shares
the read of weight and bias.

Backward: the sum z is computed again from x and residual, so forward writes nothing but its output. A fixed number of
programs (a few for each multiprocessor) stride over the rows. With g = grad_out * weight and n = (z - mean) * rstd,

    grad_z = rstd * (g - mean(g) - n * mean(g * n))

needs two row sums; the column sums (weight, bias and x_bias gradients) grow in registers and leave once, as
`[programs, H]` partials that column_sum adds in a fixed order. 4 * T * H elements move, 5 with dropout (grad_x and
grad_residual differ).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from roberta_kernels.triton import device as device_facts
from roberta_kernels.triton.column_sum import add_partials, empty_partials
from roberta_kernels.triton.philox import keep_mask, keep_scale, threshold

# Above this width the column sums of a row no longer fit beside it in registers, and wait in memory (in L2) instead.
MAX_REGISTER_ACCUMULATORS = 4096
_PROGRAMS_PER_MULTIPROCESSOR = 4


@triton.jit
def _load_sum(
    x_ptr,
    residual_ptr,
    x_bias_ptr,
    offset,  # [ROWS, BLOCK_H]
    column,  # [BLOCK_H]
    mask,  # [ROWS, BLOCK_H]
    keep,  # [ROWS, BLOCK_H]: what dropout keeps
    dropout_scale,
    DROPOUT: tl.constexpr,
    H: tl.constexpr,
):
    """residual + dropout(x + x_bias) in float32, zero outside of the columns."""
    z = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if x_bias_ptr is not None:
        z += tl.load(x_bias_ptr + column, mask=column < H, other=0.0).to(tl.float32)[None, :]
    if DROPOUT:
        z = tl.where(keep, z * dropout_scale, 0.0)
    return z + tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit(
    do_not_specialize=["tokens", "dropout_threshold"],
    do_not_specialize_on_alignment=["mean_ptr", "rstd_ptr", "seed_ptr"],
)
def add_layer_norm_forward_kernel(
    x_ptr,  # [T, H]
    residual_ptr,  # [T, H]
    weight_ptr,  # [H]
    bias_ptr,  # [H]
    x_bias_ptr,  # [H], or None
    out_ptr,  # [T, H]
    mean_ptr,  # [T] float32
    rstd_ptr,  # [T] float32
    seed_ptr,  # [1] int64, or None without dropout
    tokens,
    eps: tl.float32,
    dropout_threshold: tl.uint32,
    dropout_scale: tl.float32,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_H)
    in_rows = row < tokens
    in_columns = column < H
    mask = in_rows[:, None] & in_columns[None, :]
    offset = row.to(tl.int64)[:, None] * H + column[None, :]
    DROPOUT: tl.constexpr = seed_ptr is not None
    keep = mask
    if DROPOUT:
        keep = keep_mask(tl.load(seed_ptr), row, 0, 0, dropout_threshold, BLOCK_H)
    z = _load_sum(x_ptr, residual_ptr, x_bias_ptr, offset, column, mask, keep, dropout_scale, DROPOUT, H)
    mean = tl.div_rn(tl.sum(z, 1), H * 1.0)
    centred = z - mean[:, None]
    if BLOCK_H != H:
        centred = tl.where(in_columns[None, :], centred, 0.0)
    variance = tl.sum(centred * centred, 1) / H
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    weight = tl.load(weight_ptr + column, mask=in_columns, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=in_columns, other=0.0).to(tl.float32)
    out = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + row, mean, mask=in_rows)
    tl.store(rstd_ptr + row, rstd, mask=in_rows)


@triton.jit
def layer_norm_grad_z(
    grad,  # [ROWS, BLOCK_H] float32: gradient of the normalised and scaled rows, zero outside of the columns
    z,  # [ROWS, BLOCK_H] float32
    weight,  # [BLOCK_H] float32, zero outside of the columns
    mean,  # [ROWS]
    rstd,  # [ROWS]
    H: tl.constexpr,
):
    """(gradient of z, the normalised rows)."""
    normalised = (z - mean[:, None]) * rstd[:, None]
    g = grad * weight[None, :]
    mean_g = tl.sum(g, 1) / H
    mean_gn = tl.sum(g * normalised, 1) / H
    grad_z = rstd[:, None] * (g - mean_g[:, None] - normalised * mean_gn[:, None])
    return grad_z, normalised


@triton.jit
def add_to_partial(
    partials_ptr,  # [arrays, programs, H] float32
    array: tl.constexpr,
    value,  # [BLOCK_H] float32
    column,  # [BLOCK_H]
    H: tl.constexpr,
):
    """Adds value to this program's row of the partial sums in memory."""
    place = partials_ptr + (array * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * H + column
    mask = column < H
    tl.store(place, tl.load(place, mask=mask, other=0.0) + value, mask=mask)


@triton.jit(
    do_not_specialize=["tokens", "dropout_threshold"],
    do_not_specialize_on_alignment=["mean_ptr", "rstd_ptr", "seed_ptr"],
)
def add_layer_norm_backward_kernel(
    grad_out_ptr,  # [T, H]
    x_ptr,  # [T, H]
    residual_ptr,  # [T, H]
    weight_ptr,  # [H]
    x_bias_ptr,  # [H], or None
    mean_ptr,  # [T] float32
    rstd_ptr,  # [T] float32
    grad_x_ptr,  # [T, H], or None without dropout
    grad_residual_ptr,  # [T, H]
    partials_ptr,  # [2 or 3, programs, H] float32: weight, bias, x_bias; zeros where not IN_REGISTERS
    seed_ptr,  # [1] int64, or None without dropout
    tokens,
    dropout_threshold: tl.uint32,
    dropout_scale: tl.float32,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ROWS: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):
    DROPOUT: tl.constexpr = seed_ptr is not None
    column = tl.arange(0, BLOCK_H)
    in_columns = column < H
    weight = tl.load(weight_ptr + column, mask=in_columns, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK_H], tl.float32)
    grad_bias = tl.zeros([BLOCK_H], tl.float32)
    grad_x_bias = tl.zeros([BLOCK_H], tl.float32)
    for first in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        in_rows = row < tokens
        mask = in_rows[:, None] & in_columns[None, :]
        offset = row.to(tl.int64)[:, None] * H + column[None, :]
        grad = tl.load(grad_out_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        keep = mask
        if DROPOUT:
            keep = keep_mask(tl.load(seed_ptr), row, 0, 0, dropout_threshold, BLOCK_H)
        z = _load_sum(x_ptr, residual_ptr, x_bias_ptr, offset, column, mask, keep, dropout_scale, DROPOUT, H)
        mean = tl.load(mean_ptr + row, mask=in_rows, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=in_rows, other=0.0)
        grad_z, normalised = layer_norm_grad_z(grad, z, weight, mean, rstd, H)
        tl.store(grad_residual_ptr + offset, grad_z.to(grad_residual_ptr.dtype.element_ty), mask=mask)
        if DROPOUT:
            grad_z = tl.where(keep, grad_z * dropout_scale, 0.0)
            tl.store(grad_x_ptr + offset, grad_z.to(grad_x_ptr.dtype.element_ty), mask=mask)
        row_grad_weight = tl.sum(grad * normalised, 0)
        row_grad_bias = tl.sum(grad, 0)
        if IN_REGISTERS:
            grad_weight += row_grad_weight
            grad_bias += row_grad_bias
            if x_bias_ptr is not None:
                grad_x_bias += tl.sum(grad_z, 0)
        else:
            add_to_partial(partials_ptr, 0, row_grad_weight, column, H)
            add_to_partial(partials_ptr, 1, row_grad_bias, column, H)
            if x_bias_ptr is not None:
                add_to_partial(partials_ptr, 2, tl.sum(grad_z, 0), column, H)
            tl.debug_barrier()
    if IN_REGISTERS:
        programs = tl.num_programs(0)
        partial = partials_ptr + tl.program_id(0).to(tl.int64) * H + column
        tl.store(partial, grad_weight, mask=in_columns)
        tl.store(partial + programs.to(tl.int64) * H, grad_bias, mask=in_columns)
        if x_bias_ptr is not None:
            tl.store(partial + 2 * programs.to(tl.int64) * H, grad_x_bias, mask=in_columns)


def row_config(width: int) -> tuple[int, int, int]:
    """(BLOCK_H, ROWS, num_warps) of a kernel that keeps whole rows of `width` elements in registers."""
    block = max(triton.next_power_of_2(width), 16)
    rows = max(1, min(8, 2048 // block))
    warps = max(4, min(32, block * rows // 512))
    return block, rows, warps


def backward_programs(tokens: int, rows: int, device: torch.device) -> int:
    """Programs of a backward pass over rows: enough to fill the device, with few partial sums to add up."""
    return min(triton.cdiv(tokens, rows), _PROGRAMS_PER_MULTIPROCESSOR * device_facts.multiprocessors(device))


def add_layer_norm_forward(
    x: Tensor,  # [T, H]
    residual: Tensor,  # [T, H]
    weight: Tensor,  # [H]
    bias: Tensor,  # [H]
    eps: float,
    x_bias: Tensor | None,  # [H]
    dropout_p: float,
    seed: Tensor | None,  # [1] int64
) -> tuple[Tensor, Tensor, Tensor]:
    """(out `[T, H]`, mean `[T]` float32, rstd `[T]` float32)."""
    tokens, width = x.shape
    x, residual, weight, bias = (t.contiguous() for t in (x, residual, weight, bias))
    x_bias = None if x_bias is None else x_bias.contiguous()
    out = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    mean = torch.empty(tokens, dtype=torch.float32, device=x.device)
    rstd = torch.empty(tokens, dtype=torch.float32, device=x.device)
    if tokens == 0:
        return out, mean, rstd
    block, rows, warps = row_config(width)
    with device_facts.on_device(x):
        add_layer_norm_forward_kernel[(triton.cdiv(tokens, rows),)](
            x, residual, weight, bias, x_bias, out, mean, rstd, seed if dropout_p > 0 else None, tokens, eps,
            threshold(dropout_p), keep_scale(dropout_p), H=width, BLOCK_H=block, ROWS=rows, num_warps=warps,
        )  # fmt: skip
    return out, mean, rstd


def add_layer_norm_backward(
    grad_out: Tensor,  # [T, H]
    x: Tensor,  # [T, H]
    residual: Tensor,  # [T, H]
    weight: Tensor,  # [H]
    x_bias: Tensor | None,  # [H]
    mean: Tensor,  # [T] float32
    rstd: Tensor,  # [T] float32
    dropout_p: float,
    seed: Tensor | None,  # [1] int64
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (empty where equal to residual's: no dropout), residual, weight, bias, x_bias (empty if none)."""
    tokens, width = x.shape
    grad_out, x, residual, weight, mean, rstd = (t.contiguous() for t in (grad_out, x, residual, weight, mean, rstd))
    x_bias = None if x_bias is None else x_bias.contiguous()
    grad_residual = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    grad_x = torch.empty((tokens, width) if dropout_p > 0 else 0, dtype=x.dtype, device=x.device)
    allocate = torch.zeros if tokens == 0 else torch.empty
    grad_weight = allocate(width, dtype=weight.dtype, device=x.device)
    grad_bias = allocate(width, dtype=weight.dtype, device=x.device)
    grad_x_bias = (
        torch.empty(0, dtype=x.dtype, device=x.device)
        if x_bias is None
        else allocate(width, dtype=x_bias.dtype, device=x.device)
    )
    grads = (grad_x, grad_residual, grad_weight, grad_bias, grad_x_bias)
    if tokens == 0:
        return grads
    block, rows, warps = row_config(width)
    in_registers = block <= MAX_REGISTER_ACCUMULATORS
    programs = backward_programs(tokens, rows, x.device)
    sums = (grad_weight, grad_bias) if x_bias is None else (grad_weight, grad_bias, grad_x_bias)
    with device_facts.on_device(x):
        partials = empty_partials(len(sums), programs, width, x.device)
        if not in_registers:
            partials.zero_()
        add_layer_norm_backward_kernel[(programs,)](
            grad_out, x, residual, weight, x_bias, mean, rstd, grad_x if dropout_p > 0 else None, grad_residual,
            partials, seed if dropout_p > 0 else None, tokens, threshold(dropout_p), keep_scale(dropout_p), H=width,
            BLOCK_H=block, ROWS=rows, IN_REGISTERS=in_registers, num_warps=warps,
        )  # fmt: skip
        add_partials(partials, *sums)
    return grads
