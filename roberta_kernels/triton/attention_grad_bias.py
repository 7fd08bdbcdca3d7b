"""The kernel for the gradient of a bias on the scores; attention.py tells its idea and launches it."""

from __future__ import annotations

import triton
import triton.language as tl

from roberta_kernels.triton.attention_common import (
    LOG2E,
    PLAIN_INTEGERS,
    PLAIN_POINTERS,
    load_bias,
    load_rows,
    lse_log2,
    sequence_of,
    visible_keys,
)
from roberta_kernels.triton.philox import keep_mask


@triton.jit(do_not_specialize=PLAIN_INTEGERS, do_not_specialize_on_alignment=PLAIN_POINTERS)
def attention_grad_bias_kernel(
    grad_out_ptr,  # [Tq, heads, HEAD_DIM], strided
    q_ptr,  # [Tq, heads, HEAD_DIM], strided
    k_ptr,  # [Tk, heads, HEAD_DIM], strided
    v_ptr,  # [Tk, heads, HEAD_DIM], strided
    lse_ptr,  # [heads, Tq] float32
    delta_ptr,  # [heads, Tq] float32
    bias_ptr,  # [heads, bias_rows, bias_columns]
    grad_bias_ptr,  # the same
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
    tokens_q,
    max_seqlen_q,
    max_seqlen_k,
    tiles,  # of keys, in bias_columns
    bias_rows,
    bias_columns,
    sequences,
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
    """A program owns a tile of one head's bias, and sums the scores' gradients over the sequences, in their order."""
    head64 = tl.program_id(1).to(tl.int64)
    first_q = tl.program_id(0) // tiles * BLOCK_M
    first_k = tl.program_id(0) % tiles * BLOCK_N
    rows = first_q + tl.arange(0, BLOCK_M)
    columns = first_k + tl.arange(0, BLOCK_N)
    DROPOUT: tl.constexpr = seed_ptr is not None
    seed = tl.load(seed_ptr) if DROPOUT else 0
    offset = head64 * bias_rows * bias_columns
    grad_bias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for b in range(0, sequences):
        start_q, len_q = sequence_of(cu_seqlens_q_ptr, b, max_seqlen_q)
        start_k, len_k = sequence_of(cu_seqlens_k_ptr, b, max_seqlen_k)
        if (first_q < len_q) & (first_k < len_k):
            in_rows, in_columns = rows < len_q, columns < len_k
            q64, k64 = (start_q + first_q).to(tl.int64), (start_k + first_k).to(tl.int64)
            q_base = q_ptr + (q64 * stride_qt + head64 * stride_qh) * STRIDE_UNIT
            g_base = grad_out_ptr + (q64 * stride_gt + head64 * stride_gh) * STRIDE_UNIT
            k_base = k_ptr + (k64 * stride_kt + head64 * stride_kh) * STRIDE_UNIT
            v_base = v_ptr + (k64 * stride_vt + head64 * stride_vh) * STRIDE_UNIT
            q = load_rows(q_base, stride_qt, in_rows, BLOCK_M, True, HEAD_DIM, BLOCK_D, STRIDE_UNIT)
            k = load_rows(k_base, stride_kt, in_columns, BLOCK_N, True, HEAD_DIM, BLOCK_D, STRIDE_UNIT)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
            scores += load_bias(bias_ptr + offset, bias_columns, rows, columns, len_q, len_k)
            lse = lse_log2(lse_ptr + head64 * tokens_q + start_q, rows, in_rows)
            mask_base = key_mask_ptr
            if key_mask_ptr is not None:
                mask_base = key_mask_ptr + start_k
            visible = visible_keys(rows, columns, len_k, len_k - len_q, mask_base, CAUSAL)
            p = tl.where(visible, tl.exp2(scores - lse[:, None]), 0.0)
            g = load_rows(g_base, stride_gt, in_rows, BLOCK_M, True, HEAD_DIM, BLOCK_D, STRIDE_UNIT)
            v = load_rows(v_base, stride_vt, in_columns, BLOCK_N, True, HEAD_DIM, BLOCK_D, STRIDE_UNIT)
            grad_p = tl.dot(g, tl.trans(v), input_precision=PRECISION)
            if DROPOUT:
                keep = keep_mask(seed, start_q + rows, first_k, tl.program_id(1), dropout_threshold, BLOCK_N)
                grad_p = tl.where(keep, grad_p * dropout_scale, 0.0)
            delta = tl.load(delta_ptr + head64 * tokens_q + start_q + rows, mask=in_rows, other=0.0)
            grad_bias += p * (grad_p - delta[:, None])
    inside = (rows < bias_rows)[:, None] & (columns < bias_columns)[None, :]
    pointers = grad_bias_ptr + offset + rows[:, None] * bias_columns + columns[None, :]
    tl.store(pointers, grad_bias.to(grad_bias_ptr.dtype.element_ty), mask=inside)
