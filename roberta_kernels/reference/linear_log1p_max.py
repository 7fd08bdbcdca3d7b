"""max over the rows of a sequence of log1p(relu(x @ weight^T + bias)): a weight for each word, in plain torch.

SPLADE's activation and pooling (Formal, Lassance, Piwowarski, Clinchant 2021, "SPLADE v2", equation 6). log1p and relu
never fall, so they are applied to the largest logit alone. This is the definition: all logits at once.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from roberta_kernels.reference.precision import accumulator_dtype


def linear_log1p_max_forward(
    x: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    cu_seqlens: Tensor,  # [B + 1] int32
) -> tuple[Tensor, Tensor]:
    """(out `[B, V]`, rows `[B, V]` int32: of x, the row that has the largest logit; -1 where there is none)."""
    acc = accumulator_dtype(x.dtype)
    logits = x.to(acc) @ weight.to(acc).t()
    logits = logits if bias is None else logits + bias.to(acc)
    nothing = logits.new_full((1, weight.shape[0]), float("-inf"))  # max wants a row
    logits = torch.cat([logits, nothing])
    position = torch.arange(logits.shape[0], device=x.device)
    tops, rows = [], []
    for start, end in itertools.pairwise(cu_seqlens.unbind()):
        inside = (position >= start) & (position < end)
        top, row = torch.where(inside[:, None], logits, float("-inf")).max(0)
        tops.append(top)
        rows.append(torch.where(top == float("-inf"), -1, row).to(torch.int32))
    if not tops:
        return logits[:0], logits[:0].to(torch.int32)
    return torch.stack(tops).relu().log1p(), torch.stack(rows)


def linear_log1p_max_backward(
    grad_out: Tensor,  # [B, V]
    x: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    out: Tensor,  # [B, V]
    rows: Tensor,  # [B, V]
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight (empty unless asked for) and bias (empty without one). Of out = log1p(z) the derivative is
    1 / (1 + z), which is exp(-out)."""
    dtype, acc = x.dtype, accumulator_dtype(x.dtype)
    # A NaN is neither: its gradient is one.
    slopes = torch.where((rows < 0) | (out == 0), 0.0, grad_out.to(acc) * (-out).exp())
    grad = x.new_zeros((x.shape[0] + 1, weight.shape[0]), dtype=acc)
    grad = grad.scatter_add(0, rows.to(torch.int64) % grad.shape[0], slopes)[:-1]  # -1 is the row more; one for each
    return (
        (grad @ weight.to(acc)).to(dtype),
        (grad.t() @ x.to(acc)).to(dtype) if weight_gradient else weight.new_empty(0),
        x.new_empty(0) if bias is None else slopes.sum(0).to(dtype),
    )
