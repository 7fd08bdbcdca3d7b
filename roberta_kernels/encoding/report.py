"""What encode() did."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class EncodeReport:
    """What encode() did. str() is a table.

    texts: rows of the output. tokens: real ones, special ones included. padding: tokens of padding that were computed.
    padding_avoided: what batches of 32 in the order of the input would have computed beyond that. bad: rows without an
    embedding. bad_rows: (row, reason) of them; only the first for a file output, which has them all in `errors`.
    truncated: texts that were longer than the model takes. packed: whether padding was left out of the computation.
    detours: why not, and what else ran on original code. resumed: rows that an earlier run had done. damaged: rows
    that it had done and that its files did not hold any more; these were encoded again. seconds: those of
    earlier runs included. embeddings: `[texts, width]`, in memory, memory-mapped for .npy, None for .parquet.
    quantization: what the layers' weights were rounded to.
    """

    texts: int
    tokens: int
    padding: int
    padding_avoided: int
    bad: int
    truncated: int
    seconds: float
    packed: bool
    detours: list[str] = field(default_factory=list)
    resumed: int = 0
    bad_rows: list[tuple[int, str]] = field(default_factory=list)
    output: Path | None = None
    errors: Path | None = None
    embeddings: np.ndarray | None = field(default=None, repr=False)
    quantization: str | None = None
    damaged: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Everything but the embeddings, as JSON values."""
        values = {name: value for name, value in vars(self).items() if name != "embeddings"}
        values |= {name: None if values[name] is None else str(values[name]) for name in ("output", "errors")}
        return values | {"tokens_per_second": self.tokens_per_second}

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_row("texts", f"{self.texts:,}" + (f" ({self.resumed:,} by an earlier run)" if self.resumed else ""))
        table.add_row("tokens", f"{self.tokens:,} in {self.seconds:,.1f} s: {self.tokens_per_second:,.0f} tokens/s")
        computed = "none computed" if self.padding == 0 else f"{self.padding:,} computed"
        table.add_row("padding", f"{computed}; {self.padding_avoided:,} avoided")
        for reason in self.detours:
            table.add_row("", f"not packed, or not fused: {reason}")
        if self.quantization is not None:
            table.add_row("weights", f"rounded to {self.quantization}")
        table.add_row("truncated", f"{self.truncated:,}")
        table.add_row("bad rows", f"{self.bad:,}" + (f": all in {self.errors}" if self.errors else ""))
        for row, reason in self.bad_rows[:5]:
            table.add_row("", f"line {row + 1}: {reason}")
        if self.damaged:
            table.add_row("damaged", f"{self.damaged:,} rows of the earlier run, encoded again")
        if self.output is not None:
            table.add_row("written", str(self.output))
        return table

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=120, color_system=None).print(self)
        return text.getvalue().rstrip()
