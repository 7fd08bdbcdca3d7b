"""What the demo was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    output: Path
    quick: bool = False
    seed: int = 0
    batch_size: int = 16
    dtype: str = "auto"
    training_seconds: float | None = None
