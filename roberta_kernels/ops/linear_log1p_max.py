"""The product with the vocabulary, log1p(relu) and the maximum of each sequence: contract, fake functions, autograd,
public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from roberta_kernels import backends
from roberta_kernels.ops import contract, matmul_precision
from roberta_kernels.ops.attention import check_cu_seqlens
from roberta_kernels.ops.contract import check_tensor


def linear_log1p_max(x: Tensor, weight: Tensor, cu_seqlens: Tensor, bias: Tensor | None = None) -> Tensor:
    """Of each sequence and word the largest log1p(relu(x @ weight^T + bias)), without the logits `[T, V]`:
    differentiable in x, weight and bias. SPLADE's head (Formal et al. 2021, "SPLADE v2", equation 6).

    Args:
        x: `[T, H]`, rows of one sequence after another, one dtype for all.
        weight, bias: `[V, H]`, `[V]`, as nn.Linear keeps them.
        cu_seqlens: int32 `[B + 1]`: where each sequence begins, and the last ends. Rows behind that belong to none.

    A sequence without rows gives zeros. As torch's max: a gradient goes to the first of equal logits, and a NaN is the
    largest. What has no gradient (relu's zeros) passes none on, whatever it would be multiplied with.
    float32 on a CPU follows torch.set_float32_matmul_precision where kernels can (ops/matmul_precision.py).

    Returns:
        `[B, V]`, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: a dtype, shape, device or value outside of the above. The contents of cu_seqlens are
            checked when they are on the CPU.
        backends.BackendError: the backend asked for does not support the call ("cuda" has no such kernels).
    """
    contract.check_dims("x", x, 2, 1, "tokens, hidden")
    contract.check_floating("x", x)
    contract.check_dims("weight", weight, 2, 0, "words, hidden")
    check_tensor("weight", weight, (None, x.shape[1]), x)
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],), x)
    check_cu_seqlens("cu_seqlens", cu_seqlens, x, None)
    kernels = backends.select(x, "linear_log1p_max", x.shape[0])
    out, _ = matmul_precision.call(
        contract.call,
        kernels.linear_log1p_max_forward,
        x.contiguous(),
        weight.contiguous(),
        bias if bias is None else bias.contiguous(),
        cu_seqlens.contiguous(),
    )
    return out


def _fake_forward(x, weight, bias, cu_seqlens):
    shape = (cu_seqlens.shape[0] - 1, weight.shape[0])
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=torch.int32)


def _fake_backward(grad_out, x, weight, bias, out, rows, weight_gradient):
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape if weight_gradient else (0,)),
        x.new_empty((0,)) if bias is None else bias.new_empty(bias.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, cu_seqlens = inputs
    out, rows = output
    ctx.mark_non_differentiable(rows)
    ctx.save_for_backward(x, weight, bias, cu_seqlens, out, rows)


def _again(kernels: Any, ctx: Any, saved: tuple[Any, ...]) -> tuple[Any, ...]:
    inputs = saved[:4]
    return *inputs, *kernels.linear_log1p_max_forward(*inputs)


def _backward(kernels: backends.Kernels, ctx: Any, saved: tuple[Any, ...], grad_out: Tensor, *_: Any) -> Any:
    x, weight, bias, _, out, rows = saved
    wanted = bool(ctx.needs_input_grad[1])
    grad_x, grad_weight, grad_bias = kernels.linear_log1p_max_backward(
        grad_out.contiguous(), x, weight, bias, out, rows, wanted
    )
    return grad_x, grad_weight if wanted else None, None if bias is None else grad_bias, None


contract.register(
    "linear_log1p_max",
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    again=_again,
)
