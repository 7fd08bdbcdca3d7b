"""gelu(x @ w_in^T + b_in) @ w_out^T + b_out: the feed-forward half of a Transformer layer.

GELU is x * Phi(x), Phi the normal distribution function, exactly, through erf (Hendrycks and Gimpel 2016, section 2),
or by its tanh approximation (same place).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import gelu

from roberta_kernels.reference.precision import accumulator_dtype


def gelu_derivative(x: Tensor, tanh: bool) -> Tensor:
    """d gelu(x) / dx, elementwise."""
    if tanh:
        factor = math.sqrt(2.0 / math.pi)
        t = torch.tanh(factor * (x + 0.044715 * x**3))
        return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * factor * (1.0 + 3 * 0.044715 * x * x)
    density = torch.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
    return 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))) + x * density


def gelu_ffn_forward(
    x: Tensor,  # [T, H]
    w_in: Tensor,  # [F, H]
    b_in: Tensor,  # [F]
    w_out: Tensor,  # [O, F]
    b_out: Tensor | None,  # [O]
    tanh: bool,
    save_preactivation: bool,
) -> tuple[Tensor, Tensor]:
    """(out `[T, O]`, pre-activation `[T, F]`, or empty when it is not asked for)."""
    acc = accumulator_dtype(x.dtype)
    preactivation = x.to(acc) @ w_in.to(acc).t() + b_in.to(acc)
    activation = gelu(preactivation, approximate="tanh" if tanh else "none")
    out = activation @ w_out.to(acc).t()
    if b_out is not None:
        out = out + b_out.to(acc)
    return out.to(x.dtype), preactivation.to(x.dtype) if save_preactivation else x.new_empty(0)


def gelu_ffn_backward(
    grad_out: Tensor,  # [T, O]
    x: Tensor,  # [T, H]
    w_in: Tensor,  # [F, H]
    w_out: Tensor,  # [O, F]
    preactivation: Tensor,  # [T, F]
    tanh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w_in, b_in, w_out and b_out."""
    dtype, acc = x.dtype, accumulator_dtype(x.dtype)
    grad, pre = grad_out.to(acc), preactivation.to(acc)
    activation = gelu(pre, approximate="tanh" if tanh else "none")
    grad_pre = (grad @ w_out.to(acc)) * gelu_derivative(pre, tanh)
    return (
        (grad_pre @ w_in.to(acc)).to(dtype),
        (grad_pre.t() @ x.to(acc)).to(dtype),
        grad_pre.sum(0).to(dtype),
        (grad.t() @ activation).to(dtype),
        grad.sum(0).to(dtype),
    )
