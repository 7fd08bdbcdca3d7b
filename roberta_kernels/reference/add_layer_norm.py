"""layer_norm(residual + dropout(x + x_bias)): the end of both halves of a post-norm Transformer layer."""

from __future__ import annotations

import torch
from torch import Tensor

from roberta_kernels.reference.layer_norm import layer_norm_gradients, normalise
from roberta_kernels.reference.philox import dropout_multiplier
from roberta_kernels.reference.precision import accumulator_dtype


def _sum(
    x: Tensor, residual: Tensor, x_bias: Tensor | None, dropout_p: float, seed: Tensor | None, acc: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """(what is normalised `[T, H]`, the dropout multiplier `[T, H]` or None)."""
    branch = x.to(acc)
    if x_bias is not None:
        branch = branch + x_bias.to(acc)
    multiplier = None
    if dropout_p > 0:
        assert seed is not None
        multiplier = dropout_multiplier((x.shape[0], x.shape[1]), dropout_p, seed, acc)
        branch = branch * multiplier
    return residual.to(acc) + branch, multiplier


def add_layer_norm_forward(
    x: Tensor,  # [T, H]
    residual: Tensor,  # [T, H]
    weight: Tensor,  # [H]
    bias: Tensor,  # [H]
    eps: float,
    x_bias: Tensor | None,  # [H]
    dropout_p: float,
    seed: Tensor | None,  # [1] int64
) -> tuple[Tensor, Tensor, Tensor]:
    """(out `[T, H]`, mean `[T]`, rstd `[T]`)."""
    acc = accumulator_dtype(x.dtype)
    z, _ = _sum(x, residual, x_bias, dropout_p, seed, acc)
    normalised, mean, rstd = normalise(z, eps)
    return (normalised * weight.to(acc) + bias.to(acc)).to(x.dtype), mean, rstd


def add_layer_norm_backward(
    grad_out: Tensor,  # [T, H]
    x: Tensor,  # [T, H]
    residual: Tensor,  # [T, H]
    weight: Tensor,  # [H]
    x_bias: Tensor | None,  # [H]
    mean: Tensor,  # [T]
    rstd: Tensor,  # [T]
    dropout_p: float,
    seed: Tensor | None,  # [1] int64
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (empty where equal to residual's: no dropout), residual, weight, bias, x_bias (empty if none)."""
    acc = accumulator_dtype(x.dtype)
    z, multiplier = _sum(x, residual, x_bias, dropout_p, seed, acc)
    grad_z, grad_weight, grad_bias = layer_norm_gradients(grad_out.to(acc), z, mean, rstd, weight.to(acc))
    grad_branch = grad_z if multiplier is None else grad_z * multiplier
    empty = x.new_empty(0)
    return (
        empty if multiplier is None else grad_branch.to(x.dtype),
        grad_z.to(x.dtype),
        grad_weight.to(weight.dtype),
        grad_bias.to(weight.dtype),
        x.new_empty(0) if x_bias is None else grad_branch.sum(0).to(x_bias.dtype),
    )
