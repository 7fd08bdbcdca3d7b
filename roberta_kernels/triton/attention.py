"""Attention over packed sequences: softmax(scale * q @ k^T) @ v, no `[S, S]` matrix in memory.

FlashAttention-2 (Dao 2023, algorithms 1 and 2) with variable lengths. All sums are float32.

Forward: a program owns BLOCK_M queries of one head of one sequence. Its q tile, the running row maximum, row sum
and output stay in registers while k and v stream by in tiles of BLOCK_N, fetched ahead through shared memory. A
head's k and v are at most 256 KiB at 512 tokens, so all programs but the first find them in L2. Scores live in
units of log2: exp2 with log2(e) folded into the scale. Tiles that every query sees in full run without any mask;
only the last tile, the causal diagonal and batches with a key_mask pay for one. 4 * len_q * len_k * head_dim flops
a head.

Backward recomputes the probabilities from the log-sum-exp, in two kernels, so that every gradient has one owner and
no atomics are needed: a program of one owns a tile of keys and sums dk and dv over the queries, a program of the
other owns a tile of queries and sums dq over the keys (7 products instead of 5, and bitwise the same result every
time). A small kernel first writes delta = rowsum(grad_out * out).

Programs are laid out flat: tile fastest, then head, then sequence; those past the end of their sequence leave at
once. Lengths and counts are plain arguments that no compilation is keyed on. Strides are passed in units of 8
elements where they allow it, which tells the compiler that rows are 16-byte aligned whatever the projection they
are views of.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from roberta_kernels.triton import device as device_facts
from roberta_kernels.triton.philox import keep_mask, keep_mask_transposed, keep_scale, threshold

LOG2E = tl.constexpr(1.0 / math.log(2.0))
LN2 = tl.constexpr(math.log(2.0))
_DELTA_ROWS = 32


@triton.jit
def _load_rows(
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
def _store_rows(base, tile, in_rows, heads, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores `[ROWS, BLOCK_D]` to rows of a contiguous `[T, heads, HEAD_DIM]`."""
    d = tl.arange(0, BLOCK_D)
    pointers = base + (tl.arange(0, ROWS) * heads * HEAD_DIM)[:, None] + d[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=in_rows[:, None] & (d < HEAD_DIM)[None, :])


@triton.jit
def _sequence(cu_seqlens_ptr, b):
    """(first row, length) of sequence b."""
    start = tl.load(cu_seqlens_ptr + b)
    return start, tl.load(cu_seqlens_ptr + b + 1) - start


@triton.jit
def _visible(
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


@triton.jit
def _forward_tiles(
    acc,  # [BLOCK_M, BLOCK_D]: unnormalised output
    row_sum,  # [BLOCK_M]
    row_max,  # [BLOCK_M], in units of log2
    q,  # [BLOCK_M, BLOCK_D]
    k_base,
    v_base,
    key_mask_ptr,
    rows,
    first_row,
    head,
    first_key,
    last_key,
    len_k,
    shift,
    stride_k,
    stride_v,
    score_scale,
    seed,
    dropout_threshold,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attends to the keys from first_key up to last_key, in tiles."""
    stride_k64 = stride_k.to(tl.int64) * STRIDE_UNIT
    stride_v64 = stride_v.to(tl.int64) * STRIDE_UNIT
    for n in range(first_key, last_key, BLOCK_N):
        columns = n + tl.arange(0, BLOCK_N)
        in_rows = columns < len_k
        k = _load_rows(k_base + n * stride_k64, stride_k, in_rows, BLOCK_N, MASKED, HEAD_DIM, BLOCK_D, STRIDE_UNIT)
        v = _load_rows(v_base + n * stride_v64, stride_v, in_rows, BLOCK_N, MASKED, HEAD_DIM, BLOCK_D, STRIDE_UNIT)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            visible = _visible(rows, columns, len_k, shift, key_mask_ptr, CAUSAL)
            scores = tl.where(visible, scores * score_scale, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            reference = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row that has seen no key yet
            p = tl.exp2(scores - reference[:, None])
        else:
            new_max = tl.maximum(row_max, tl.max(scores, 1) * score_scale)
            reference = new_max
            p = tl.exp2(scores * score_scale - reference[:, None])
        decay = tl.exp2(row_max - reference)
        row_sum = row_sum * decay + tl.sum(p, 1)
        row_max = new_max
        if DROPOUT:
            p = tl.where(keep_mask(seed, first_row + rows, n, head, dropout_threshold, BLOCK_N), p, 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, row_sum, row_max


_PLAIN_INTEGERS = ["heads", "tokens_q", "tiles", "dropout_threshold"]
_PLAIN_INTEGERS += [f"stride_{t}{axis}" for t in "qkvg" for axis in "th"]
_PLAIN_POINTERS = ["lse_ptr", "delta_ptr", "cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "key_mask_ptr", "seed_ptr"]


@triton.jit(do_not_specialize=_PLAIN_INTEGERS, do_not_specialize_on_alignment=_PLAIN_POINTERS)
def attention_forward_kernel(
    q_ptr,  # [Tq, heads, HEAD_DIM], strided
    k_ptr,  # [Tk, heads, HEAD_DIM], strided
    v_ptr,  # [Tk, heads, HEAD_DIM], strided
    out_ptr,  # [Tq, heads, HEAD_DIM]
    lse_ptr,  # [heads, Tq] float32
    cu_seqlens_q_ptr,  # [B + 1] int32
    cu_seqlens_k_ptr,  # [B + 1] int32
    key_mask_ptr,  # [Tk] bool, or None
    seed_ptr,  # [1] int64, or None without dropout
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    heads,
    tokens_q,
    tiles,  # of queries, in the longest sequence
    scale: tl.float32,
    dropout_threshold: tl.uint32,
    dropout_scale: tl.float32,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    tile = program % tiles
    if CAUSAL:
        tile = tiles - 1 - tile  # the longest work first
    head = program // tiles % heads
    b = program // tiles // heads
    start_q, len_q = _sequence(cu_seqlens_q_ptr, b)
    first = tile * BLOCK_M
    if first >= len_q:
        return
    start_k, len_k = _sequence(cu_seqlens_k_ptr, b)
    shift = len_k - len_q
    DROPOUT: tl.constexpr = seed_ptr is not None
    seed = tl.load(seed_ptr) if DROPOUT else 0

    rows = first + tl.arange(0, BLOCK_M)
    in_rows = rows < len_q
    row64 = (start_q + first).to(tl.int64)
    head64 = head.to(tl.int64)
    q_base = q_ptr + (row64 * stride_qt + head64 * stride_qh) * STRIDE_UNIT
    k_base = k_ptr + (start_k.to(tl.int64) * stride_kt + head64 * stride_kh) * STRIDE_UNIT
    v_base = v_ptr + (start_k.to(tl.int64) * stride_vt + head64 * stride_vh) * STRIDE_UNIT
    mask_base = key_mask_ptr
    if key_mask_ptr is not None:
        mask_base = key_mask_ptr + start_k
    q = _load_rows(q_base, stride_qt, in_rows, BLOCK_M, True, HEAD_DIM, BLOCK_D, STRIDE_UNIT)
    # The running maximum assumes a scale that is not negative; the sign goes to q, where it is exact.
    q = (q.to(tl.float32) * tl.where(scale < 0, -1.0, 1.0)).to(q.dtype)
    score_scale = tl.abs(scale) * LOG2E

    last = len_k  # keys beyond it are seen by no query of the tile
    unmasked = len_k  # keys before it are seen by all of them
    if CAUSAL:
        last = tl.minimum(len_k, tl.maximum(first + BLOCK_M + shift, 0))
        unmasked = tl.minimum(len_k, tl.maximum(first + shift + 1, 0))
    if key_mask_ptr is not None:
        unmasked = unmasked * 0
    unmasked = unmasked // BLOCK_N * BLOCK_N

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if key_mask_ptr is None:
        acc, row_sum, row_max = _forward_tiles(
            acc, row_sum, row_max, q, k_base, v_base, mask_base, rows, start_q, head, 0, unmasked, len_k, shift,
            stride_kt, stride_vt, score_scale, seed, dropout_threshold, False, CAUSAL, DROPOUT, HEAD_DIM, BLOCK_D,
            BLOCK_N, STRIDE_UNIT, PRECISION,
        )  # fmt: skip
    acc, row_sum, row_max = _forward_tiles(
        acc, row_sum, row_max, q, k_base, v_base, mask_base, rows, start_q, head, unmasked, last, len_k, shift,
        stride_kt, stride_vt, score_scale, seed, dropout_threshold, True, CAUSAL, DROPOUT, HEAD_DIM, BLOCK_D,
        BLOCK_N, STRIDE_UNIT, PRECISION,
    )  # fmt: skip

    empty = row_sum == 0.0
    inverse = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, row_sum))
    if DROPOUT:
        inverse = inverse * dropout_scale
    lse = tl.where(empty, float("-inf"), (row_max + tl.log2(tl.where(empty, 1.0, row_sum))) * LN2)
    out_base = out_ptr + (row64 * heads + head) * HEAD_DIM
    _store_rows(out_base, acc * inverse[:, None], in_rows, heads, BLOCK_M, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + head64 * tokens_q + start_q + rows, lse, mask=in_rows)


@triton.jit(do_not_specialize=_PLAIN_INTEGERS, do_not_specialize_on_alignment=_PLAIN_POINTERS)
def attention_delta_kernel(
    grad_out_ptr,  # [Tq, heads, HEAD_DIM], strided
    out_ptr,  # [Tq, heads, HEAD_DIM]
    delta_ptr,  # [heads, Tq] float32
    stride_gt,
    stride_gh,
    heads,
    tokens_q,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
):
    """delta = rowsum(grad_out * out): what the softmax's own gradient subtracts from every score of the row."""
    head = tl.program_id(0) % heads
    first = tl.program_id(0) // heads * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    in_rows = rows < tokens_q
    row64 = first.to(tl.int64)
    grad_base = grad_out_ptr + (row64 * stride_gt + head.to(tl.int64) * stride_gh) * STRIDE_UNIT
    out_base = out_ptr + (row64 * heads + head) * HEAD_DIM
    grad_out = _load_rows(grad_base, stride_gt, in_rows, BLOCK_M, True, HEAD_DIM, BLOCK_D, STRIDE_UNIT)
    out = _load_rows(out_base, heads * HEAD_DIM, in_rows, BLOCK_M, True, HEAD_DIM, BLOCK_D, 1)
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + head.to(tl.int64) * tokens_q + rows, delta, mask=in_rows)


@triton.jit
def _lse_log2(lse_ptr, rows, in_rows):
    """Log-sum-exp in units of log2; +inf, which makes every probability zero, for a row that saw nothing."""
    lse = tl.load(lse_ptr + rows, mask=in_rows, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse) * LOG2E


@triton.jit
def _grad_kv_tiles(
    grad_k,  # [BLOCK_N, BLOCK_D]
    grad_v,  # [BLOCK_N, BLOCK_D]
    k,  # [BLOCK_N, BLOCK_D]
    v,  # [BLOCK_N, BLOCK_D]
    q_base,
    g_base,
    lse_ptr,
    delta_ptr,
    columns,
    first_column,
    first_row,
    head,
    first_query,
    last_query,
    len_q,
    shift,
    stride_q,
    stride_g,
    score_scale,
    seed,
    dropout_threshold,
    dropout_scale,
    DIAGONAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what the queries from first_query up to last_query give to a tile of keys. Scores are transposed."""
    stride_q64 = stride_q.to(tl.int64) * STRIDE_UNIT
    stride_g64 = stride_g.to(tl.int64) * STRIDE_UNIT
    for m in range(first_query, last_query, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        in_rows = rows < len_q
        q = _load_rows(q_base + m * stride_q64, stride_q, in_rows, BLOCK_M, True, HEAD_DIM, BLOCK_D, STRIDE_UNIT)
        g = _load_rows(g_base + m * stride_g64, stride_g, in_rows, BLOCK_M, True, HEAD_DIM, BLOCK_D, STRIDE_UNIT)
        lse = _lse_log2(lse_ptr, rows, in_rows)
        delta = tl.load(delta_ptr + rows, mask=in_rows, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p = tl.exp2(scores * score_scale - lse[None, :])
        if DIAGONAL:
            p = tl.where(columns[:, None] <= rows[None, :] + shift, p, 0.0)
        grad_p = tl.dot(v, tl.trans(g), input_precision=PRECISION)
        dropped = p
        if DROPOUT:
            keep = keep_mask_transposed(seed, first_row + rows, first_column, head, dropout_threshold, BLOCK_N)
            dropped = tl.where(keep, p, 0.0)
            grad_p = tl.where(keep, grad_p * dropout_scale, 0.0)
        grad_v = tl.dot(dropped.to(g.dtype), g, grad_v, input_precision=PRECISION)
        grad_scores = p * (grad_p - delta[None, :])
        grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit(do_not_specialize=_PLAIN_INTEGERS, do_not_specialize_on_alignment=_PLAIN_POINTERS)
def attention_grad_kv_kernel(
    grad_out_ptr,  # [Tq, heads, HEAD_DIM], strided
    q_ptr,  # [Tq, heads, HEAD_DIM], strided
    k_ptr,  # [Tk, heads, HEAD_DIM], strided
    v_ptr,  # [Tk, heads, HEAD_DIM], strided
    lse_ptr,  # [heads, Tq] float32
    delta_ptr,  # [heads, Tq] float32
    grad_k_ptr,  # [Tk, heads, HEAD_DIM]
    grad_v_ptr,  # [Tk, heads, HEAD_DIM]
    cu_seqlens_q_ptr,  # [B + 1] int32
    cu_seqlens_k_ptr,  # [B + 1] int32
    key_mask_ptr,  # [Tk] bool, or None
    seed_ptr,  # [1] int64, or None without dropout
    stride_gt,
    stride_gh,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    heads,
    tokens_q,
    tiles,  # of keys, in the longest sequence
    scale: tl.float32,
    dropout_threshold: tl.uint32,
    dropout_scale: tl.float32,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    tile = program % tiles
    head = program // tiles % heads
    b = program // tiles // heads
    start_k, len_k = _sequence(cu_seqlens_k_ptr, b)
    first = tile * BLOCK_N
    if first >= len_k:
        return
    start_q, len_q = _sequence(cu_seqlens_q_ptr, b)
    shift = len_k - len_q
    DROPOUT: tl.constexpr = seed_ptr is not None
    seed = tl.load(seed_ptr) if DROPOUT else 0

    columns = first + tl.arange(0, BLOCK_N)
    in_columns = columns < len_k
    row64 = (start_k + first).to(tl.int64)
    head64 = head.to(tl.int64)
    k_base = k_ptr + (row64 * stride_kt + head64 * stride_kh) * STRIDE_UNIT
    v_base = v_ptr + (row64 * stride_vt + head64 * stride_vh) * STRIDE_UNIT
    q_base = q_ptr + (start_q.to(tl.int64) * stride_qt + head64 * stride_qh) * STRIDE_UNIT
    g_base = grad_out_ptr + (start_q.to(tl.int64) * stride_gt + head64 * stride_gh) * STRIDE_UNIT
    k = _load_rows(k_base, stride_kt, in_columns, BLOCK_N, True, HEAD_DIM, BLOCK_D, STRIDE_UNIT)
    v = _load_rows(v_base, stride_vt, in_columns, BLOCK_N, True, HEAD_DIM, BLOCK_D, STRIDE_UNIT)
    lse_base = lse_ptr + head64 * tokens_q + start_q
    delta_base = delta_ptr + head64 * tokens_q + start_q
    score_scale = scale * LOG2E

    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    everyone = 0  # queries from it on see all keys of the tile
    if CAUSAL:
        first_query = tl.maximum(first - shift, 0) // BLOCK_M * BLOCK_M
        everyone = tl.maximum(first + BLOCK_N - 1 - shift, 0)
        everyone = tl.minimum((everyone + BLOCK_M - 1) // BLOCK_M * BLOCK_M, len_q)
        grad_k, grad_v = _grad_kv_tiles(
            grad_k, grad_v, k, v, q_base, g_base, lse_base, delta_base, columns, first, start_q, head, first_query,
            everyone, len_q, shift, stride_qt, stride_gt, score_scale, seed, dropout_threshold, dropout_scale, True,
            DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, STRIDE_UNIT, PRECISION,
        )  # fmt: skip
    grad_k, grad_v = _grad_kv_tiles(
        grad_k, grad_v, k, v, q_base, g_base, lse_base, delta_base, columns, first, start_q, head, everyone,
        len_q, len_q, shift, stride_qt, stride_gt, score_scale, seed, dropout_threshold, dropout_scale, False,
        DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, STRIDE_UNIT, PRECISION,
    )  # fmt: skip
    grad_k = grad_k * scale
    if DROPOUT:
        grad_v = grad_v * dropout_scale
    if key_mask_ptr is not None:
        # A masked key is a row of its own here: whatever it gathered (overflow included) is dropped at the end.
        seen = (tl.load(key_mask_ptr + start_k + columns, mask=in_columns, other=0) != 0)[:, None]
        grad_k = tl.where(seen, grad_k, 0.0)
        grad_v = tl.where(seen, grad_v, 0.0)
    offset = (row64 * heads + head) * HEAD_DIM
    _store_rows(grad_k_ptr + offset, grad_k, in_columns, heads, BLOCK_N, HEAD_DIM, BLOCK_D)
    _store_rows(grad_v_ptr + offset, grad_v, in_columns, heads, BLOCK_N, HEAD_DIM, BLOCK_D)


@triton.jit
def _grad_q_tiles(
    grad_q,  # [BLOCK_M, BLOCK_D]
    q,  # [BLOCK_M, BLOCK_D]
    g,  # [BLOCK_M, BLOCK_D]
    lse,  # [BLOCK_M]
    delta,  # [BLOCK_M]
    k_base,
    v_base,
    key_mask_ptr,
    rows,
    first_row,
    head,
    first_key,
    last_key,
    len_k,
    shift,
    stride_k,
    stride_v,
    score_scale,
    seed,
    dropout_threshold,
    dropout_scale,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what the keys from first_key up to last_key give to a tile of queries."""
    stride_k64 = stride_k.to(tl.int64) * STRIDE_UNIT
    stride_v64 = stride_v.to(tl.int64) * STRIDE_UNIT
    for n in range(first_key, last_key, BLOCK_N):
        columns = n + tl.arange(0, BLOCK_N)
        in_rows = columns < len_k
        k = _load_rows(k_base + n * stride_k64, stride_k, in_rows, BLOCK_N, MASKED, HEAD_DIM, BLOCK_D, STRIDE_UNIT)
        v = _load_rows(v_base + n * stride_v64, stride_v, in_rows, BLOCK_N, MASKED, HEAD_DIM, BLOCK_D, STRIDE_UNIT)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p = tl.exp2(scores * score_scale - lse[:, None])
        if MASKED:
            p = tl.where(_visible(rows, columns, len_k, shift, key_mask_ptr, CAUSAL), p, 0.0)
        grad_p = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            keep = keep_mask(seed, first_row + rows, n, head, dropout_threshold, BLOCK_N)
            grad_p = tl.where(keep, grad_p * dropout_scale, 0.0)
        grad_scores = p * (grad_p - delta[:, None])
        grad_q = tl.dot(grad_scores.to(k.dtype), k, grad_q, input_precision=PRECISION)
    return grad_q


@triton.jit(do_not_specialize=_PLAIN_INTEGERS, do_not_specialize_on_alignment=_PLAIN_POINTERS)
def attention_grad_q_kernel(
    grad_out_ptr,  # [Tq, heads, HEAD_DIM], strided
    q_ptr,  # [Tq, heads, HEAD_DIM], strided
    k_ptr,  # [Tk, heads, HEAD_DIM], strided
    v_ptr,  # [Tk, heads, HEAD_DIM], strided
    lse_ptr,  # [heads, Tq] float32
    delta_ptr,  # [heads, Tq] float32
    grad_q_ptr,  # [Tq, heads, HEAD_DIM]
    cu_seqlens_q_ptr,  # [B + 1] int32
    cu_seqlens_k_ptr,  # [B + 1] int32
    key_mask_ptr,  # [Tk] bool, or None
    seed_ptr,  # [1] int64, or None without dropout
    stride_gt,
    stride_gh,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    heads,
    tokens_q,
    tiles,  # of queries, in the longest sequence
    scale: tl.float32,
    dropout_threshold: tl.uint32,
    dropout_scale: tl.float32,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    tile = program % tiles
    if CAUSAL:
        tile = tiles - 1 - tile  # the longest work first
    head = program // tiles % heads
    b = program // tiles // heads
    start_q, len_q = _sequence(cu_seqlens_q_ptr, b)
    first = tile * BLOCK_M
    if first >= len_q:
        return
    start_k, len_k = _sequence(cu_seqlens_k_ptr, b)
    shift = len_k - len_q
    DROPOUT: tl.constexpr = seed_ptr is not None
    seed = tl.load(seed_ptr) if DROPOUT else 0

    rows = first + tl.arange(0, BLOCK_M)
    in_rows = rows < len_q
    row64 = (start_q + first).to(tl.int64)
    head64 = head.to(tl.int64)
    q_base = q_ptr + (row64 * stride_qt + head64 * stride_qh) * STRIDE_UNIT
    g_base = grad_out_ptr + (row64 * stride_gt + head64 * stride_gh) * STRIDE_UNIT
    k_base = k_ptr + (start_k.to(tl.int64) * stride_kt + head64 * stride_kh) * STRIDE_UNIT
    v_base = v_ptr + (start_k.to(tl.int64) * stride_vt + head64 * stride_vh) * STRIDE_UNIT
    mask_base = key_mask_ptr
    if key_mask_ptr is not None:
        mask_base = key_mask_ptr + start_k
    q = _load_rows(q_base, stride_qt, in_rows, BLOCK_M, True, HEAD_DIM, BLOCK_D, STRIDE_UNIT)
    g = _load_rows(g_base, stride_gt, in_rows, BLOCK_M, True, HEAD_DIM, BLOCK_D, STRIDE_UNIT)
    lse = _lse_log2(lse_ptr + head64 * tokens_q + start_q, rows, in_rows)
    delta = tl.load(delta_ptr + head64 * tokens_q + start_q + rows, mask=in_rows, other=0.0)
    score_scale = scale * LOG2E

    last = len_k
    unmasked = len_k
    if CAUSAL:
        last = tl.minimum(len_k, tl.maximum(first + BLOCK_M + shift, 0))
        unmasked = tl.minimum(len_k, tl.maximum(first + shift + 1, 0))
    if key_mask_ptr is not None:
        unmasked = unmasked * 0
    unmasked = unmasked // BLOCK_N * BLOCK_N

    grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if key_mask_ptr is None:
        grad_q = _grad_q_tiles(
            grad_q, q, g, lse, delta, k_base, v_base, mask_base, rows, start_q, head, 0, unmasked, len_k, shift,
            stride_kt, stride_vt, score_scale, seed, dropout_threshold, dropout_scale, False, CAUSAL, DROPOUT,
            HEAD_DIM, BLOCK_D, BLOCK_N, STRIDE_UNIT, PRECISION,
        )  # fmt: skip
    grad_q = _grad_q_tiles(
        grad_q, q, g, lse, delta, k_base, v_base, mask_base, rows, start_q, head, unmasked, last, len_k, shift,
        stride_kt, stride_vt, score_scale, seed, dropout_threshold, dropout_scale, True, CAUSAL, DROPOUT,
        HEAD_DIM, BLOCK_D, BLOCK_N, STRIDE_UNIT, PRECISION,
    )  # fmt: skip
    offset = (row64 * heads + head) * HEAD_DIM
    _store_rows(grad_q_ptr + offset, grad_q * scale, in_rows, heads, BLOCK_M, HEAD_DIM, BLOCK_D)


# (BLOCK_M, BLOCK_N, num_warps, num_stages) of each kernel, chosen so that nothing spills on sm_80, sm_90 and sm_100:
# tests/triton/test_compile.py holds them to it. `asynchronous`: products read their operands from shared memory
# (wgmma, tcgen05); elsewhere they take registers, and at most 99 KiB of shared memory are used, which every GPU has.
# `short`: no sequence has more than 64 rows of what the kernel's programs own. float32 products run on CUDA cores,
# with small tiles.
_Config = tuple[int, int, int, int]


def forward_config(block_d: int, dtype: torch.dtype, asynchronous: bool, short: bool, dropout: bool) -> _Config:
    """Tiles of the forward kernel."""
    if dtype == torch.float32:
        return (32, 16, 8, 2) if block_d > 64 else (64, 32, 8, 2)
    if block_d > 64:
        return (128, 64, 8, 3) if asynchronous else (128, 32, 8, 3)
    if short:
        return 64, 64, 4, 2
    if dropout:
        return (128, 64, 8, 3) if asynchronous else (128, 32, 4, 3)
    return 128, 64, 4, 3


def grad_kv_config(block_d: int, dtype: torch.dtype, asynchronous: bool, short: bool, dropout: bool) -> _Config:
    """Tiles of the kernel for dk and dv."""
    if dtype == torch.float32:
        return (16, 32, 8, 1) if block_d > 64 else (32, 32, 8, 1)
    if block_d > 64:
        return (32, 64, 8, 2) if asynchronous and dropout else (64, 64, 8, 2)
    if short:
        return 32, 64, 4, 2
    return (64, 128, 8, 2) if asynchronous else (32, 128, 8, 2)


def grad_q_config(block_d: int, dtype: torch.dtype, asynchronous: bool, short: bool) -> _Config:
    """Tiles of the kernel for dq."""
    if dtype == torch.float32:
        return (32, 16, 4, 1) if block_d > 64 else (32, 16, 8, 2)
    if block_d > 64:
        return (128, 64, 8, 3) if asynchronous else (64, 64, 8, 2)
    if short:
        return (64, 64, 4, 2) if asynchronous else (64, 64, 8, 2)
    return (128, 64, 8, 2) if asynchronous else (128, 32, 8, 2)


_SHORT = 64


def _stride_unit(*tensors: Tensor) -> int:
    """8 where every row and head starts a multiple of 8 elements after the first, else 1."""
    return 1 if any(t.stride(0) % 8 or t.stride(1) % 8 for t in tensors) else 8


def _rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, copied only where head_dim is not adjacent in memory."""
    return tuple(t if t.stride(2) == 1 else t.contiguous() for t in tensors)


def _vectors(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), None if key_mask is None else key_mask.contiguous()


def _strides(unit: int, *tensors: Tensor) -> list[int]:
    return [t.stride(axis) // unit for t in tensors for axis in (0, 1)]


def attention_forward(
    q: Tensor,  # [Tq, heads, head_dim]
    k: Tensor,  # [Tk, heads, head_dim]
    v: Tensor,  # [Tk, heads, head_dim]
    cu_seqlens_q: Tensor,  # [B + 1] int32
    cu_seqlens_k: Tensor,  # [B + 1] int32
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    key_mask: Tensor | None,  # [Tk] bool
    dropout_p: float,
    seed: Tensor | None,  # [1] int64
) -> tuple[Tensor, Tensor]:
    """(out `[Tq, heads, head_dim]`, log-sum-exp `[heads, Tq]` float32). Without unit stride in head_dim: a copy."""
    tokens_q, heads, head_dim = q.shape
    q, k, v = _rows(q, k, v)
    cu_seqlens_q, cu_seqlens_k, key_mask = _vectors(cu_seqlens_q, cu_seqlens_k, key_mask)
    out = torch.empty((tokens_q, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, tokens_q), dtype=torch.float32, device=q.device)
    sequences = cu_seqlens_q.shape[0] - 1
    if tokens_q == 0 or sequences == 0 or max_seqlen_q == 0:
        return out, lse
    block_d = max(16, triton.next_power_of_2(head_dim))
    asynchronous = device_facts.has_asynchronous_products(q.device)
    block_m, block_n, warps, stages = forward_config(
        block_d, q.dtype, asynchronous, max_seqlen_q <= _SHORT, dropout_p > 0
    )
    tiles = triton.cdiv(max_seqlen_q, block_m)
    unit = _stride_unit(q, k, v)
    with device_facts.on_device(q):
        attention_forward_kernel[(tiles * heads * sequences,)](
            q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, key_mask, seed if dropout_p > 0 else None,
            *_strides(unit, q, k, v), heads, tokens_q, tiles, scale, threshold(dropout_p), keep_scale(dropout_p),
            CAUSAL=causal, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=block_m, BLOCK_N=block_n, STRIDE_UNIT=unit,
            PRECISION=device_facts.dot_precision(q.dtype), num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out, lse


def attention_backward(
    grad_out: Tensor,  # [Tq, heads, head_dim]
    q: Tensor,  # [Tq, heads, head_dim]
    k: Tensor,  # [Tk, heads, head_dim]
    v: Tensor,  # [Tk, heads, head_dim]
    out: Tensor,  # [Tq, heads, head_dim]
    lse: Tensor,  # [heads, Tq] float32
    cu_seqlens_q: Tensor,  # [B + 1] int32
    cu_seqlens_k: Tensor,  # [B + 1] int32
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    key_mask: Tensor | None,  # [Tk] bool
    dropout_p: float,
    seed: Tensor | None,  # [1] int64
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each contiguous."""
    tokens_q, heads, head_dim = q.shape
    sequences = cu_seqlens_q.shape[0] - 1
    grad_q, grad_k, grad_v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if tokens_q == 0 or max_seqlen_q == 0:
        return grad_q, grad_k.zero_(), grad_v.zero_()
    grad_out, q, k, v = _rows(grad_out, q, k, v)
    cu_seqlens_q, cu_seqlens_k, key_mask = _vectors(cu_seqlens_q, cu_seqlens_k, key_mask)
    out, lse = out.contiguous(), lse.contiguous()
    block_d = max(16, triton.next_power_of_2(head_dim))
    asynchronous = device_facts.has_asynchronous_products(q.device)
    unit = _stride_unit(grad_out, q, k, v)
    strides = _strides(unit, grad_out, q, k, v)
    delta = torch.empty_like(lse)
    if dropout_p == 0:
        seed = None
    shared = (scale, threshold(dropout_p), keep_scale(dropout_p))
    constants = {
        "CAUSAL": causal,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "STRIDE_UNIT": unit,
        "PRECISION": device_facts.dot_precision(q.dtype),
    }
    with device_facts.on_device(q):
        attention_delta_kernel[(triton.cdiv(tokens_q, _DELTA_ROWS) * heads,)](
            grad_out, out, delta, *strides[:2], heads, tokens_q, HEAD_DIM=head_dim, BLOCK_D=block_d,
            BLOCK_M=_DELTA_ROWS, STRIDE_UNIT=unit, num_warps=4,
        )  # fmt: skip
        if max_seqlen_k > 0:
            block_m, block_n, warps, stages = grad_kv_config(
                block_d, q.dtype, asynchronous, max_seqlen_k <= _SHORT, dropout_p > 0
            )
            tiles = triton.cdiv(max_seqlen_k, block_n)
            attention_grad_kv_kernel[(tiles * heads * sequences,)](
                grad_out, q, k, v, lse, delta, grad_k, grad_v, cu_seqlens_q, cu_seqlens_k, key_mask, seed, *strides,
                heads, tokens_q, tiles, *shared, BLOCK_M=block_m, BLOCK_N=block_n, **constants, num_warps=warps,
                num_stages=stages,
            )  # fmt: skip
        block_m, block_n, warps, stages = grad_q_config(block_d, q.dtype, asynchronous, max_seqlen_q <= _SHORT)
        tiles = triton.cdiv(max_seqlen_q, block_m)
        attention_grad_q_kernel[(tiles * heads * sequences,)](
            grad_out, q, k, v, lse, delta, grad_q, cu_seqlens_q, cu_seqlens_k, key_mask, seed, *strides, heads,
            tokens_q, tiles, *shared, BLOCK_M=block_m, BLOCK_N=block_n, **constants, num_warps=warps,
            num_stages=stages,
        )  # fmt: skip
    return grad_q, grad_k, grad_v
