"""The choosing table: which backend runs an op where, as far as it was measured, and where each entry comes from.

`choices.json` holds it; `python -m benchmarks choose RESULTS` writes it from committed results of the GPU suite, and
nothing is entered by hand. What no entry covers is unmeasured, and takes the conservative choice: Triton before the
compiled CUDA kernels, whose "portable" variants run where Triton is missing. Variants that CI cannot run (CUTLASS,
wgmma, TMA) are never chosen without an entry.

An entry speaks for a range of sizes. The size of a call is the longest sequence for attention, and the number of rows
(tokens) for the other ops.

Plain Python: tables in, answers out, so that all of it is tested without a GPU.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roberta_kernels.schemas import OPS

PATH = Path(__file__).parent / "choices.json"
DTYPES = ("float32", "bfloat16", "float16")
BACKENDS = ("cuda", "triton")
NOT_IN_CUDA = frozenset({"linear_cross_entropy", "linear_log1p_max"})  # ops without CUDA C++ kernels
# The variants that the CUDA library may have of an op, plainest first; the others have one.
VARIANTS = {"attention": ("portable", "sm90"), "gelu_ffn": ("portable", "sm80", "sm90")}
UNMEASURED = "unmeasured: conservative default"
_SCHEMA = 1


class ChoicesError(ValueError):
    """A table that cannot be followed."""


@dataclass(frozen=True)
class Entry:
    """On architectures arch_min to arch_max (compute capability, 9.0 as 90), calls of `op` in `dtype` whose size is
    size_min to size_max (None: and all above) go to `backend`. All ranges include both ends.

    variant: of the CUDA library's implementations of op, for backend "cuda"; None where the op has one.
    results, commit: the file (in the repository) that says so, and the commit that it measured.
    """

    op: str
    arch_min: int
    arch_max: int
    dtype: str
    size_min: int
    size_max: int | None
    backend: str
    variant: str | None
    results: str
    commit: str

    @property
    def source(self) -> str:
        return f"{self.results}, commit {self.commit[:12]}"

    def speaks_for(self, op: str, dtype: str, arch: int) -> bool:
        return self.op == op and self.dtype == dtype and self.arch_min <= arch <= self.arch_max

    def __str__(self) -> str:
        sizes = f"{self.size_min} and up" if self.size_max is None else f"{self.size_min} to {self.size_max}"
        return f"{self.op}, {self.dtype}, sm_{self.arch_min} to sm_{self.arch_max}, sizes {sizes}"


def load(path: Path = PATH) -> tuple[Entry, ...]:
    """The table of a file. Raises ChoicesError where it is not one."""
    try:
        text = json.loads(path.read_text())
        if text["schema"] != _SCHEMA:
            raise ChoicesError(f"{path.name} has schema {text['schema']}, and {_SCHEMA} is read")
        return checked(Entry(**entry) for entry in text["entries"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ChoicesError(f"{path.name} is not a choosing table: {error}") from error


def dumps(entries: Iterable[Entry]) -> str:
    """As load reads it."""
    table = {"schema": _SCHEMA, "entries": [dataclasses.asdict(entry) for entry in checked(entries)]}
    return json.dumps(table, indent=1) + "\n"


def checked(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """The entries in the order of their ranges; raises ChoicesError where one is wrong or two contradict."""
    found = sorted(entries, key=lambda e: (OPS.index(e.op) if e.op in OPS else -1, e.dtype, e.arch_min, e.size_min))
    for entry in found:
        _check(entry)
    for i, entry in enumerate(found):
        for other in found[i + 1 :]:
            if entry.op != other.op or not _meet(entry.arch_min, entry.arch_max, other.arch_min, other.arch_max):
                continue
            if entry.dtype == other.dtype and _meet(entry.size_min, entry.size_max, other.size_min, other.size_max):
                raise ChoicesError(f"two entries cover the same calls: {entry}; {other}")
            if entry.backend == other.backend == "cuda" and entry.variant != other.variant:
                # The library keeps the variant of an op for the whole process, and a call must not have to set it.
                raise ChoicesError(
                    f"one architecture has one variant of an op, not {entry.variant} ({entry}) and "
                    f"{other.variant} ({other})"
                )
    return tuple(found)


def _check(entry: Entry) -> None:
    def wants(condition: bool, what: str) -> None:
        if not condition:
            raise ChoicesError(f"{entry}: {what}")

    wants(entry.op in OPS, f"no such op: one of {', '.join(OPS)}")
    wants(entry.dtype in DTYPES, f"no such dtype: one of {', '.join(DTYPES)}")
    wants(entry.backend in BACKENDS, f"no such backend: {entry.backend!r}, one of {', '.join(BACKENDS)}")
    wants(entry.backend != "cuda" or entry.op not in NOT_IN_CUDA, "the CUDA library has no such op")
    variants = VARIANTS.get(entry.op, ()) if entry.backend == "cuda" else ()
    wants(entry.variant is None or entry.variant in variants, f"no such variant: {entry.variant!r}")
    wants(50 <= entry.arch_min <= entry.arch_max, "an empty range of architectures")
    wants(entry.size_min >= 0, "a negative size")
    wants(entry.size_max is None or entry.size_min <= entry.size_max, "an empty range of sizes")
    wants(bool(entry.results) and bool(entry.commit), "it does not say where it comes from")


def _meet(low: int, high: int | None, other_low: int, other_high: int | None) -> bool:
    return (high is None or other_low <= high) and (other_high is None or low <= other_high)


def ranges(entries: Sequence[Entry], op: str, dtype: str, arch: int) -> tuple[tuple[int | None, str | None], ...]:
    """What runs on one architecture, over all sizes: (first size that this no longer holds for, backend) in rising
    order; the last one ends at None. Backend None: unmeasured. Empty where nothing was measured at all.
    """
    found: list[tuple[int | None, str | None]] = []
    at = 0
    for entry in entries:  # sorted by size within an op, dtype and range of architectures
        if not entry.speaks_for(op, dtype, arch):
            continue
        if entry.size_min > at:
            found.append((entry.size_min, None))
        if found and found[-1][1] == entry.backend:
            found.pop()
        found.append((None if entry.size_max is None else entry.size_max + 1, entry.backend))
        if entry.size_max is None:
            return tuple(found)
        at = entry.size_max + 1
    if found:
        found.append((None, None))
    return tuple(found)


def variant(entries: Sequence[Entry], op: str, arch: int) -> str | None:
    """The variant that the table names for an op on an architecture, or None."""
    named = (e.variant for e in entries if e.op == op and e.arch_min <= arch <= e.arch_max and e.backend == "cuda")
    return next(named, None)


def merged(old: Iterable[Entry], new: Sequence[Entry]) -> tuple[Entry, ...]:
    """The old table with what the new entries speak of replaced: an op and dtype on an architecture, as a whole."""

    def replaced(entry: Entry) -> bool:
        return any(
            entry.op == e.op
            and _meet(entry.arch_min, entry.arch_max, e.arch_min, e.arch_max)
            and (entry.dtype == e.dtype or ({entry.backend, e.backend} == {"cuda"} and entry.variant != e.variant))
            for e in new
        )

    return checked([*(entry for entry in old if not replaced(entry)), *new])


def rows(entries: Sequence[Entry], arch: int | None = None) -> list[dict[str, Any]]:
    """The table for a reader: a row for each entry, and one for what remains unmeasured of each op.

    arch: of the GPU at hand; rows that speak of another one say so under "here".
    """
    found: list[dict[str, Any]] = []
    for op in OPS:
        mine = [entry for entry in entries if entry.op == op]
        for e in mine:
            found.append(
                {
                    "op": op,
                    "architecture": f"sm_{e.arch_min}" + (f" to sm_{e.arch_max}" if e.arch_max > e.arch_min else ""),
                    "dtype": e.dtype,
                    "size": f"{e.size_min} and up" if e.size_max is None else f"{e.size_min} to {e.size_max}",
                    "backend": e.backend + (f" ({e.variant})" if e.variant else ""),
                    "from": e.source,
                    "here": arch is not None and e.arch_min <= arch <= e.arch_max,
                }
            )
        rest = "all others" if mine else "all"
        found.append(
            {
                "op": op,
                "architecture": rest,
                "dtype": rest,
                "size": rest,
                "backend": "triton, else "
                + ("reference" if op in NOT_IN_CUDA else "cuda (portable)" if op in VARIANTS else "cuda"),
                "from": UNMEASURED,
                "here": arch is not None,
            }
        )
    return found
