"""Dropout seeds, drawn from torch's generator."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_seeds(count: int, device: torch.device | str) -> tuple[Tensor, ...]:
    """`count` seeds, each an int64 tensor `[1]` on `device`.

    They come from torch's default generator of that device, so `torch.manual_seed`, activation checkpointing and CUDA
    graph replay all govern them; drawing them needs no synchronisation.
    """
    return torch.randint(-(2**63), 2**63 - 1, (count, 1), dtype=torch.int64, device=device).unbind(0)
