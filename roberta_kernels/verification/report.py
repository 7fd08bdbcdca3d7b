"""What `verify` answers: a report of every tensor that was compared, or an error that says why there is none."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from roberta_kernels import tolerance
from roberta_kernels.patching import PatchReport

REDRAWS = 4  # of both, each with its weights moved by one rounding

ORDINARY, LAYERWISE, GRADIENT = "as called", "layerwise", "gradient"


class VerificationError(ValueError):
    """This model or batch cannot be verified; the message says why."""


@dataclass(frozen=True)
class Entry:
    """One tensor: which call of the patched model made it, and its errors.

    quantised: it was made with quantised weights, whose errors are measured and not judged. relative: then its root
    mean square error in units of the root mean square of its exact values.
    """

    call: str
    comparison: tolerance.Comparison
    redrawn: bool = False
    quantised: bool = False
    relative: float = 0.0

    @property
    def name(self) -> str:
        return self.comparison.name

    @property
    def holds(self) -> bool:
        """True of what is not judged."""
        return self.quantised or self.comparison.holds

    @property
    def share(self) -> float:
        """The larger of (largest error / allowed, rms error / allowed): above 1 the promise is broken."""
        c = self.comparison
        pairs = ((c.max_error, c.max_allowed), (c.rms_error, c.rms_allowed))
        return max(0.0 if error == 0 else error / allowed if allowed > 0 else float("inf") for error, allowed in pairs)


@dataclass(frozen=True)
class VerificationReport:
    """What `verify` found. `holds` is the answer; print it, or `str()` it, for the table."""

    model: str
    dtype: str
    device: str
    backend: str
    batch: str
    entries: tuple[Entry, ...]
    patch_report: PatchReport
    notes: tuple[str, ...] = field(default=())
    quantization: str | None = None

    @property
    def holds(self) -> bool:
        """Whether the promise holds. With a quantization this speaks of the float32 weights only."""
        return all(entry.holds for entry in self.entries)

    @property
    def broken(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if not entry.holds)

    @property
    def worst(self) -> Entry:
        return max((entry for entry in self.entries if not entry.quantised), key=lambda entry: entry.share)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the patch report's types, for json.dump."""
        return {
            "model": self.model,
            "dtype": self.dtype,
            "device": self.device,
            "backend": self.backend,
            "batch": self.batch,
            "quantization": self.quantization,
            "holds": self.holds,
            "replaced": len(self.patch_report.replaced),
            "left": [{"name": item.name, "reason": item.reason} for item in self.patch_report.left],
            "notes": list(self.notes),
            "entries": [
                {"call": e.call, "holds": e.holds, "redrawn": e.redrawn, **dataclasses.asdict(e.comparison)}
                for e in self.entries
                if not e.quantised
            ],
            "quantised_entries": [
                {"call": e.call, "relative_error": e.relative, **dataclasses.asdict(e.comparison)}
                for e in self.entries
                if e.quantised
            ],
        }

    def _quantised_summary(self) -> str:
        called = [e for e in self.entries if e.quantised and e.call == self.quantization]
        worst = max(called, key=lambda entry: entry.relative)
        c = worst.comparison
        return (
            f"The {self.quantization} weights are not held to it, and give other answers: {worst.name} is off by up to "
            f"{c.max_error:.1e} (original {c.max_error_original:.1e}), {worst.relative:.2%} of its values in the mean."
        )

    def _summary(self) -> str:
        if self.holds:
            weights = "" if self.quantization is None else " with the float32 weights"
            return (
                f"The promise holds{weights}: every error is within its allowance (closest: {self.worst.name}, "
                f"{self.worst.share:.0%} of it)."
            )
        names = ", ".join(dict.fromkeys(entry.name for entry in self.broken[:4]))
        more = f" and {len(self.broken) - 4} more" if len(self.broken) > 4 else ""
        return f"The promise is BROKEN for {names}{more}."

    def __rich__(self) -> Group:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("tensor", overflow="fold")
        table.add_column("call")
        for heading in ("largest error", "original's", "allowed", "rms / allowed"):
            table.add_column(heading, justify="right")
        table.add_column("verdict")
        for name, entry in self._rows():
            c = entry.comparison
            if entry.quantised:
                errors = (f"{c.max_error:.2e}", f"{c.max_error_original:.2e}", "-", "-")
                table.add_row(Text(name), entry.call, *errors, Text(f"off by {entry.relative:.2%}", "yellow"))
                continue
            rms = "0%" if c.rms_error == 0 else f"{c.rms_error / c.rms_allowed:.0%}" if c.rms_allowed > 0 else "-"
            table.add_row(
                Text(name),
                entry.call,
                f"{c.max_error:.2e}" + ("*" if entry.redrawn else ""),
                f"{c.max_error_original:.2e}" + ("*" if entry.redrawn else ""),
                f"{c.max_allowed:.2e}",
                rms,
                Text("holds", "green") if entry.holds else Text("BROKEN", "bold red"),
            )
        lines: list[RenderableType] = [
            Text(f"{self.model}, {self.dtype} on {self.device}, {self.batch}"),
            Text(f"kernels: {self.backend}"),
            *self._patched(),
            table,
        ]
        if any(entry.redrawn for entry in self.entries):
            runs = f"{REDRAWS + 1} runs, weights one rounding apart"
            lines.append(Text(f"* over {runs}: the mean of our errors, and the largest of the original's"))
        lines += [Text(note) for note in self.notes]
        lines.append(Text(self._summary(), "green" if self.holds else "bold red"))
        if self.quantization is not None:
            lines.append(Text(self._quantised_summary(), "yellow"))
        return Group(*lines)

    def _patched(self) -> list[Text]:
        lines = [Text(f"patch replaced {len(self.patch_report.replaced)} modules")]
        reasons: dict[str, list[str]] = {}
        for item in self.patch_report.left:
            reasons.setdefault(item.reason, []).append(item.name)
        for reason, names in reasons.items():
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            lines.append(Text(f"patch left {listed}: {reason}"))
        return lines

    def _rows(self) -> Iterator[tuple[str, Entry]]:
        """Every output; of the gradients the worst of each layer."""
        groups: dict[str, list[Entry]] = {}
        for entry in self.entries:
            if entry.call != GRADIENT:
                yield entry.name, entry
            else:
                groups.setdefault(_layer_of(entry.name), []).append(entry)
        for group, members in groups.items():
            worst = max(members, key=lambda entry: entry.share)
            tail = worst.name[len(group) :].lstrip(".")
            yield (f"{group} (worst of {len(members)}: {tail})" if tail and len(members) > 1 else worst.name), worst

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=120, color_system=None).print(self)
        return text.getvalue().rstrip("\n")


def _layer_of(parameter: str) -> str:
    layer = re.match(r"(?:.*\.)?layer\.\d+(?=\.)", parameter)
    if layer is None:
        layer = re.match(r"(?:.*\.)?embeddings(?=\.)", parameter)
    return layer.group() if layer else parameter.rpartition(".")[0] or parameter
