"""Bias + dropout + residual + LayerNorm: contract, fake functions, autograd, public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from roberta_kernels import backends
from roberta_kernels.ops import contract
from roberta_kernels.ops.contract import check_tensor


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """layer_norm(residual + dropout(x + x_bias)) over the last dimension (Ba et al. 2016), differentiable in every
    tensor.

    Args:
        x, residual: `[T, H]`, one dtype for all.
        weight, bias: `[H]`, LayerNorm's.
        eps: added to the (biased) variance.
        x_bias: `[H]`, added to x before dropout: the bias of the product that made x.
        dropout_p: probability of dropping an element of x + x_bias, in [0, 1).
        seed: int64 `[1]`, for dropout_p > 0 (see draw_seeds).

    Returns:
        `[T, H]`, contiguous. Mean and variance are taken in float32.

    Raises:
        TypeError, ValueError: a dtype, shape, device or value outside of the above.
    """
    contract.check_dims("x", x, 2, 1, "tokens, hidden")
    contract.check_floating("x", x)
    hidden = x.shape[1]
    check_tensor("residual", residual, (x.shape[0], hidden), x)
    check_tensor("weight", weight, (hidden,), x)
    check_tensor("bias", bias, (hidden,), x)
    if x_bias is not None:
        check_tensor("x_bias", x_bias, (hidden,), x)
    contract.check_dropout(dropout_p, seed, x)
    kernels = backends.select(x, "add_layer_norm", x.shape[0])
    out, _, _ = contract.call(
        kernels.add_layer_norm_forward,
        x.contiguous(),
        residual.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        float(eps),
        x_bias if x_bias is None else x_bias.contiguous(),
        dropout_p,
        seed if dropout_p > 0 else None,
    )
    return out


def _statistics(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0],), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _fake_forward(x, residual, weight, bias, eps, x_bias, dropout_p, seed):
    return x.new_empty(x.shape), _statistics(x), _statistics(x)


def _fake_backward(grad_out, x, residual, weight, x_bias, mean, rstd, dropout_p, seed):
    return (
        x.new_empty(x.shape if dropout_p > 0 else (0,)),
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape),
        x.new_empty((0,)) if x_bias is None else x_bias.new_empty(x_bias.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, _, eps, x_bias, dropout_p, seed = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, residual, weight, x_bias, mean, rstd, seed)
    ctx.eps, ctx.dropout_p = eps, dropout_p


def _again(kernels: Any, ctx: Any, saved: tuple[Any, ...]) -> tuple[Any, ...]:
    x, residual, weight, x_bias, _, _, seed = saved
    bias = torch.zeros_like(weight)  # no gradient depends on it
    _, mean, rstd = kernels.add_layer_norm_forward(x, residual, weight, bias, ctx.eps, x_bias, ctx.dropout_p, seed)
    return x, residual, weight, x_bias, mean, rstd, seed


def _backward(kernels: backends.Kernels, ctx: Any, saved: tuple[Any, ...], grad_out: Tensor, *_: Any) -> Any:
    x, residual, weight, x_bias, mean, rstd, seed = saved
    grad_x, grad_residual, grad_weight, grad_bias, grad_x_bias = kernels.add_layer_norm_backward(
        grad_out.contiguous(), x, residual, weight, x_bias, mean, rstd, ctx.dropout_p, seed
    )
    return (
        grad_x if ctx.dropout_p > 0 else grad_residual,
        grad_residual,
        grad_weight,
        grad_bias,
        None,
        None if x_bias is None else grad_x_bias,
        None,
        None,
    )


contract.register(
    "add_layer_norm",
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    again=_again,
)
