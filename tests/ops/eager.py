"""The ops as a user would write them in plain torch, with torch's own autograd: the originals of the comparisons.

Run at the dtype at hand they say how far eager torch is from the truth; run in float64 they are the truth. Dropout
takes an explicit mask here, since the random numbers are ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from roberta_kernels.reference.philox import keep_mask


def dropped(t: Tensor, keep: Tensor | None, dropout_p: float) -> Tensor:
    """t with dropout's mask applied: the kept elements are scaled by 1 / (1 - p)."""
    return t if keep is None else torch.where(keep, t * (1.0 / (1.0 - dropout_p)), 0.0)


def row_keep(shape: tuple[int, int], dropout_p: float, seed: Tensor | None) -> Tensor | None:
    """The mask of a `[T, H]` op; None without dropout."""
    if dropout_p == 0.0:
        return None
    assert seed is not None
    rows, plane = torch.arange(shape[0], device=seed.device), torch.zeros(1, dtype=torch.int64, device=seed.device)
    return keep_mask(rows, shape[1], plane, dropout_p, seed)[0]


def visible_keys(length_q: int, length_k: int, causal: bool, key_mask: Tensor | None, device: str) -> Tensor:
    """bool `[length_q, length_k]`: which keys each query of one sequence sees. The last query sees the last key."""
    visible = torch.ones(length_q, length_k, dtype=torch.bool, device=device)
    if causal:
        i = torch.arange(length_q, device=device)[:, None]
        j = torch.arange(length_k, device=device)[None, :]
        visible = j <= i + (length_k - length_q)
    return visible if key_mask is None else visible & key_mask[None, :]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths_q: list[int],
    lengths_k: list[int],
    scale: float | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """One scaled_dot_product_attention per sequence; with dropout, the same written out."""
    heads, head_dim = q.shape[1], q.shape[2]
    pieces = []
    start_q = start_k = 0
    for length_q, length_k in zip(lengths_q, lengths_k, strict=True):
        rows_q, rows_k = slice(start_q, start_q + length_q), slice(start_k, start_k + length_k)
        start_q, start_k = rows_q.stop, rows_k.stop
        if length_q == 0:
            continue
        if length_k == 0:
            pieces.append(q[rows_q] * 0.0)
            continue
        qs, ks, vs = (t.transpose(0, 1) for t in (q[rows_q], k[rows_k], v[rows_k]))  # [heads, length, head_dim]
        mask = None
        sees_a_key = None
        if causal or key_mask is not None:
            mask = visible_keys(length_q, length_k, causal, None if key_mask is None else key_mask[rows_k], q.device)
            sees_a_key = mask.any(-1)
            mask = mask | ~sees_a_key[:, None]  # softmax over nothing is nan; such a row is set to zero below
        if bias is not None:  # hidden keys by the same summand
            added = bias[:, :length_q, :length_k]
            mask = added if mask is None else added.masked_fill(~mask, float("-inf"))
        if dropout_p == 0.0:
            added = None if mask is None else mask[None] if mask.dim() == 3 else mask[None, None]
            out = F.scaled_dot_product_attention(qs[None], ks[None], vs[None], attn_mask=added, scale=scale)[0]
        else:
            scores = (qs @ ks.transpose(1, 2)) * (head_dim**-0.5 if scale is None else scale)
            if mask is not None:
                scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
            rows = torch.arange(rows_q.start, rows_q.stop, device=q.device)
            keep = keep_mask(rows, length_k, torch.arange(heads, device=q.device), dropout_p, seed)
            out = dropped(scores.softmax(-1), keep, dropout_p) @ vs
        if sees_a_key is not None:
            out = torch.where(sees_a_key[None, :, None], out, 0.0)
        pieces.append(out.transpose(0, 1))
    return torch.cat(pieces) if pieces else q * 0.0


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None = None,
    *,
    eps: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    branch = x if x_bias is None else x + x_bias
    branch = dropped(branch, row_keep((x.shape[0], x.shape[1]), dropout_p, seed), dropout_p)
    return F.layer_norm(residual + branch, weight.shape, weight, bias, eps)


def gelu_ffn(
    x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor | None = None, *, approximate: str = "none"
) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w_in, b_in), approximate=approximate), w_out, b_out)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    labels: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    return F.cross_entropy(F.linear(x, weight, bias), labels, ignore_index=ignore_index, reduction=reduction)


def linear_log1p_max(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, lengths: list[int]) -> Tensor:
    """As sentence-transformers' SpladePooling: log1p(relu(logits)) of every row, and torch's max."""
    activations = F.linear(x, weight, bias).relu().log1p()
    nothing = activations.new_zeros(weight.shape[0])
    return torch.stack([rows.max(0)[0] if len(rows) else nothing for rows in activations.split(lengths)])


def embedding_layer_norm(
    word_embeddings: Tensor,
    position_embeddings: Tensor,
    token_type_embeddings: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    eps: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    word_padding_idx: int | None = None,
    position_padding_idx: int | None = None,
) -> Tensor:
    if token_type_ids is None:
        token_type_ids = torch.zeros_like(input_ids)
    embedded = F.embedding(input_ids, word_embeddings, padding_idx=word_padding_idx)
    embedded = embedded + F.embedding(token_type_ids, token_type_embeddings)
    embedded = embedded + F.embedding(position_ids, position_embeddings, padding_idx=position_padding_idx)
    out = F.layer_norm(embedded, weight.shape, weight, bias, eps)
    return dropped(out, row_keep((out.shape[0], out.shape[1]), dropout_p, seed), dropout_p)
