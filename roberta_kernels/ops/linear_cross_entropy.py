"""The product with the vocabulary and its cross-entropy: contract, fake functions, autograd, public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from roberta_kernels import backends
from roberta_kernels.ops import contract
from roberta_kernels.ops.contract import check_device, check_shape, check_tensor

_REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """torch's cross_entropy(x @ weight^T + bias, labels), without the logits `[T, V]`; differentiable in x, weight and
    bias. Forward and backward make the logits of some of the vocabulary at a time, and only of rows with a label.

    Args:
        x: `[T, H]`, one dtype for all.
        weight, bias: `[V, H]`, `[V]`, as nn.Linear keeps them.
        labels: int64 `[T]`: the right row of weight, or ignore_index.
        ignore_index: the label of rows that count for nothing.
        reduction: "mean" over the rows with a label (nan where there is none), "sum", or "none".

    Where labels can be looked at (not in a traced graph) this looks at them: one synchronisation on a GPU.

    Returns:
        float32 (float64 for float64): one number, or `[T]` for "none", with zeros at ignored rows.

    Raises:
        TypeError, ValueError: a dtype, shape, device or value outside of the above.
        IndexError: a label outside of the vocabulary, on a CPU. On a GPU the loss is then nan.
        backends.BackendError: the backend asked for does not support the call ("cuda" has no such kernels).
    """
    contract.check_dims("x", x, 2, 1, "tokens, hidden")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
    contract.check_floating("x", x)
    contract.check_dims("weight", weight, 2, 0, "words, hidden")
    check_tensor("weight", weight, (None, x.shape[1]), x)
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],), x)
    check_shape("labels", labels, (x.shape[0],))
    check_device("labels", labels, x)
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")

    tokens, rows = x.shape[0], None
    count: Any
    if contract.readable(labels):
        rows = labelled_rows(labels, ignore_index)
        if rows is not None:
            x, labels = x.index_select(0, rows), labels.index_select(0, rows)
        count = labels.shape[0]
        _check_labels(labels, weight.shape[0])
    else:
        count = (labels != ignore_index).sum()
    kernels = backends.select(x, "linear_cross_entropy", x.shape[0])
    loss, _ = contract.call(
        kernels.linear_cross_entropy_forward,
        x.contiguous(),
        weight.contiguous(),
        bias if bias is None else bias.contiguous(),
        labels.contiguous(),
        ignore_index,
    )
    if reduction == "none":
        return loss if rows is None else loss.new_zeros(tokens).index_copy(0, rows, loss)
    return loss.sum() / count if reduction == "mean" else loss.sum()


def labelled_rows(labels: Tensor, ignore_index: int = -100) -> Tensor | None:
    """Which of labels `[T]` are not ignored, ascending; None: all."""
    rows = (labels != ignore_index).nonzero().squeeze(1)
    return None if rows.shape[0] == labels.shape[0] else rows


def _check_labels(labels: Tensor, words: int) -> None:
    if labels.device.type == "cpu" and labels.numel() > 0:
        low, high = (int(bound) for bound in torch.aminmax(labels))
        if low < 0 or high >= words:
            raise IndexError(f"Target {low if low < 0 else high} is out of bounds.")  # torch's own words


def _fake_forward(x, weight, bias, labels, ignore_index):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((x.shape[0],), dtype=dtype), x.new_empty((2, x.shape[0]), dtype=dtype)


def _fake_backward(grad_loss, x, weight, bias, labels, statistics, ignore_index, weight_gradient):
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape if weight_gradient else (0,)),
        x.new_empty((0,)) if bias is None else bias.new_empty(bias.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, labels, ignore_index = inputs
    _, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(x, weight, bias, labels, statistics)
    ctx.ignore_index = ignore_index


def _again(kernels: Any, ctx: Any, saved: tuple[Any, ...]) -> tuple[Any, ...]:
    *inputs, _ = saved
    _, statistics = kernels.linear_cross_entropy_forward(*inputs, ctx.ignore_index)
    return *inputs, statistics


def _backward(kernels: backends.Kernels, ctx: Any, saved: tuple[Any, ...], grad_loss: Tensor, *_: Any) -> Any:
    x, weight, bias, labels, statistics = saved
    wanted = bool(ctx.needs_input_grad[1])
    grad_x, grad_weight, grad_bias = kernels.linear_cross_entropy_backward(
        grad_loss.contiguous(), x, weight, bias, labels, statistics, ctx.ignore_index, wanted
    )
    return grad_x, grad_weight if wanted else None, None if bias is None else grad_bias, None, None


contract.register(
    "linear_cross_entropy",
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    again=_again,
)
