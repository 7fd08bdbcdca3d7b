"""Attention over packed sequences, one sequence at a time: softmax(scale * q @ k^T + bias) @ v.

Vaswani et al., Attention Is All You Need (2017), section 3.2.1; the backward pass as in FlashAttention (Dao et al.
2022, appendix B.2), from the log-sum-exp.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from roberta_kernels.reference.philox import keep_mask
from roberta_kernels.reference.precision import accumulator_dtype


def _sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[slice, slice]]:
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(q_ends) - 1):
        yield slice(q_ends[b], q_ends[b + 1]), slice(k_ends[b], k_ends[b + 1])


def _visible(
    rows_q: slice, rows_k: slice, causal: bool, key_mask: Tensor | None, device: torch.device
) -> Tensor | None:
    """bool, broadcastable to `[len_q, len_k]`: which keys a query sees; None: all."""
    len_q, len_k = rows_q.stop - rows_q.start, rows_k.stop - rows_k.start
    visible = None
    if causal:
        visible = torch.ones(len_q, len_k, dtype=torch.bool, device=device).tril(len_k - len_q)
    if key_mask is not None:
        seen = key_mask[rows_k][None, :]
        visible = seen if visible is None else visible & seen
    return visible


def _dropout(rows_q: slice, len_k: int, heads: int, dropout_p: float, seed: Tensor, dtype: torch.dtype) -> Tensor:
    rows = torch.arange(rows_q.start, rows_q.stop, device=seed.device)
    keep = keep_mask(rows, len_k, torch.arange(heads, device=seed.device), dropout_p, seed)
    return keep.to(dtype) * (1.0 / (1.0 - dropout_p))


def _scores(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Of one sequence, q `[heads, len_q, head_dim]` and k `[heads, len_k, head_dim]`: `[heads, len_q, len_k]`."""
    scores = scale * (q @ k.transpose(1, 2))
    return scores if bias is None else scores + bias[:, : q.shape[1], : k.shape[1]].to(scores.dtype)


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
    """(out `[Tq, heads, head_dim]`, log-sum-exp `[heads, Tq]`)."""
    acc = accumulator_dtype(q.dtype)
    heads = q.shape[1]
    outs, lses = [q.new_zeros(0, *q.shape[1:])], [q.new_zeros((heads, 0), dtype=acc)]  # pieces, in order
    for rows_q, rows_k in _sequences(cu_seqlens_q, cu_seqlens_k):
        len_k = rows_k.stop - rows_k.start
        if rows_q.start == rows_q.stop or len_k == 0:
            outs.append(torch.zeros_like(q[rows_q]))
            lses.append(lses[0].new_full((heads, rows_q.stop - rows_q.start), -math.inf))
            continue
        qs, ks, vs = (t.transpose(0, 1).to(acc) for t in (q[rows_q], k[rows_k], v[rows_k]))
        scores = _scores(qs, ks, scale, bias)
        visible = _visible(rows_q, rows_k, causal, key_mask, q.device)
        if visible is not None:
            scores = scores.masked_fill(~visible, -math.inf)
        row_lse = scores.logsumexp(-1)
        # Not exp(scores - row_lse): the rounding of a large log-sum-exp would be an error of the whole row. A row that
        # sees nothing would give nan: its probabilities are zeros.
        probabilities = scores.softmax(-1).masked_fill((row_lse == -math.inf)[..., None], 0.0)
        if dropout_p > 0:
            assert seed is not None
            probabilities = probabilities * _dropout(rows_q, len_k, heads, dropout_p, seed, acc)
        outs.append((probabilities @ vs).transpose(0, 1).to(q.dtype))
        lses.append(row_lse)
    return torch.cat(outs), torch.cat(lses, dim=1)


def attention_backward(
    grad_out: Tensor,  # [Tq, heads, head_dim]
    q: Tensor,  # [Tq, heads, head_dim]
    k: Tensor,  # [Tk, heads, head_dim]
    v: Tensor,  # [Tk, heads, head_dim]
    out: Tensor,  # [Tq, heads, head_dim]
    lse: Tensor,  # [heads, Tq]
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
    acc = accumulator_dtype(q.dtype)
    # Pieces, in order, and not places in one tensor: so torch.func.vmap can map over this.
    grads = [[t.new_zeros(0, *t.shape[1:])] for t in (q, k, v)]
    grad_bias = q.new_zeros(0, dtype=acc) if bias is None else torch.zeros_like(bias, dtype=acc)
    for rows_q, rows_k in _sequences(cu_seqlens_q, cu_seqlens_k):
        len_k = rows_k.stop - rows_k.start
        if rows_q.start == rows_q.stop or len_k == 0:
            for pieces, t in zip(grads, (q[rows_q], k[rows_k], v[rows_k]), strict=True):
                pieces.append(torch.zeros_like(t))
            continue
        qs, ks, vs, gs, os = (
            t.transpose(0, 1).to(acc) for t in (q[rows_q], k[rows_k], v[rows_k], grad_out[rows_q], out[rows_q])
        )
        scores = _scores(qs, ks, scale, bias)
        visible = _visible(rows_q, rows_k, causal, key_mask, q.device)
        if visible is not None:
            scores = scores.masked_fill(~visible, -math.inf)
        row_lse = lse[:, rows_q]
        probabilities = torch.exp(scores - row_lse.masked_fill(row_lse == -math.inf, 0.0)[..., None])
        grad_probabilities = gs @ vs.transpose(1, 2)
        dropped = probabilities
        if dropout_p > 0:
            assert seed is not None
            multiplier = _dropout(rows_q, len_k, q.shape[1], dropout_p, seed, acc)
            dropped = probabilities * multiplier
            grad_probabilities = grad_probabilities * multiplier
        delta = (gs * os).sum(-1, keepdim=True)
        grad_scores = probabilities * (grad_probabilities - delta)
        if bias is not None:
            room = bias.shape[2] - len_k, bias.shape[1] - qs.shape[1]
            grad_bias = grad_bias + F.pad(grad_scores, (0, room[0], 0, room[1]))
        values = scale * (grad_scores @ ks), scale * (grad_scores.transpose(1, 2) @ qs), dropped.transpose(1, 2) @ gs
        for pieces, value in zip(grads, values, strict=True):
            pieces.append(value.transpose(0, 1).to(q.dtype))
    return torch.cat(grads[0]), torch.cat(grads[1]), torch.cat(grads[2]), grad_bias.to(q.dtype)
