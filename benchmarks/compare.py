"""Has a kernel, or a whole model, become slower? Compares two result files of the same machine.

A time is put in relation to the peers of its case first: where eager torch and the others also took 1.3 times as long,
the machine was slower that day and not the kernel. A regression is a backend under test that lost more than `threshold`
beyond that, and whose usual range (20th to 80th percentile) no longer touches the old one.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from benchmarks.report import measurements

THRESHOLD = 0.10


class DifferentMachine(ValueError):
    """The two results cannot be compared."""


@dataclass(frozen=True)
class Change:
    """One backend in one case. slowdown: new time over old, both relative to the peers'; drift: the peers' own."""

    case: str
    contender: str
    old: float
    new: float
    drift: float
    separate: bool

    @property
    def slowdown(self) -> float:
        return self.new / self.old / self.drift

    def regressed(self, threshold: float = THRESHOLD) -> bool:
        return self.separate and self.slowdown > 1.0 + threshold

    def improved(self, threshold: float = THRESHOLD) -> bool:
        return self.separate and self.slowdown < 1.0 / (1.0 + threshold)


def check_same_machine(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Compares two machine_info; raises DifferentMachine, naming what differs."""
    different = [key for key in dict.fromkeys((*old, *new)) if old.get(key) != new.get(key)]
    if different:
        told = "; ".join(f"{key}: {old.get(key)!r} then, {new.get(key)!r} now" for key in different)
        raise DifferentMachine(f"times of different machines do not compare: {told}")


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Every backend and case that both results hold. Raises DifferentMachine."""
    check_same_machine(old["machine_info"], new["machine_info"])
    if old["quick"] != new["quick"]:
        raise DifferentMachine("a quick run and a full one do not compare")
    before = {(row["case"], row["contender"]): row for row in measurements(old)}
    drifts: dict[str, list[float]] = {}
    for row in measurements(new):
        past = before.get((row["case"], row["contender"]))
        if past is not None and not row["ours"]:
            drifts.setdefault(row["case"], []).append(row["median_s"] / past["median_s"])
    changes = []
    for row in measurements(new):
        past = before.get((row["case"], row["contender"]))
        if past is None or not row["ours"]:
            continue
        drift = statistics.median(drifts.get(row["case"], [1.0]))
        slower, faster = row["p20_s"] / drift > past["p80_s"], row["p80_s"] / drift < past["p20_s"]
        changes.append(
            Change(row["case"], row["contender"], past["median_s"], row["median_s"], drift, separate=slower or faster)
        )
    return changes
