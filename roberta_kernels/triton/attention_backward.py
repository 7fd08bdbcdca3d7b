"""The backward kernels of attention; attention.py tells their idea and launches them."""

from __future__ import annotations

import triton
import triton.language as tl

from roberta_kernels.triton.attention_common import (
    LOG2E,
    PLAIN_INTEGERS,
    PLAIN_POINTERS,
    clear_rows,
    end_of_rest,
    load_bias,
    load_rows,
    lse_log2,
    sequence_of,
    store_rows,
    visible_keys,
)
from roberta_kernels.triton.philox import keep_mask, keep_mask_transposed


@triton.jit(do_not_specialize=PLAIN_INTEGERS, do_not_specialize_on_alignment=PLAIN_POINTERS)
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
    grad_out = load_rows(grad_base, stride_gt, in_rows, BLOCK_M, True, HEAD_DIM, BLOCK_D, STRIDE_UNIT)
    out = load_rows(out_base, heads * HEAD_DIM, in_rows, BLOCK_M, True, HEAD_DIM, BLOCK_D, 1)
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + head.to(tl.int64) * tokens_q + rows, delta, mask=in_rows)


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
    bias_ptr,
    bias_columns,
    columns,
    first_column,
    first_row,
    head,
    first_query,
    last_query,
    len_q,
    len_k,
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
        q = load_rows(q_base + m * stride_q64, stride_q, in_rows, BLOCK_M, True, HEAD_DIM, BLOCK_D, STRIDE_UNIT)
        g = load_rows(g_base + m * stride_g64, stride_g, in_rows, BLOCK_M, True, HEAD_DIM, BLOCK_D, STRIDE_UNIT)
        lse = lse_log2(lse_ptr, rows, in_rows)
        delta = tl.load(delta_ptr + rows, mask=in_rows, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * score_scale
        if bias_ptr is not None:
            scores += tl.trans(load_bias(bias_ptr, bias_columns, rows, columns, len_q, len_k))
        p = tl.exp2(scores - lse[None, :])
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


@triton.jit(do_not_specialize=PLAIN_INTEGERS, do_not_specialize_on_alignment=PLAIN_POINTERS)
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
    bias_ptr,  # [heads, bias_rows, bias_columns], or None
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
    tokens_k,
    max_seqlen_q,
    max_seqlen_k,
    tiles,  # of keys, in the longest sequence
    bias_rows,
    bias_columns,
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
    start_k, len_k = sequence_of(cu_seqlens_k_ptr, b, max_seqlen_k)
    end = end_of_rest(cu_seqlens_k_ptr, b, tokens_k, tiles, heads)
    clear_rows(grad_k_ptr, head, start_k + len_k, end, tile, tiles, heads, HEAD_DIM)
    clear_rows(grad_v_ptr, head, start_k + len_k, end, tile, tiles, heads, HEAD_DIM)
    first = tile * BLOCK_N
    if first >= len_k:
        return
    start_q, len_q = sequence_of(cu_seqlens_q_ptr, b, max_seqlen_q)
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
    k = load_rows(k_base, stride_kt, in_columns, BLOCK_N, True, HEAD_DIM, BLOCK_D, STRIDE_UNIT)
    v = load_rows(v_base, stride_vt, in_columns, BLOCK_N, True, HEAD_DIM, BLOCK_D, STRIDE_UNIT)
    lse_base = lse_ptr + head64 * tokens_q + start_q
    delta_base = delta_ptr + head64 * tokens_q + start_q
    bias_base = bias_ptr
    if bias_ptr is not None:
        bias_base = bias_ptr + head64 * bias_rows * bias_columns
    score_scale = scale * LOG2E

    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    everyone = 0  # queries from it on see all keys of the tile
    if CAUSAL:
        first_query = tl.maximum(first - shift, 0) // BLOCK_M * BLOCK_M
        everyone = tl.maximum(first + BLOCK_N - 1 - shift, 0)
        everyone = tl.minimum((everyone + BLOCK_M - 1) // BLOCK_M * BLOCK_M, len_q)
        grad_k, grad_v = _grad_kv_tiles(
            grad_k, grad_v, k, v, q_base, g_base, lse_base, delta_base, bias_base, bias_columns, columns, first,
            start_q, head, first_query, everyone, len_q, len_k, shift, stride_qt, stride_gt, score_scale, seed,
            dropout_threshold, dropout_scale, True, DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, STRIDE_UNIT,
            PRECISION,
        )  # fmt: skip
    grad_k, grad_v = _grad_kv_tiles(
        grad_k, grad_v, k, v, q_base, g_base, lse_base, delta_base, bias_base, bias_columns, columns, first, start_q,
        head, everyone, len_q, len_q, len_k, shift, stride_qt, stride_gt, score_scale, seed, dropout_threshold,
        dropout_scale, False, DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, STRIDE_UNIT, PRECISION,
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
    store_rows(grad_k_ptr + offset, grad_k, in_columns, heads, BLOCK_N, HEAD_DIM, BLOCK_D)
    store_rows(grad_v_ptr + offset, grad_v, in_columns, heads, BLOCK_N, HEAD_DIM, BLOCK_D)


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
    bias_ptr,
    bias_columns,
    rows,
    first_row,
    head,
    first_key,
    last_key,
    len_q,
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
        k = load_rows(k_base + n * stride_k64, stride_k, in_rows, BLOCK_N, MASKED, HEAD_DIM, BLOCK_D, STRIDE_UNIT)
        v = load_rows(v_base + n * stride_v64, stride_v, in_rows, BLOCK_N, MASKED, HEAD_DIM, BLOCK_D, STRIDE_UNIT)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * score_scale
        if bias_ptr is not None:
            scores += load_bias(bias_ptr, bias_columns, rows, columns, len_q, len_k)
        p = tl.exp2(scores - lse[:, None])
        if MASKED:
            p = tl.where(visible_keys(rows, columns, len_k, shift, key_mask_ptr, CAUSAL), p, 0.0)
        grad_p = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            keep = keep_mask(seed, first_row + rows, n, head, dropout_threshold, BLOCK_N)
            grad_p = tl.where(keep, grad_p * dropout_scale, 0.0)
        grad_scores = p * (grad_p - delta[:, None])
        grad_q = tl.dot(grad_scores.to(k.dtype), k, grad_q, input_precision=PRECISION)
    return grad_q


@triton.jit(do_not_specialize=PLAIN_INTEGERS, do_not_specialize_on_alignment=PLAIN_POINTERS)
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
    bias_ptr,  # [heads, bias_rows, bias_columns], or None
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
    max_seqlen_q,
    max_seqlen_k,
    tiles,  # of queries, in the longest sequence
    bias_rows,
    bias_columns,
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
    start_q, len_q = sequence_of(cu_seqlens_q_ptr, b, max_seqlen_q)
    end = end_of_rest(cu_seqlens_q_ptr, b, tokens_q, tiles, heads)
    clear_rows(grad_q_ptr, head, start_q + len_q, end, tile, tiles, heads, HEAD_DIM)
    first = tile * BLOCK_M
    if first >= len_q:
        return
    start_k, len_k = sequence_of(cu_seqlens_k_ptr, b, max_seqlen_k)
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
    bias_base = bias_ptr
    if bias_ptr is not None:
        bias_base = bias_ptr + head64 * bias_rows * bias_columns
    q = load_rows(q_base, stride_qt, in_rows, BLOCK_M, True, HEAD_DIM, BLOCK_D, STRIDE_UNIT)
    g = load_rows(g_base, stride_gt, in_rows, BLOCK_M, True, HEAD_DIM, BLOCK_D, STRIDE_UNIT)
    lse = lse_log2(lse_ptr + head64 * tokens_q + start_q, rows, in_rows)
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
            grad_q, q, g, lse, delta, k_base, v_base, mask_base, bias_base, bias_columns, rows, start_q, head, 0,
            unmasked, len_q, len_k, shift, stride_kt, stride_vt, score_scale, seed, dropout_threshold, dropout_scale,
            False, CAUSAL, DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_N, STRIDE_UNIT, PRECISION,
        )  # fmt: skip
    grad_q = _grad_q_tiles(
        grad_q, q, g, lse, delta, k_base, v_base, mask_base, bias_base, bias_columns, rows, start_q, head, unmasked,
        last, len_q, len_k, shift, stride_kt, stride_vt, score_scale, seed, dropout_threshold, dropout_scale, True,
        CAUSAL, DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_N, STRIDE_UNIT, PRECISION,
    )  # fmt: skip
    offset = (row64 * heads + head) * HEAD_DIM
    store_rows(grad_q_ptr + offset, grad_q * scale, in_rows, heads, BLOCK_M, HEAD_DIM, BLOCK_D)
