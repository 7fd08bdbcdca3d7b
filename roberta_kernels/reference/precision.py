"""Which dtype the reference computes in."""

from __future__ import annotations

import torch


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything smaller."""
    return torch.float64 if dtype == torch.float64 else torch.float32
