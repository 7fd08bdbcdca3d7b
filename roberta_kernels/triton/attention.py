"""Attention over packed sequences: softmax(scale * q @ k^T + bias) @ v, no `[S, S]` matrix in memory.

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
time). A small kernel first writes delta = rowsum(grad_out * out). The gradient of a bias on the scores has a third: a
program owns a tile of one head's bias and walks the sequences, in their order (2 products more).

Programs are laid out flat: tile fastest, then head, then sequence; those past the end of their sequence leave at
once. Lengths and counts are plain arguments that no compilation is keyed on. Strides are passed in units of 8
elements where they allow it, which tells the compiler that rows are 16-byte aligned whatever the projection they
are views of.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from roberta_kernels.triton import device as device_facts
from roberta_kernels.triton.attention_backward import (
    attention_delta_kernel,
    attention_grad_kv_kernel,
    attention_grad_q_kernel,
)
from roberta_kernels.triton.attention_forward import attention_forward_kernel
from roberta_kernels.triton.attention_grad_bias import attention_grad_bias_kernel
from roberta_kernels.triton.philox import keep_scale, threshold

_DELTA_ROWS = 32

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
        return (32, 64, 8, 2) if dropout else (64, 64, 8, 2)
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


class Biased:
    """Tiles of the same kernels with a bias on the scores, and of the one for its gradient. An element of the bias
    takes an address of its own, so tiles are small.
    """

    def __init__(self, block_d: int, dtype: torch.dtype, asynchronous: bool) -> None:
        if dtype == torch.float32:
            self.forward: _Config = (32, 16, 8, 2)
            self.grad_kv: _Config = grad_kv_config(block_d, dtype, False, False, False)
            self.grad_q: _Config = (32, 16, 4, 1) if block_d > 64 else (16, 16, 4, 1)
            self.grad_bias: _Config = (32, 32, 8, 1) if block_d > 64 else (32, 32, 4, 1)
        else:
            self.forward = self.grad_q = (64, 32, 8, 2)
            self.grad_kv = (32, 64 if asynchronous else 32, 8, 2)
            self.grad_bias = (64 if asynchronous else 32, 32, 8, 1)


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


def _bias_sizes(bias: Tensor | None) -> tuple[int, int]:
    return (0, 0) if bias is None else (bias.shape[1], bias.shape[2])


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
    bias: Tensor | None = None,  # [heads, max_seqlen_q or more, max_seqlen_k or more]
) -> tuple[Tensor, Tensor]:
    """(out `[Tq, heads, head_dim]`, log-sum-exp `[heads, Tq]` float32). Without unit stride in head_dim: a copy."""
    tokens_q, heads, head_dim = q.shape
    q, k, v = _rows(q, k, v)
    cu_seqlens_q, cu_seqlens_k, key_mask = _vectors(cu_seqlens_q, cu_seqlens_k, key_mask)
    out = torch.empty((tokens_q, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, tokens_q), dtype=torch.float32, device=q.device)
    sequences = cu_seqlens_q.shape[0] - 1
    if tokens_q == 0 or sequences == 0:
        return out, lse
    block_d = max(16, triton.next_power_of_2(head_dim))
    asynchronous = device_facts.has_asynchronous_products(q.device)
    bias = None if bias is None else bias.contiguous()
    config = forward_config(block_d, q.dtype, asynchronous, max_seqlen_q <= _SHORT, dropout_p > 0)
    block_m, block_n, warps, stages = config if bias is None else Biased(block_d, q.dtype, asynchronous).forward
    tiles = triton.cdiv(max(max_seqlen_q, 1), block_m)
    unit = _stride_unit(q, k, v)
    with device_facts.on_device(q):
        attention_forward_kernel[(tiles * heads * sequences,)](
            q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, key_mask, bias, seed if dropout_p > 0 else None,
            *_strides(unit, q, k, v), heads, tokens_q, max_seqlen_q, max_seqlen_k, tiles, *_bias_sizes(bias), scale,
            threshold(dropout_p), keep_scale(dropout_p), CAUSAL=causal, HEAD_DIM=head_dim, BLOCK_D=block_d,
            BLOCK_M=block_m, BLOCK_N=block_n, STRIDE_UNIT=unit, PRECISION=device_facts.dot_precision(q.dtype),
            num_warps=warps, num_stages=stages,
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
    bias: Tensor | None = None,  # [heads, max_seqlen_q or more, max_seqlen_k or more]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and bias, each contiguous; of no bias an empty `[0]`."""
    tokens_q, heads, head_dim = q.shape
    sequences = cu_seqlens_q.shape[0] - 1
    grad_q, grad_k, grad_v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if bias is not None:
        bias = bias.contiguous()
    grad_bias = q.new_empty(0) if bias is None else torch.empty_like(bias)
    if tokens_q == 0:
        return grad_q, grad_k.zero_(), grad_v.zero_(), grad_bias.zero_()
    grad_out, q, k, v = _rows(grad_out, q, k, v)
    cu_seqlens_q, cu_seqlens_k, key_mask = _vectors(cu_seqlens_q, cu_seqlens_k, key_mask)
    out, lse = out.contiguous(), lse.contiguous()
    block_d = max(16, triton.next_power_of_2(head_dim))
    asynchronous = device_facts.has_asynchronous_products(q.device)
    unit = _stride_unit(grad_out, q, k, v)
    strides = _strides(unit, grad_out, q, k, v)
    delta = torch.empty_like(lse)
    biased = None if bias is None else Biased(block_d, q.dtype, asynchronous)
    if dropout_p == 0:
        seed = None
    shared = (*_bias_sizes(bias), scale, threshold(dropout_p), keep_scale(dropout_p))
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
        if k.shape[0] > 0:
            config = grad_kv_config(block_d, q.dtype, asynchronous, max_seqlen_k <= _SHORT, dropout_p > 0)
            block_m, block_n, warps, stages = config if biased is None else biased.grad_kv
            tiles = triton.cdiv(max(max_seqlen_k, 1), block_n)
            attention_grad_kv_kernel[(tiles * heads * sequences,)](
                grad_out, q, k, v, lse, delta, grad_k, grad_v, cu_seqlens_q, cu_seqlens_k, key_mask, bias, seed,
                *strides, heads, tokens_q, k.shape[0], max_seqlen_q, max_seqlen_k, tiles, *shared, BLOCK_M=block_m,
                BLOCK_N=block_n, **constants, num_warps=warps, num_stages=stages,
            )  # fmt: skip
        config = grad_q_config(block_d, q.dtype, asynchronous, max_seqlen_q <= _SHORT)
        block_m, block_n, warps, stages = config if biased is None else biased.grad_q
        tiles = triton.cdiv(max(max_seqlen_q, 1), block_m)
        attention_grad_q_kernel[(tiles * heads * sequences,)](
            grad_out, q, k, v, lse, delta, grad_q, cu_seqlens_q, cu_seqlens_k, key_mask, bias, seed, *strides,
            heads, tokens_q, max_seqlen_q, max_seqlen_k, tiles, *shared, BLOCK_M=block_m, BLOCK_N=block_n,
            **constants, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if biased is not None and bias is not None and bias.numel() > 0:
            block_m, block_n, warps, stages = biased.grad_bias
            tiles = triton.cdiv(bias.shape[2], block_n)
            attention_grad_bias_kernel[(triton.cdiv(bias.shape[1], block_m) * tiles, heads)](
                grad_out, q, k, v, lse, delta, bias, grad_bias, cu_seqlens_q, cu_seqlens_k, key_mask, seed, *strides,
                tokens_q, max_seqlen_q, max_seqlen_k, tiles, *shared[:2], sequences, *shared[2:], BLOCK_M=block_m,
                BLOCK_N=block_n, **constants, num_warps=warps, num_stages=stages,
            )  # fmt: skip
    return grad_q, grad_k, grad_v, grad_bias
