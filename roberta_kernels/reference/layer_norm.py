"""LayerNorm over the last dimension (Ba, Kiros, Hinton 2016, equations 3 and 4), and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def normalise(z: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """((z - mean) * rstd `[T, H]`, mean `[T]`, rstd `[T]`); the variance is the biased one."""
    mean = z.mean(-1)
    centred = z - mean[:, None]
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    return centred * rstd[:, None], mean, rstd


def layer_norm_gradients(
    grad: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of z `[T, H]`, weight `[H]` and bias `[H]`, all in the dtype of the arguments."""
    normalised = (z - mean[:, None]) * rstd[:, None]
    scaled = grad * weight
    grad_z = rstd[:, None] * (
        scaled - scaled.mean(-1, keepdim=True) - normalised * (scaled * normalised).mean(-1, keepdim=True)
    )
    return grad_z, (grad * normalised).sum(0), grad.sum(0)
