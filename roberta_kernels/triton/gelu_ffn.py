"""gelu(x @ w_in^T + b_in) @ w_out^T + b_out: bias and GELU in the epilogue of the first product.

Forward: a program owns a BLOCK_M x BLOCK_N tile of the pre-activation `[T, F]`. It multiplies along H on tensor
cores (wgmma on Hopper), tiles of x and w_in fetched ahead through shared memory, and while the float32 sums are
still in registers adds the bias, applies GELU and writes the activation, and the pre-activation too if backward
will want it. So `[T, F]` is written once (twice for training) and read once, by the second product; an unfused GELU
would read and write it again. Programs run in groups of GROUP row blocks, so that the tiles in flight at one time
share rows of x and of w_in in L2. The second product has no epilogue but a bias, which torch's GEMM has as well.

Backward: the same tile of `grad_out @ w_out`, in whose epilogue the pre-activation is read, and grad_out @ w_out
becomes grad_pre = (grad_out @ w_out) * gelu'(pre), the activation is computed again, and the columns of grad_pre
are summed for b_in's gradient: one partial row for each row block, added in a fixed order by column_sum. Three
plain products remain.

2 * T * F * H flops a product. GELU is x * Phi(x) through erf, exactly, or by the tanh approximation (Hendrycks and
Gimpel 2016, section 2), which is x * sigmoid(2u).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from roberta_kernels.triton import device as device_facts
from roberta_kernels.triton.column_sum import add_partials, empty_partials

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
_TANH_FACTOR = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
_TANH_CUBIC = tl.constexpr(0.044715)
_GROUP = 8


@triton.jit
def gelu(x, TANH: tl.constexpr):
    """gelu(x), float32."""
    if TANH:
        return x * _sigmoid(2.0 * _TANH_FACTOR * (x + _TANH_CUBIC * x * x * x))
    return x * (0.5 + 0.5 * tl.erf(x * _SQRT_HALF))


@triton.jit
def gelu_and_derivative(x, TANH: tl.constexpr):
    """(gelu(x), d gelu(x) / dx), float32."""
    if TANH:
        u = _TANH_FACTOR * (x + _TANH_CUBIC * x * x * x)
        slope = _TANH_FACTOR * (1.0 + 3.0 * _TANH_CUBIC * x * x)
        s = _sigmoid(2.0 * u)
        value = x * s
        derivative = s + 2.0 * value * _sigmoid(-2.0 * u) * slope
    else:
        probability = 0.5 + 0.5 * tl.erf(x * _SQRT_HALF)
        value = x * probability
        derivative = probability + x * _INV_SQRT_2PI * tl.exp(-0.5 * x * x)
    return value, derivative


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tile_of_program(tokens, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """(row block, column block): down GROUP row blocks, then on to the next column block."""
    program = tl.program_id(0)
    row_blocks = tl.cdiv(tokens, BLOCK_M)
    column_blocks: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    group = program // (GROUP * column_blocks)
    first = group * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    within = program % (GROUP * column_blocks)
    return first + within % size, within // size


@triton.jit
def _halves(tile):
    """The left and right half of the columns; no data moves between threads."""
    ROWS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, [ROWS, 2, COLUMNS // 2]), (0, 2, 1)))


@triton.jit
def _store_forward(
    acc,  # [BLOCK_M, COLUMNS] float32: x @ w_in^T
    b_in_ptr,
    activation_ptr,
    preactivation_ptr,
    row_block,
    first_column,
    tokens,
    F: tl.constexpr,
    TANH: tl.constexpr,
):
    """The epilogue of some columns of the tile."""
    BLOCK_M: tl.constexpr = acc.shape[0]
    row = tl.arange(0, BLOCK_M)
    column = first_column + tl.arange(0, acc.shape[1])
    in_columns = column < F
    base = row_block.to(tl.int64) * BLOCK_M * F
    offset = row[:, None] * F + column[None, :]
    mask = (row_block * BLOCK_M + row < tokens)[:, None] & in_columns[None, :]
    pre = acc + tl.load(b_in_ptr + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    if preactivation_ptr is not None:
        tl.store(preactivation_ptr + base + offset, pre.to(preactivation_ptr.dtype.element_ty), mask=mask)
    tl.store(activation_ptr + base + offset, gelu(pre, TANH).to(activation_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_backward(
    acc,  # [BLOCK_M, COLUMNS] float32: grad_out @ w_out
    preactivation_ptr,
    grad_preactivation_ptr,
    activation_ptr,
    partials_ptr,
    row_block,
    first_column,
    tokens,
    F: tl.constexpr,
    TANH: tl.constexpr,
):
    """The epilogue of some columns of the tile."""
    BLOCK_M: tl.constexpr = acc.shape[0]
    row = tl.arange(0, BLOCK_M)
    column = first_column + tl.arange(0, acc.shape[1])
    in_columns = column < F
    base = row_block.to(tl.int64) * BLOCK_M * F
    offset = row[:, None] * F + column[None, :]
    mask = (row_block * BLOCK_M + row < tokens)[:, None] & in_columns[None, :]
    pre = tl.load(preactivation_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
    activation, derivative = gelu_and_derivative(pre, TANH)
    tl.store(activation_ptr + base + offset, activation.to(activation_ptr.dtype.element_ty), mask=mask)
    grad_pre = tl.where(mask, acc * derivative, 0.0)
    tl.store(grad_preactivation_ptr + base + offset, grad_pre.to(grad_preactivation_ptr.dtype.element_ty), mask=mask)
    tl.store(partials_ptr + row_block.to(tl.int64) * F + column, tl.sum(grad_pre, 0), mask=in_columns)


@triton.jit(do_not_specialize=["tokens"])
def gelu_ffn_forward_kernel(
    x_ptr,  # [T, H]
    w_in_ptr,  # [F, H]
    b_in_ptr,  # [F]
    activation_ptr,  # [T, F]
    preactivation_ptr,  # [T, F], or None
    tokens,
    H: tl.constexpr,
    F: tl.constexpr,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_block, column_block = _tile_of_program(tokens, F, BLOCK_M, BLOCK_N, GROUP)
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = column_block * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows and columns past the end read the last one: their sums are never stored, and the loop needs no mask.
    x_row = tl.minimum(row, tokens - 1).to(tl.int64)
    w_row = tl.minimum(column, F - 1).to(tl.int64)
    x_tile = x_ptr + x_row[:, None] * H + k[None, :]
    w_tile = w_in_ptr + w_row[:, None] * H + k[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, H, BLOCK_K):
        if H % BLOCK_K == 0:
            x = tl.load(x_tile)
            w = tl.load(w_tile)
        else:
            inside = (first + k < H)[None, :]
            x = tl.load(x_tile, mask=inside, other=0.0)
            w = tl.load(w_tile, mask=inside, other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
        x_tile += BLOCK_K
        w_tile += BLOCK_K
    # 64 columns at a time: the whole tile at once, with its coalesced copy, would not fit in registers.
    act, pre = activation_ptr, preactivation_ptr
    if BLOCK_N == 256:
        left, right = _halves(acc)
        part0, part1 = _halves(left)
        part2, part3 = _halves(right)
        _store_forward(part0, b_in_ptr, act, pre, row_block, first_column, tokens, F, TANH)
        _store_forward(part1, b_in_ptr, act, pre, row_block, first_column + 64, tokens, F, TANH)
        _store_forward(part2, b_in_ptr, act, pre, row_block, first_column + 128, tokens, F, TANH)
        _store_forward(part3, b_in_ptr, act, pre, row_block, first_column + 192, tokens, F, TANH)
    elif BLOCK_N == 128:
        part0, part1 = _halves(acc)
        _store_forward(part0, b_in_ptr, act, pre, row_block, first_column, tokens, F, TANH)
        _store_forward(part1, b_in_ptr, act, pre, row_block, first_column + 64, tokens, F, TANH)
    else:
        _store_forward(acc, b_in_ptr, act, pre, row_block, first_column, tokens, F, TANH)


@triton.jit(do_not_specialize=["tokens"])
def gelu_ffn_backward_kernel(
    grad_out_ptr,  # [T, O]
    w_out_ptr,  # [O, F]
    preactivation_ptr,  # [T, F]
    grad_preactivation_ptr,  # [T, F]
    activation_ptr,  # [T, F]
    partials_ptr,  # [row blocks, F] float32: column sums of grad_preactivation
    tokens,
    O: tl.constexpr,  # noqa: E741
    F: tl.constexpr,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_block, column_block = _tile_of_program(tokens, F, BLOCK_M, BLOCK_N, GROUP)
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = column_block * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_columns = column < F
    g_row = tl.minimum(row, tokens - 1).to(tl.int64)
    g_tile = grad_out_ptr + g_row[:, None] * O + k[None, :]
    w_tile = w_out_ptr + k[:, None] * F + column[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, O, BLOCK_K):
        if O % BLOCK_K == 0:
            g = tl.load(g_tile)
            if F % BLOCK_N == 0:
                w = tl.load(w_tile)
            else:
                w = tl.load(w_tile, mask=in_columns[None, :], other=0.0)
        else:
            inside = first + k < O
            g = tl.load(g_tile, mask=inside[None, :], other=0.0)
            w = tl.load(w_tile, mask=inside[:, None] & in_columns[None, :], other=0.0)
        acc = tl.dot(g, w, acc, input_precision=PRECISION)
        g_tile += BLOCK_K
        w_tile += BLOCK_K * F
    pre, grad_pre, act, partials = preactivation_ptr, grad_preactivation_ptr, activation_ptr, partials_ptr
    if BLOCK_N == 128:
        part0, part1 = _halves(acc)
        _store_backward(part0, pre, grad_pre, act, partials, row_block, first_column, tokens, F, TANH)
        _store_backward(part1, pre, grad_pre, act, partials, row_block, first_column + 64, tokens, F, TANH)
    else:
        _store_backward(acc, pre, grad_pre, act, partials, row_block, first_column, tokens, F, TANH)


_Config = tuple[int, int, int, int, int]  # BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages


def gemm_config(tokens: int, width: int, dtype: torch.dtype, device: torch.device, backward: bool) -> _Config:
    """Tiles of the product that writes `[tokens, width]`: one of three for a dtype and device, so few compilations."""
    if dtype == torch.float32:
        return (64, 64, 16, 4, 3) if device_facts.dot_precision(dtype) == "ieee" else (64, 128, 32, 8, 3)
    if tokens <= 64:
        return 64, 64, 64, 4, 4
    tiles = triton.cdiv(tokens, 128) * triton.cdiv(width, 128)
    if tiles < 2 * device_facts.multiprocessors(device):
        return 64, 128, 64, 8 if backward else 4, 3
    if device_facts.has_asynchronous_products(device):
        return (128, 128, 64, 8, 3) if backward else (128, 256, 64, 8, 3)
    return 128, 128, 32, 8, 3


def gelu_ffn_forward(
    x: Tensor,  # [T, H]
    w_in: Tensor,  # [F, H]
    b_in: Tensor,  # [F]
    w_out: Tensor,  # [O, F]
    b_out: Tensor | None,  # [O]
    tanh: bool,
    save_preactivation: bool,
) -> tuple[Tensor, Tensor]:
    """(out `[T, O]`, pre-activation `[T, F]`, or empty when it is not asked for)."""
    tokens, hidden = x.shape
    inner = w_in.shape[0]
    x, w_in, b_in = x.contiguous(), w_in.contiguous(), b_in.contiguous()
    preactivation = torch.empty((tokens, inner) if save_preactivation else 0, dtype=x.dtype, device=x.device)
    if tokens == 0:
        return torch.empty((0, w_out.shape[0]), dtype=x.dtype, device=x.device), preactivation
    activation = torch.empty((tokens, inner), dtype=x.dtype, device=x.device)
    block_m, block_n, block_k, warps, stages = gemm_config(tokens, inner, x.dtype, x.device, False)
    with device_facts.on_device(x):
        gelu_ffn_forward_kernel[(triton.cdiv(tokens, block_m) * triton.cdiv(inner, block_n),)](
            x, w_in, b_in, activation, preactivation if save_preactivation else None, tokens, H=hidden, F=inner,
            TANH=tanh, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP=_GROUP,
            PRECISION=device_facts.dot_precision(x.dtype), num_warps=warps, num_stages=stages,
        )  # fmt: skip
    if b_out is None:
        return torch.mm(activation, w_out.t()), preactivation
    return torch.addmm(b_out, activation, w_out.t()), preactivation


def gelu_ffn_backward(
    grad_out: Tensor,  # [T, O]
    x: Tensor,  # [T, H]
    w_in: Tensor,  # [F, H]
    w_out: Tensor,  # [O, F]
    preactivation: Tensor,  # [T, F]
    tanh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w_in, b_in, w_out and b_out."""
    tokens, outer = grad_out.shape
    inner = w_in.shape[0]
    if tokens == 0:
        return (
            torch.empty_like(x),
            torch.zeros_like(w_in),
            w_in.new_zeros(inner),
            torch.zeros_like(w_out),
            w_out.new_zeros(outer),
        )
    grad_out, w_out, preactivation = grad_out.contiguous(), w_out.contiguous(), preactivation.contiguous()
    grad_preactivation = torch.empty_like(preactivation)
    activation = torch.empty_like(preactivation)
    grad_b_in = torch.empty(inner, dtype=w_in.dtype, device=x.device)
    block_m, block_n, block_k, warps, stages = gemm_config(tokens, inner, x.dtype, x.device, True)
    row_blocks = triton.cdiv(tokens, block_m)
    with device_facts.on_device(x):
        partials = empty_partials(1, row_blocks, inner, x.device)
        gelu_ffn_backward_kernel[(row_blocks * triton.cdiv(inner, block_n),)](
            grad_out, w_out, preactivation, grad_preactivation, activation, partials, tokens, O=outer, F=inner,
            TANH=tanh, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP=_GROUP,
            PRECISION=device_facts.dot_precision(x.dtype), num_warps=warps, num_stages=stages,
        )  # fmt: skip
        add_partials(partials, grad_b_in)
    return (
        torch.mm(grad_preactivation, w_in),
        torch.mm(grad_preactivation.t(), x),
        grad_b_in,
        torch.mm(grad_out.t(), activation),
        grad_out.sum(0, dtype=torch.float32).to(w_out.dtype),
    )
