"""The mathematics that the fused code stands in for, in plain torch, and the numbers that it is tried with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from roberta_kernels.hf.structure import CoreParts, OutputParts

IDS = [[5, 6, 7, 8, 9], [9, 6, 7, 1, 1]]  # 1: padding


def key_mask() -> Tensor:
    """The additive mask of IDS.

    Made when asked for: a module's own tensor would be fake, or on "meta", where tensors are that at the import.
    """
    return torch.tensor([[0.0] * 5, [0.0] * 3 + [-1e9] * 2], dtype=torch.float64)[:, None, None, :]


def padded_positions(ids: Tensor, padding_idx: int) -> Tensor:
    """RoBERTa's position ids, of ids `[B, S]`: padding stays at padding_idx, the rest counts on from it."""
    real = ids.ne(padding_idx)
    return torch.cumsum(real, dim=1) * real + padding_idx


def same(got: Any, want: Tensor) -> bool:
    return isinstance(got, Tensor) and got.shape == want.shape and torch.allclose(got, want, rtol=1e-9, atol=1e-9)


def zeros_at_padding(x: Tensor, real: Tensor) -> Tensor:
    """What the unpadded layout gives of hidden states: zeros at padded positions."""
    return x.masked_fill(~real[..., None], 0.0)


def numbers(shape: Any, start: int) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float64) * 1.7 + start).view(shape)


def dense(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, linear.weight, linear.bias)


def output(parts: OutputParts, x: Tensor, residual: Tensor) -> Tensor:
    norm: nn.LayerNorm = parts.norm
    return F.layer_norm(dense(parts.dense, x) + residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def attention(core: CoreParts, x: Tensor, mask: Tensor) -> Tensor:
    heads = []
    for linear in (core.query, core.key, core.value):
        heads.append(F.linear(x, linear.weight, linear.bias).unflatten(-1, (2, 8)).transpose(1, 2))
    query, key, value = heads
    return ((query @ key.mT * 8**-0.5 + mask).softmax(-1) @ value).transpose(1, 2).flatten(2)
