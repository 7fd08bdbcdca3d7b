"""What a run on Ray did."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

_SHOWN = 5
_SUMS = ("texts", "tokens", "padding", "padding_avoided", "bad", "truncated")


@dataclass
class RayReport:
    """What ray.encode() did, as EncodeReport; str() is a table.

    partitions: of the output; resumed: texts in those that an earlier run had made, resumed_tokens: their tokens.
    seconds: of this run, from the call to the last partition; worker_seconds: that its workers encoded. packed: in
    every partition. kernels: what computed, each once. bad_rows: the first, (file, row, reason); the column `error` has
    them all.
    """

    texts: int = 0
    tokens: int = 0
    padding: int = 0
    padding_avoided: int = 0
    bad: int = 0
    truncated: int = 0
    partitions: int = 0
    files: int = 0
    workers: int = 0
    resumed: int = 0
    resumed_tokens: int = 0
    seconds: float = 0.0
    worker_seconds: float = 0.0
    packed: bool = True
    detours: list[str] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)
    quantization: str | None = None
    bad_rows: list[tuple[str, int, str]] = field(default_factory=list)
    output: str = ""

    def add(self, name: str, first: int, counts: dict[str, Any]) -> None:
        """A partition's counts. name: of its file; first: its first row."""
        self.partitions += 1
        for key in _SUMS:
            setattr(self, key, getattr(self, key) + counts[key])
        self.packed &= counts["packed"]
        self.quantization = counts["quantization"]
        self.detours = _with(self.detours, counts["detours"])
        self.kernels = _with(self.kernels, [counts["kernels"]])
        room = _SHOWN - len(self.bad_rows)
        self.bad_rows += [(name, first + row, reason) for row, reason in counts["bad_rows"][:room]]

    @property
    def tokens_per_second(self) -> float:
        return (self.tokens - self.resumed_tokens) / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return vars(self) | {"tokens_per_second": self.tokens_per_second}

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_row("texts", f"{self.texts:,}" + (f" ({self.resumed:,} by an earlier run)" if self.resumed else ""))
        encoded = self.tokens - self.resumed_tokens
        table.add_row("tokens", f"{encoded:,} in {self.seconds:,.1f} s: {self.tokens_per_second:,.0f} tokens/s")
        computed = "none computed" if self.padding == 0 else f"{self.padding:,} computed"
        table.add_row("padding", f"{computed}; {self.padding_avoided:,} avoided")
        for reason in self.detours:
            table.add_row("", f"not packed, or not fused: {reason}")
        busy = self.worker_seconds / (self.workers * self.seconds) if self.seconds else 0.0
        table.add_row("workers", f"{self.workers}, encoding {busy:.0%} of the time")
        table.add_row("kernels", ", ".join(self.kernels))
        if self.quantization is not None:
            table.add_row("weights", f"rounded to {self.quantization}")
        table.add_row("truncated", f"{self.truncated:,}")
        table.add_row("bad rows", f"{self.bad:,}" + (": all in the column error" if self.bad else ""))
        for name, row, reason in self.bad_rows:
            table.add_row("", f"{name}, line {row + 1}: {reason}")
        table.add_row("written", f"{self.partitions:,} partitions of {self.files:,} files, in {self.output}")
        return table

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=120, color_system=None).print(self)
        return text.getvalue().rstrip()


def _with(known: list[str], more: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([*known, *more]))
