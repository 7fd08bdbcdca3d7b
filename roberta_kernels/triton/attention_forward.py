"""The forward kernel of attention; attention.py tells its idea and launches it."""

from __future__ import annotations

import triton
import triton.language as tl

from roberta_kernels.triton.attention_common import (
    LN2,
    LOG2E,
    PLAIN_INTEGERS,
    PLAIN_POINTERS,
    clear_lse,
    clear_rows,
    end_of_rest,
    load_bias,
    load_rows,
    sequence_of,
    store_rows,
    visible_keys,
)
from roberta_kernels.triton.philox import keep_mask


@triton.jit
def _forward_tiles(
    acc,  # [BLOCK_M, BLOCK_D]: unnormalised output
    row_sum,  # [BLOCK_M]
    row_max,  # [BLOCK_M], in units of log2
    q,  # [BLOCK_M, BLOCK_D]
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
        k = load_rows(k_base + n * stride_k64, stride_k, in_rows, BLOCK_N, MASKED, HEAD_DIM, BLOCK_D, STRIDE_UNIT)
        v = load_rows(v_base + n * stride_v64, stride_v, in_rows, BLOCK_N, MASKED, HEAD_DIM, BLOCK_D, STRIDE_UNIT)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        unit = score_scale
        if bias_ptr is not None:
            scores = scores * score_scale + load_bias(bias_ptr, bias_columns, rows, columns, len_q, len_k)
            unit = 1.0
        if MASKED:
            visible = visible_keys(rows, columns, len_k, shift, key_mask_ptr, CAUSAL)
            scores = tl.where(visible, scores * unit, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            reference = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row that has seen no key yet
            p = tl.exp2(scores - reference[:, None])
        else:
            new_max = tl.maximum(row_max, tl.max(scores, 1) * unit)
            reference = new_max
            p = tl.exp2(scores * unit - reference[:, None])
        decay = tl.exp2(row_max - reference)
        row_sum = row_sum * decay + tl.sum(p, 1)
        row_max = new_max
        if DROPOUT:
            p = tl.where(keep_mask(seed, first_row + rows, n, head, dropout_threshold, BLOCK_N), p, 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, row_sum, row_max


@triton.jit(do_not_specialize=PLAIN_INTEGERS, do_not_specialize_on_alignment=PLAIN_POINTERS)
def attention_forward_kernel(
    q_ptr,  # [Tq, heads, HEAD_DIM], strided
    k_ptr,  # [Tk, heads, HEAD_DIM], strided
    v_ptr,  # [Tk, heads, HEAD_DIM], strided
    out_ptr,  # [Tq, heads, HEAD_DIM]
    lse_ptr,  # [heads, Tq] float32
    cu_seqlens_q_ptr,  # [B + 1] int32
    cu_seqlens_k_ptr,  # [B + 1] int32
    key_mask_ptr,  # [Tk] bool, or None
    bias_ptr,  # [heads, bias_rows, bias_columns], or None
    seed_ptr,  # [1] int64, or None without dropout
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
    clear_rows(out_ptr, head, start_q + len_q, end, tile, tiles, heads, HEAD_DIM)
    clear_lse(lse_ptr, head, start_q + len_q, end, tile, tiles, tokens_q)
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
    k_base = k_ptr + (start_k.to(tl.int64) * stride_kt + head64 * stride_kh) * STRIDE_UNIT
    v_base = v_ptr + (start_k.to(tl.int64) * stride_vt + head64 * stride_vh) * STRIDE_UNIT
    mask_base = key_mask_ptr
    if key_mask_ptr is not None:
        mask_base = key_mask_ptr + start_k
    bias_base = bias_ptr
    if bias_ptr is not None:
        bias_base = bias_ptr + head64 * bias_rows * bias_columns
    q = load_rows(q_base, stride_qt, in_rows, BLOCK_M, True, HEAD_DIM, BLOCK_D, STRIDE_UNIT)
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
            acc, row_sum, row_max, q, k_base, v_base, mask_base, bias_base, bias_columns, rows, start_q, head, 0,
            unmasked, len_q, len_k, shift, stride_kt, stride_vt, score_scale, seed, dropout_threshold, False, CAUSAL,
            DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_N, STRIDE_UNIT, PRECISION,
        )  # fmt: skip
    acc, row_sum, row_max = _forward_tiles(
        acc, row_sum, row_max, q, k_base, v_base, mask_base, bias_base, bias_columns, rows, start_q, head, unmasked,
        last, len_q, len_k, shift, stride_kt, stride_vt, score_scale, seed, dropout_threshold, True, CAUSAL, DROPOUT,
        HEAD_DIM, BLOCK_D, BLOCK_N, STRIDE_UNIT, PRECISION,
    )  # fmt: skip

    empty = row_sum == 0.0
    inverse = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, row_sum))
    if DROPOUT:
        inverse = inverse * dropout_scale
    lse = tl.where(empty, float("-inf"), (row_max + tl.log2(tl.where(empty, 1.0, row_sum))) * LN2)
    out_base = out_ptr + (row64 * heads + head) * HEAD_DIM
    store_rows(out_base, acc * inverse[:, None], in_rows, heads, BLOCK_M, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + head64 * tokens_q + start_q + rows, lse, mask=in_rows)
