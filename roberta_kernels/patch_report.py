"""What patch() replaced, what it left, and what happened since."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

from roberta_kernels.hf.state import PatchState


@dataclass(frozen=True)
class Replaced:
    """name: where in the model. original: the Hugging Face class. fused: what now runs fused there."""

    name: str
    original: str
    fused: str


@dataclass(frozen=True)
class Left:
    """name: where in the model. original: its class. reason: why it was left as it is."""

    name: str
    original: str
    reason: str


@dataclass
class PatchReport:
    """What patch() replaced, what it left and why. str() is a table."""

    replaced: list[Replaced] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    backend: str = "auto"
    state: PatchState = field(default_factory=PatchState, repr=False)

    def fallbacks(self) -> dict[str, int]:
        """ "Class: reason" -> how many calls since patching ran the original code for it."""
        return self.state.reasons()

    def fallbacks_by_module(self) -> dict[str, dict[str, int]]:
        """Name of a module in the model -> reason -> how many of its calls ran the original code for it."""
        counts: dict[str, dict[str, int]] = {}
        for (name, _, reason), calls in self.state.fallbacks.items():
            counts.setdefault(name, {})[reason] = calls
        return counts

    def padded(self) -> dict[str, int]:
        """Reason -> how many calls since patching ran fused, but on every row of the padded batch, for it."""
        return dict(self.state.padded)

    def graphs(self) -> dict[str, int]:
        """What became of calls that were to run as CUDA graphs -> how many: "recorded", "replayed", or why not."""
        return dict(self.state.graphs)

    def cost_of_padding(self) -> str | None:
        """What exact answers at padded positions cost since patching, in one line; None: hardly anything."""
        rows, padding = self.state.cost["rows"], self.state.cost["padding"]
        if not padding:
            return None
        return (
            f"{padding / rows:.0%} of the rows of padded batches were padding, computed because somebody may read it; "
            'if nobody does, patch(model, padded_rows="zeros") leaves it out'
        )

    def __bool__(self) -> bool:
        """Whether anything was replaced."""
        return bool(self.replaced)

    @property
    def quantization(self) -> str | None:
        """What the layers' weights are rounded to for inference on a CPU; None: not at all."""
        return self.state.options.quantization

    def __rich__(self) -> Any:
        from rich.table import Table

        title = (
            f"roberta_kernels: {len(self.replaced)} modules replaced, {len(self.left)} left; backend: {self.backend}"
        )
        if self.quantization is not None:
            title += f"; inference on the CPU with {self.quantization} weights"
        if self.state.graphs:
            title += "; CUDA graphs: " + ", ".join(f"{count} {what}" for what, count in self.state.graphs.items())
        table = Table(title=title, title_justify="left", caption=self.cost_of_padding(), caption_justify="left")
        for column in ("modules", "class", "what runs there now"):
            table.add_column(column, overflow="fold")
        grouped: dict[tuple[str, str, bool], list[str]] = {}
        for replaced in self.replaced:
            grouped.setdefault((replaced.original, replaced.fused, True), []).append(replaced.name)
        for left in self.left:
            grouped.setdefault((left.original, f"the original: {left.reason}", False), []).append(left.name)
        for (original, what, _), names in grouped.items():
            first = names[0] or "(the model)"
            table.add_row(first if len(names) == 1 else f"{first} and {len(names) - 1} more", original, what)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=120, color_system=None).print(self)
        return text.getvalue().rstrip()
