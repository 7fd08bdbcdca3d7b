"""Embeddings + LayerNorm: contract, fake functions, autograd, public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from roberta_kernels import backends
from roberta_kernels.ops import contract
from roberta_kernels.ops.contract import check_device, check_shape, check_tensor


def embedding_layer_norm(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    word_embeddings: Tensor,
    position_embeddings: Tensor,
    token_type_embeddings: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    word_padding_idx: int | None = None,
    position_padding_idx: int | None = None,
) -> Tensor:
    """dropout(layer_norm(word + token_type + position)), differentiable in the tables, weight and bias.

    Args:
        input_ids, position_ids, token_type_ids: int64 (or int32) `[T]`; token_type_ids None: all zero.
        word_embeddings, position_embeddings, token_type_embeddings: `[rows, H]` each, one dtype for all.
        weight, bias: `[H]`, LayerNorm's.
        eps: added to the (biased) variance.
        dropout_p: probability of dropping an element of the result, in [0, 1).
        seed: int64 `[1]`, for dropout_p > 0 (see draw_seeds).
        word_padding_idx, position_padding_idx: the row of that table that gets no gradient, as nn.Embedding's
        padding_idx.

    Returns:
        `[T, H]`, contiguous.

    Raises:
        IndexError: an id outside of its table (CPU; on a GPU as the original: a device-side assertion
            or an undefined row, since a check would need a synchronisation).
        TypeError, ValueError: a dtype, shape, device or value outside of the above.
    """
    contract.check_dims("input_ids", input_ids, 1, None, "tokens")
    contract.check_floating("word_embeddings", word_embeddings)
    contract.check_dims("word_embeddings", word_embeddings, 2, 1, "vocabulary, hidden")
    hidden = word_embeddings.shape[1]
    check_tensor("position_embeddings", position_embeddings, (None, hidden), word_embeddings)
    check_tensor("token_type_embeddings", token_type_embeddings, (None, hidden), word_embeddings)
    check_tensor("weight", weight, (hidden,), word_embeddings)
    check_tensor("bias", bias, (hidden,), word_embeddings)
    for name, row, table in (
        ("word_padding_idx", word_padding_idx, word_embeddings),
        ("position_padding_idx", position_padding_idx, position_embeddings),
    ):
        if row is not None and not 0 <= row < table.shape[0]:
            raise ValueError(f"{name} is {row}, and its table has {table.shape[0]} rows")
    contract.check_dropout(dropout_p, seed, word_embeddings)
    if token_type_ids is None:
        token_type_ids = torch.zeros_like(input_ids)
    kernels = backends.select(word_embeddings, "embedding_layer_norm", input_ids.shape[0])
    try:
        out, _, _ = contract.call(
            kernels.embedding_layer_norm_forward,
            _ids("input_ids", input_ids, input_ids, word_embeddings),
            _ids("position_ids", position_ids, input_ids, word_embeddings),
            _ids("token_type_ids", token_type_ids, input_ids, word_embeddings),
            word_embeddings.contiguous(),
            position_embeddings.contiguous(),
            token_type_embeddings.contiguous(),
            weight.contiguous(),
            bias.contiguous(),
            float(eps),
            -1 if word_padding_idx is None else word_padding_idx,
            -1 if position_padding_idx is None else position_padding_idx,
            dropout_p,
            seed if dropout_p > 0 else None,
        )
    except RuntimeError as error:
        # Compiled kernels can raise one type of error only; the original raises this one.
        _, found, message = str(error).partition("index out of range")
        if found:
            raise IndexError(found + message.splitlines()[0]) from None
        raise
    return out


def _ids(name: str, ids: Tensor, input_ids: Tensor, table: Tensor) -> Tensor:
    check_shape(name, ids, (input_ids.shape[0],))
    check_device(name, ids, table)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {ids.dtype}")
    return ids.to(torch.int64).contiguous()


def _fake_forward(
    input_ids,
    position_ids,
    token_type_ids,
    word_embeddings,
    position_embeddings,
    token_type_embeddings,
    weight,
    bias,
    eps,
    word_padding_idx,
    position_padding_idx,
    dropout_p,
    seed,
):
    tokens = input_ids.shape[0]
    statistics = torch.float64 if word_embeddings.dtype == torch.float64 else torch.float32
    return (
        word_embeddings.new_empty((tokens, word_embeddings.shape[1])),
        word_embeddings.new_empty((tokens,), dtype=statistics),
        word_embeddings.new_empty((tokens,), dtype=statistics),
    )


def _fake_backward(
    grad_out,
    input_ids,
    position_ids,
    token_type_ids,
    word_embeddings,
    position_embeddings,
    token_type_embeddings,
    weight,
    *rest,
):
    return (
        word_embeddings.new_empty(word_embeddings.shape),
        position_embeddings.new_empty(position_embeddings.shape),
        token_type_embeddings.new_empty(token_type_embeddings.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, _, eps, word_padding_idx, position_padding_idx, dropout_p, seed = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(*tensors, mean, rstd, seed)  # ids, tables and weight; bias and eps play no part in backward
    ctx.eps, ctx.rest = eps, (word_padding_idx, position_padding_idx, dropout_p)


def _again(kernels: Any, ctx: Any, saved: tuple[Any, ...]) -> tuple[Any, ...]:
    *tensors, _, _, seed = saved
    bias = torch.zeros_like(tensors[-1])  # no gradient depends on it
    _, mean, rstd = kernels.embedding_layer_norm_forward(*tensors, bias, ctx.eps, *ctx.rest, seed)
    return *tensors, mean, rstd, seed


def _backward(kernels: backends.Kernels, ctx: Any, saved: tuple[Any, ...], grad_out: Tensor, *_: Any) -> Any:
    *tensors, seed = saved
    grads = kernels.embedding_layer_norm_backward(grad_out.contiguous(), *tensors, *ctx.rest, seed)
    return (None, None, None, *grads, None, None, None, None, None)


contract.register(
    "embedding_layer_norm",
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    again=_again,
)
