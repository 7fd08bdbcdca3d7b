"""The feed-forward block: contract, fake functions, autograd, public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from roberta_kernels import backends
from roberta_kernels.ops import contract, matmul_precision
from roberta_kernels.ops.contract import check_tensor


def gelu_ffn(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    b_out: Tensor | None = None,
    *,
    approximate: str = "none",
) -> Tensor:
    """gelu(x @ w_in^T + b_in) @ w_out^T + b_out, differentiable in every tensor.

    Args:
        x: `[T, H]`, one dtype for all.
        w_in, b_in: `[F, H]`, `[F]`, as nn.Linear keeps them.
        w_out, b_out: `[O, F]`, `[O]`; b_out may be left to what follows (add_layer_norm's x_bias).
        approximate: "none" for the exact GELU, x * Phi(x) through erf, or "tanh" (Hendrycks and Gimpel 2016, section
        2).

    float32 on a CPU follows torch.set_float32_matmul_precision where kernels can (ops/matmul_precision.py).

    Returns:
        `[T, O]`. Kept for backward: x and the pre-activation `[T, F]`.

    Raises:
        TypeError, ValueError: a dtype, shape, device or value outside of the above.
    """
    contract.check_dims("x", x, 2, 1, "tokens, hidden")
    if approximate not in ("none", "tanh"):
        raise ValueError(f'approximate must be "none" or "tanh", got {approximate!r}')
    contract.check_floating("x", x)
    contract.check_dims("w_in", w_in, 2, 0, "inner, hidden")
    inner = w_in.shape[0]
    check_tensor("w_in", w_in, (inner, x.shape[1]), x)
    check_tensor("b_in", b_in, (inner,), x)
    check_tensor("w_out", w_out, (None, inner), x)
    if b_out is not None:
        check_tensor("b_out", b_out, (w_out.shape[0],), x)
    kernels = backends.select(x, "gelu_ffn", x.shape[0])
    # Kept only where a backward pass can follow.
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w_in, b_in, w_out, b_out))
    out, _ = matmul_precision.call(
        contract.call,
        kernels.gelu_ffn_forward,
        x.contiguous(),
        w_in.contiguous(),
        b_in.contiguous(),
        w_out.contiguous(),
        b_out if b_out is None else b_out.contiguous(),
        approximate == "tanh",
        save,
    )
    return out


def _fake_forward(x, w_in, b_in, w_out, b_out, tanh, save_preactivation):
    return (
        x.new_empty((x.shape[0], w_out.shape[0])),
        x.new_empty((x.shape[0], w_in.shape[0]) if save_preactivation else (0,)),
    )


def _fake_backward(grad_out, x, w_in, w_out, preactivation, tanh):
    return (
        x.new_empty(x.shape),
        w_in.new_empty(w_in.shape),
        w_in.new_empty((w_in.shape[0],)),
        w_out.new_empty(w_out.shape),
        w_out.new_empty((w_out.shape[0],)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w_in, b_in, w_out, b_out, tanh, save_preactivation = inputs
    _, preactivation = output
    ctx.mark_non_differentiable(preactivation)
    ctx.tanh, ctx.has_b_out, ctx.saved_preactivation = tanh, b_out is not None, save_preactivation
    ctx.save_for_backward(x, w_in, b_in, w_out, preactivation)  # b_in for `again` alone


def _again(kernels: Any, ctx: Any, saved: tuple[Any, ...]) -> tuple[Any, ...]:
    x, w_in, b_in, w_out, _ = saved
    _, preactivation = kernels.gelu_ffn_forward(x, w_in, b_in, w_out, None, ctx.tanh, True)
    return x, w_in, b_in, w_out, preactivation


def _backward(kernels: backends.Kernels, ctx: Any, saved: tuple[Any, ...], grad_out: Tensor, *_: Any) -> Any:
    if not ctx.saved_preactivation:
        raise RuntimeError("gelu_ffn_forward ran with save_preactivation=False, and cannot run backward")
    x, w_in, _, w_out, preactivation = saved
    grad_x, grad_w_in, grad_b_in, grad_w_out, grad_b_out = kernels.gelu_ffn_backward(
        grad_out.contiguous(), x, w_in, w_out, preactivation, ctx.tanh
    )
    return grad_x, grad_w_in, grad_b_in, grad_w_out, grad_b_out if ctx.has_b_out else None, None, None


contract.register(
    "gelu_ffn",
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    again=_again,
)
