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


def _sequences(ends: Tensor, max_seqlen: int, tokens: int) -> Iterator[tuple[slice, slice]]:
    """Of each sequence, its rows, and the rows after it that belong to none: a sequence has no more than max_seqlen,
    and the last one may end before the tensor does.
    """
    places = ends.tolist()
    for b in range(len(places) - 1):
        end = min(places[b + 1], places[b] + max_seqlen)
        yield slice(places[b], end), slice(end, places[b + 1] if b + 2 < len(places) else tokens)


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
    sequences_q = _sequences(cu_seqlens_q, max_seqlen_q, q.shape[0])
    sequences_k = _sequences(cu_seqlens_k, max_seqlen_k, k.shape[0])
    for (rows_q, rest_q), (rows_k, _) in zip(sequences_q, sequences_k, strict=True):
        len_k = rows_k.stop - rows_k.start
        if rows_q.start == rows_q.stop or len_k == 0:
            rest_q = slice(rows_q.start, rest_q.stop)
            outs.append(torch.zeros_like(q[rest_q]))
            lses.append(lses[0].new_full((heads, rest_q.stop - rest_q.start), -math.inf))
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
        outs += [(probabilities @ vs).transpose(0, 1).to(q.dtype), torch.zeros_like(q[rest_q])]
        lses += [row_lse, lses[0].new_full((heads, rest_q.stop - rest_q.start), -math.inf)]
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
    sequences_q = _sequences(cu_seqlens_q, max_seqlen_q, q.shape[0])
    sequences_k = _sequences(cu_seqlens_k, max_seqlen_k, k.shape[0])
    for (rows_q, rest_q), (rows_k, rest_k) in zip(sequences_q, sequences_k, strict=True):
        len_k = rows_k.stop - rows_k.start
        if rows_q.start == rows_q.stop or len_k == 0:
            rest_q, rest_k = slice(rows_q.start, rest_q.stop), slice(rows_k.start, rest_k.stop)
            for pieces, t in zip(grads, (q[rest_q], k[rest_k], v[rest_k]), strict=True):
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
        rests = q[rest_q], k[rest_k], v[rest_k]
        for pieces, value, rest in zip(grads, values, rests, strict=True):
            pieces += [value.transpose(0, 1).to(q.dtype), torch.zeros_like(rest)]
    return torch.cat(grads[0]), torch.cat(grads[1]), torch.cat(grads[2]), grad_bias.to(q.dtype)
