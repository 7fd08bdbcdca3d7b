"""cross_entropy(x @ weight^T + bias, labels): the product with the vocabulary and the loss of each row, in plain torch.

Of a row with logits z and label y the loss is log(sum(exp(z))) - z[y], and its gradient softmax(z) - onehot(y)
(Goodfellow, Bengio, Courville 2016, section 6.2.2.3). This is the definition: all logits at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from roberta_kernels.reference.precision import accumulator_dtype


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    acc = accumulator_dtype(x.dtype)
    logits = x.to(acc) @ weight.to(acc).t()
    return logits if bias is None else logits + bias.to(acc)


def linear_cross_entropy_forward(
    x: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [T] int64
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """(loss `[T]`, statistics `[2, T]`: of each row the largest logit, and log(sum(exp(z - largest))))."""
    logits = _logits(x, weight, bias)
    top = logits.detach().amax(-1)
    log_sum = (logits - top[:, None]).exp().sum(-1).log()
    kept = labels != ignore_index
    at_label = logits.gather(1, torch.where(kept, labels, 0)[:, None])[:, 0]
    loss = torch.where(kept, (top - at_label) + log_sum, 0.0)
    return loss, torch.stack([top, log_sum])


def linear_cross_entropy_backward(
    grad_loss: Tensor,  # [T]
    x: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [T] int64
    statistics: Tensor,  # [2, T]
    ignore_index: int,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight (empty unless asked for) and bias (empty without one)."""
    dtype, acc = x.dtype, accumulator_dtype(x.dtype)
    top, log_sum = statistics.unbind(0)
    probability = ((_logits(x, weight, bias) - top[:, None]) - log_sum[:, None]).exp()
    at_label = labels[:, None] == torch.arange(weight.shape[0], device=labels.device)
    kept = (labels != ignore_index)[:, None]
    grad = torch.where(kept, (probability - at_label.to(acc)) * grad_loss.to(acc)[:, None], 0.0)
    return (
        (grad @ weight.to(acc)).to(dtype),
        (grad.t() @ x.to(acc)).to(dtype) if weight_gradient else weight.new_empty(0),
        x.new_empty(0) if bias is None else grad.sum(0).to(dtype),
    )
