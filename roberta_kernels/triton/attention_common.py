"""What the forward and backward kernels of attention share: rows to and from memory, sequences, masks."""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.0 / math.log(2.0))
LN2 = tl.constexpr(math.log(2.0))

# Arguments that no compilation is keyed on.
PLAIN_INTEGERS = ["heads", "tokens_q", "tokens_k", "max_seqlen_q", "max_seqlen_k", "tiles", "dropout_threshold"]
PLAIN_INTEGERS += ["bias_rows", "bias_columns", "sequences"]
PLAIN_INTEGERS += [f"stride_{t}{axis}" for t in "qkvg" for axis in "th"]
PLAIN_POINTERS = ["lse_ptr", "delta_ptr", "cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "key_mask_ptr", "seed_ptr"]
PLAIN_POINTERS += ["bias_ptr", "grad_bias_ptr"]


@triton.jit
def load_rows(
    base,  # pointer to the first row of the tile
    stride,
    in_rows,  # [ROWS] bool
    ROWS: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
):
    """`[ROWS, BLOCK_D]`, zeros outside of the rows and of the head."""
    d = tl.arange(0, BLOCK_D)
    pointers = base + (tl.arange(0, ROWS) * stride * STRIDE_UNIT)[:, None] + d[None, :]
    if BLOCK_D != HEAD_DIM:
        in_head = d < HEAD_DIM
        if MASK_ROWS:
            tile = tl.load(pointers, mask=in_rows[:, None] & in_head[None, :], other=0.0)
        else:
            tile = tl.load(pointers, mask=in_head[None, :], other=0.0)
    elif MASK_ROWS:
        tile = tl.load(pointers, mask=in_rows[:, None], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_rows(base, tile, in_rows, heads, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores `[ROWS, BLOCK_D]` to rows of a contiguous `[T, heads, HEAD_DIM]`."""
    d = tl.arange(0, BLOCK_D)
    pointers = base + (tl.arange(0, ROWS) * heads * HEAD_DIM)[:, None] + d[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=in_rows[:, None] & (d < HEAD_DIM)[None, :])


@triton.jit
def load_bias(
    base,  # pointer to a head's [bias_rows, bias_columns]
    bias_columns,
    rows,  # [BLOCK_M], within the sequence
    columns,  # [BLOCK_N], within the sequence
    len_q,
    len_k,
):
    """`[BLOCK_M, BLOCK_N]` in units of log2, zeros outside of the sequence."""
    inside = (rows < len_q)[:, None] & (columns < len_k)[None, :]
    bias = tl.load(base + rows[:, None] * bias_columns + columns[None, :], mask=inside, other=0.0)
    return bias.to(tl.float32) * LOG2E


@triton.jit
def sequence_of(cu_seqlens_ptr, b, max_seqlen):
    """(first row, length) of sequence b, which has no more rows than max_seqlen: others belong to none."""
    start = tl.load(cu_seqlens_ptr + b)
    return start, tl.minimum(tl.load(cu_seqlens_ptr + b + 1) - start, max_seqlen)


@triton.jit
def end_of_rest(cu_seqlens_ptr, b, tokens, tiles, heads):
    """Where the rows end that follow sequence b and belong to none: at the next sequence, or with the tensor."""
    last = b + 1 == tl.num_programs(0) // tiles // heads
    return tl.where(last, tokens, tl.load(cu_seqlens_ptr + b + 1))


@triton.jit
def clear_rows(
    ptr,  # [T, heads, HEAD_DIM]
    head,
    first,
    end,
    tile,
    tiles,
    heads,
    HEAD_DIM: tl.constexpr,
):
    """Zeros in a head's rows from first up to end, shared by the programs of a sequence. There are none where a call
    keeps to its max_seqlen and has no room left.
    """
    # Addresses of their own: what they share with the rest of a kernel would be kept in registers until there.
    SIZE: tl.constexpr = 1024
    count = (end - first) * HEAD_DIM
    for start in range(tile * SIZE, count, tiles * SIZE):
        at = start + tl.arange(0, SIZE)
        rows = (first + at // HEAD_DIM).to(tl.int64)
        tl.store(
            ptr + (rows * heads + head) * HEAD_DIM + at % HEAD_DIM,
            tl.zeros([SIZE], ptr.dtype.element_ty),
            mask=at < count,
        )


@triton.jit
def clear_lse(
    lse_ptr,  # [heads, tokens_q] float32
    head,
    first,
    end,
    tile,
    tiles,
    tokens_q,
):
    """-inf, likewise."""
    SIZE: tl.constexpr = 128
    for start in range(first + tile * SIZE, end, tiles * SIZE):
        rows = start + tl.arange(0, SIZE)
        nothing = tl.full([SIZE], float("-inf"), tl.float32)
        tl.store(lse_ptr + head.to(tl.int64) * tokens_q + rows, nothing, mask=rows < end)


@triton.jit
def lse_log2(lse_ptr, rows, in_rows):
    """Log-sum-exp in units of log2; +inf, which makes every probability zero, for a row that saw nothing."""
    lse = tl.load(lse_ptr + rows, mask=in_rows, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse) * LOG2E


@triton.jit
def visible_keys(
    rows,  # [BLOCK_M], within the sequence
    columns,  # [BLOCK_N], within the sequence
    len_k,
    shift,  # len_k - len_q
    key_mask_ptr,  # at the sequence's first key, or None
    CAUSAL: tl.constexpr,
):
    """bool `[BLOCK_M or 1, BLOCK_N]`: which keys the queries see."""
    seen = columns < len_k
    if key_mask_ptr is not None:
        seen = seen & (tl.load(key_mask_ptr + columns, mask=seen, other=0) != 0)
    visible = seen[None, :]
    if CAUSAL:
        visible = visible & (columns[None, :] <= rows[:, None] + shift)
    return visible
