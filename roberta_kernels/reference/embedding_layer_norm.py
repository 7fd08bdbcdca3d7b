"""dropout(layer_norm(word[input_ids] + token_type[token_type_ids] + position[position_ids])): RoBERTa's first layer."""

from __future__ import annotations

import torch
from torch import Tensor

from roberta_kernels.reference.layer_norm import layer_norm_gradients, normalise
from roberta_kernels.reference.philox import dropout_multiplier
from roberta_kernels.reference.precision import accumulator_dtype


def _check_ids(name: str, ids: Tensor, table: Tensor) -> None:
    # On an accelerator torch's own indexing asserts on the device; a check here would cost a synchronisation.
    if ids.device.type == "cpu" and ids.numel() > 0:
        low, high = (int(bound) for bound in torch.aminmax(ids))
        if low < 0 or high >= table.shape[0]:
            bad = low if low < 0 else high
            raise IndexError(f"index out of range in self: {name} holds {bad}, and its table has {table.shape[0]} rows")


def _gather(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    word_padding_idx: int,
    position_padding_idx: int,
) -> Tensor:
    """The sum `[T, H]`. Where autograd follows, padding rows get no gradient of it."""
    _check_ids("input_ids", input_ids, word)
    _check_ids("position_ids", position_ids, position)
    _check_ids("token_type_ids", token_type_ids, token_type)
    acc = accumulator_dtype(word.dtype)
    words, positions = (
        torch.embedding(table, ids, padding_idx).to(acc)
        for table, ids, padding_idx in (
            (word, input_ids, word_padding_idx),
            (position, position_ids, position_padding_idx),
        )
    )
    return words + torch.embedding(token_type, token_type_ids).to(acc) + positions


def embedding_layer_norm_forward(
    input_ids: Tensor,  # [T] int64
    position_ids: Tensor,  # [T] int64
    token_type_ids: Tensor,  # [T] int64
    word_embeddings: Tensor,  # [vocabulary, H]
    position_embeddings: Tensor,  # [positions, H]
    token_type_embeddings: Tensor,  # [types, H]
    weight: Tensor,  # [H]
    bias: Tensor,  # [H]
    eps: float,
    word_padding_idx: int,
    position_padding_idx: int,
    dropout_p: float,
    seed: Tensor | None,  # [1] int64
) -> tuple[Tensor, Tensor, Tensor]:
    """(out `[T, H]`, mean `[T]`, rstd `[T]`)."""
    tables = word_embeddings, position_embeddings, token_type_embeddings
    z = _gather(input_ids, position_ids, token_type_ids, *tables, word_padding_idx, position_padding_idx)
    normalised, mean, rstd = normalise(z, eps)
    out = normalised * weight.to(z.dtype) + bias.to(z.dtype)
    if dropout_p > 0:
        assert seed is not None
        out = out * dropout_multiplier((out.shape[0], out.shape[1]), dropout_p, seed, z.dtype)
    return out.to(word_embeddings.dtype), mean, rstd


def embedding_layer_norm_backward(
    grad_out: Tensor,  # [T, H]
    input_ids: Tensor,  # [T] int64
    position_ids: Tensor,  # [T] int64
    token_type_ids: Tensor,  # [T] int64
    word_embeddings: Tensor,  # [vocabulary, H]
    position_embeddings: Tensor,  # [positions, H]
    token_type_embeddings: Tensor,  # [types, H]
    weight: Tensor,  # [H]
    mean: Tensor,  # [T]
    rstd: Tensor,  # [T]
    word_padding_idx: int,
    position_padding_idx: int,
    dropout_p: float,
    seed: Tensor | None,  # [1] int64
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the word, position and token-type tables, weight and bias. Padding rows get none (index -1: no
    such row).
    """
    tables = word_embeddings, position_embeddings, token_type_embeddings
    z = _gather(input_ids, position_ids, token_type_ids, *tables, word_padding_idx, position_padding_idx)
    acc = z.dtype
    grad = grad_out.to(acc)
    if dropout_p > 0:
        assert seed is not None
        grad = grad * dropout_multiplier((grad.shape[0], grad.shape[1]), dropout_p, seed, acc)
    grad_z, grad_weight, grad_bias = layer_norm_gradients(grad, z, mean, rstd, weight.to(acc))

    def scatter(ids: Tensor, table: Tensor, padding_idx: int) -> Tensor:
        gradient = torch.zeros(table.shape, dtype=acc, device=table.device).index_add(0, ids, grad_z)
        if padding_idx >= 0:
            gradient[padding_idx] = 0
        return gradient.to(table.dtype)

    return (
        scatter(input_ids, word_embeddings, word_padding_idx),
        scatter(position_ids, position_embeddings, position_padding_idx),
        scatter(token_type_ids, token_type_embeddings, -1),
        grad_weight.to(weight.dtype),
        grad_bias.to(weight.dtype),
    )
