"""Philox-4x32-10, the counter-based generator behind dropout, in plain torch.

Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011), section 4.1. A 128-bit counter
and a 64-bit key give four 32-bit words, so that the mask of an element depends on nothing but the seed and the
element's index: every backend can make it, in any order, and backward can make it again.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b. The int64 product wraps, but keeps all 64 bits."""
    product = b * a
    return (product >> 32) & _LOW, product & _LOW


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words (int64 tensors holding uint32 values) for each counter.

    seed: int64, one element. c0 to c3: int64 tensors of uint32 values, broadcast against each other.
    """
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)
    return c0, c1, c2, c3


def drop_threshold(dropout_p: float) -> int:
    """A word below this uint32 drops its element."""
    return int(dropout_p * 2.0**32)


def keep_mask(rows: Tensor, columns: int, planes: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """bool `[planes, rows, columns]`: which elements dropout keeps.

    rows: int64 `[rows]`, the row indices; columns: how many columns, from 0; planes: int64 `[planes]`.
    """
    groups = torch.arange((columns + 3) // 4, device=rows.device)
    words = philox(
        seed.reshape(()),
        groups[None, None, :],
        rows[None, :, None],
        planes[:, None, None],
        torch.zeros((), dtype=torch.int64, device=rows.device),
    )
    keep = torch.stack(words, dim=-1) >= drop_threshold(dropout_p)
    return keep.flatten(-2)[..., :columns]


def dropout_multiplier(shape: tuple[int, int], dropout_p: float, seed: Tensor, dtype: torch.dtype) -> Tensor:
    """`[rows, columns]`: 0 where dropout drops, 1 / (1 - p) where it keeps; plane 0."""
    rows = torch.arange(shape[0], device=seed.device)
    keep = keep_mask(rows, shape[1], torch.zeros(1, dtype=torch.int64, device=seed.device), dropout_p, seed)[0]
    return keep.to(dtype) * (1.0 / (1.0 - dropout_p))
