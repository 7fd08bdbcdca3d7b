"""The whole models of a CPU as Markdown: what was promised and what was reached, then everything else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import Row, conditions, error_cell, notes, ratio_cell, seconds, table
from benchmarks.runner import ratio

_WORKLOADS = ("1x4", "1x16", "1x128", "8x128", "4x512", "mixed32")
_INT8 = ("ours int8", "ours int8-dynamic")
PEER = "the best float32 peer"
_BFLOAT16 = ("HF bfloat16 model", "OpenVINO bfloat16")


@dataclass(frozen=True)
class Target:
    """What a workload is to reach.

    ours: contenders, of which the fastest counts that reaches it, or the fastest where none does. times: how many times
    as long the fastest of the others has to take. other: None: the peers in float32. roof: the fraction of the roof of
    what is multiplied. error: the most, over that of `error_of`, or of the other.
    """

    workload: str
    ours: tuple[str, ...]
    times: float
    other: tuple[str, ...] | None = None
    roof: float | None = None
    error: float | None = None
    error_of: str | None = None
    direction: str = "forward"


# On a processor with AMX.
TILE_TARGETS = (
    Target("1x4", ("ours",), 1.1),
    Target("1x16", ("ours",), 1.6),
    *(Target(name, ("ours",), 2.5) for name in ("1x128", "8x128", "4x512")),
    *(Target(name, ("ours",), 1.0, other=("OpenVINO bfloat16",)) for name in ("1x128", "8x128", "4x512")),
    Target("mixed32", ("ours",), 5.0),
    Target("8x128", ("ours high",), 1.8, other=("OpenVINO bfloat16",), error=0.01),
    Target("8x128", ("ours, bfloat16 model",), 3.0, other=_BFLOAT16, roof=0.5),
    Target("mixed32", ("ours, bfloat16 model",), 6.0, other=_BFLOAT16),
    Target("8x128", ("ours, autocast",), 2.5, other=("HF autocast",)),
    Target("8x128", ("ours, autocast",), 1.5, other=("HF autocast",), direction="forward_backward"),
    *(
        Target(
            name,
            ("ours int8-dynamic",),
            2.5,
            other=("ONNX Runtime int8", "OpenVINO bfloat16"),
            error=0.5,
            error_of="ONNX Runtime int8",
        )
        for name in ("1x128", "8x128")
    ),
)
# On one without.
VECTOR_TARGETS = (
    Target("1x4", ("ours",), 1.7),
    Target("1x4", ("ours bfloat16",), 1.5, other=("ours",)),
    Target("1x16", ("ours",), 1.7),
    Target("1x128", ("ours",), 1.3),
    Target("8x128", ("ours",), 1.3, roof=0.85),
    Target("4x512", ("ours",), 1.3),
    Target("mixed32", ("ours",), 2.2),
    Target("corpus", ("ours",), 1.3),
    *(Target(name, _INT8, 1.0, other=("ONNX Runtime int8",), error=0.5) for name in _WORKLOADS),
)


def kind(results: dict[str, Any]) -> str:
    """Of machine, in the names of sections and pictures: each kind has its own."""
    return "cpu-amx" if results["machine_info"]["isa_kernels"] == "amx" else "cpu"


def targets_of(results: dict[str, Any]) -> tuple[Target, ...]:
    return TILE_TARGETS if kind(results) == "cpu-amx" else VECTOR_TARGETS


@dataclass(frozen=True)
class Outcome:
    """A target beside what was measured. missed: what was, in words; None: it was not measured."""

    target: Target
    row: Row | None
    other: Row | None
    ratio: dict[str, float] | None
    error: float | None  # over that of the target's
    missed: tuple[str, ...] | None


def _by_case(results: dict[str, Any]) -> dict[tuple[str, str], dict[str, Row]]:
    """(workload, direction) -> contender -> its row."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in results["models"]:
        found.setdefault((row["batch"]["name"], row["direction"]), {})[row["contender"]] = row
    return found


def outcomes(results: dict[str, Any]) -> list[Outcome]:
    """One for each target whose workload was measured at all."""
    by_case = _by_case(results)
    found = []
    for target in targets_of(results):
        rows = by_case.get((target.workload, target.direction))
        if rows is None:
            continue
        ours = sorted((rows[n] for n in target.ours if n in rows), key=_time)
        if target.other is None:
            others = [row for row in rows.values() if not row["ours"] and not rounded(row)]
        else:
            others = [rows[name] for name in target.other if name in rows]
        other = min(others, key=_time, default=None)
        base = rows.get(target.error_of) if target.error_of else other
        if not ours or other is None or base is None:
            found.append(Outcome(target, ours[0] if ours else None, other, None, None, None))
            continue
        reached = next((row for row in ours if not _missed(target, row, other, base)), ours[0])
        share = reached["error"] / base["error"]
        found.append(
            Outcome(target, reached, other, ratio(reached, other), share, _missed(target, reached, other, base))
        )
    return found


def rounded(row: Row) -> bool:
    """Whether a contender keeps or multiplies less than float32."""
    return bool(row["weights"] or row.get("arithmetic"))


def _missed(target: Target, row: Row, other: Row, base: Row) -> tuple[str, ...]:
    missed = {
        "time": ratio(row, other)["median"] < target.times,
        "roof": target.roof is not None and row["roof_fraction"] < target.roof,
        "error": target.error is not None and row["error"] > target.error * base["error"],
    }
    return tuple(what for what, true in missed.items() if true)


def _time(row: Row) -> float:
    return row["median_s"]


def _bold(text: str, wanted: bool) -> str:
    return f"**{text}**" if wanted else text


def targets(results: dict[str, Any]) -> str:
    """The table of targets; what was missed is bold."""
    lines = []
    for found in outcomes(results):
        aim = f"{found.target.times:g} x"
        if found.target.roof is not None:
            aim += f", {found.target.roof:.0%} of the roof"
        if found.target.error is not None:
            aim += f", error below {found.target.error:g} of it"
        if found.target.error_of is not None:
            aim = aim.replace("of it", f"of {found.target.error_of}'s")
        workload = found.target.workload + (", with backward" if found.target.direction != "forward" else "")
        line = [workload, " or ".join(found.target.ours), " or ".join(found.target.other or (PEER,)), aim]
        row, other, error, missed = found.row, found.other, found.error, found.missed
        if row is None or other is None or found.ratio is None or error is None or missed is None:
            lines.append([*line, "not measured", ""])
            continue
        reached = found.ratio
        cell = _bold(f"{reached['median']:.2f} x ({reached['p20']:.2f} to {reached['p80']:.2f})", "time" in missed)
        if found.target.roof is not None:
            cell += ", " + _bold(f"{row['roof_fraction']:.0%} of the roof", "roof" in missed)
        if found.target.error is not None:
            cell += ", " + _bold(f"error {error:.2g} of it", "error" in missed)
        line[1], line[2] = row["contender"], other["contender"]
        lines.append([*line, cell, _bold("missed", True) if missed else "reached"])
    return table(["workload", "measured", "against", "target", "reached", ""], lines)


def times(results: dict[str, Any], direction: str = "forward") -> str:
    """Milliseconds: a line for each workload, a column for each contender."""
    found = [row for row in results["models"] if row["direction"] == direction]
    names = list(dict.fromkeys(row["contender"] for row in found))
    lines = []
    for workload in dict.fromkeys(row["batch"]["name"] for row in found):
        rows = {row["contender"]: row for row in found if row["batch"]["name"] == workload}
        cells = [f"{rows[name]['median_s'] * 1e3:.4g}" if name in rows else "" for name in names]
        lines.append([_workload(next(iter(rows.values()))), *cells])
    return table(["ms", *names], lines)


def _workload(row: Row) -> str:
    lengths = row["batch"]["lengths"]
    padded = len(lengths) * max(lengths)
    if sum(lengths) == padded:
        return row["batch"]["name"]
    return f"{row['batch']['name']} ({sum(lengths)} real tokens" + (
        f", {len(lengths)} texts)" if row["batch"]["name"] == "corpus" else f" of {padded})"
    )


def ratios(results: dict[str, Any], direction: str = "forward") -> str:
    """How many times as long each peer took as each of ours."""
    found = [row for row in results["models"] if row["direction"] == direction]
    peers = list(dict.fromkeys(row["contender"] for row in found if not row["ours"]))
    failed = {(row["case"], row["contender"]): row["reason"] for row in results["failures"]}
    lines = [
        [row["batch"]["name"], row["contender"], *(ratio_cell(row, peer, failed) for peer in peers)]
        for row in found
        if row["ours"]
    ]
    return table(["workload", "model", *(f"vs {peer}" for peer in peers)], lines)


def replaced(results: dict[str, Any]) -> str:
    """Each of ours against what somebody who patches had before, in the same precision: a line for each workload and
    direction, bold where ours is slower."""
    by_case = _by_case(results)
    names = list(dict.fromkeys(row["contender"] for row in results["models"] if row.get("instead_of")))
    lines = []
    for (workload, direction), rows in by_case.items():
        cells = []
        for name in names:
            own = rows.get(name)
            other = None if own is None else rows.get(own["instead_of"])
            if own is None or other is None:
                cells.append("")
                continue
            times = ratio(own, other)
            text = f"{times['median']:.2f} x ({times['p20']:.2f} to {times['p80']:.2f})"
            cells.append(_bold(text, times["median"] < 1.0))
        if any(cells):
            lines.append([workload + (", with backward" if direction != "forward" else ""), *cells])
    befores = {row["contender"]: row["instead_of"] for row in results["models"] if row.get("instead_of")}
    return table(["workload", *(f"{name}, against {befores[name]}" for name in names)], lines) if lines else ""


def details(results: dict[str, Any]) -> str:
    """Every measurement: time and spread, useful rate, roofs, error, memory."""
    memory = {(row["contender"], row["batch"]): row for row in results["memory"]}
    lines = []
    for row in results["models"]:
        workload = row["batch"]["name"] + (", with backward" if row["direction"] != "forward" else "")
        line = [workload, row["contender"], seconds(row["median_s"])]
        line += [f"{seconds(row['p20_s'])} to {seconds(row['p80_s'])}", str(row["calls"])]
        line += [
            f"{row['useful_tokens_per_s']:.4g}",
            f"{row['flops_per_s'] / 1e9:.1f}",
            f"{row['roof_fraction']:.0%}" if "roof_fraction" in row else "",
        ]
        line += [f"{row['memory_fraction']:.0%}" if "memory_fraction" in row else ""]
        line += [error_cell(row["error"]) + (" **beyond the promise**" if row["within_promise"] is False else "")]
        peak = memory.get((row["contender"], row["batch"]["name"])) if row["direction"] == "forward" else None
        line += [f"{peak['peak_bytes'] / 2**20:.0f} ({peak['base_bytes'] / 2**20:.0f})" if peak else ""]
        lines.append(line)
    header = ["workload", "model", "median", "p20 to p80", "calls", "tokens/s", "GFLOP/s", "of the roof"]
    return table([*header, "of memory roof", "error", "peak MiB (before the model)"], lines)


LEGEND = (
    'Under "vs" and "reached", how many times as long the other took, turn by turn: median (20th to 80th '
    "percentile); above 1 ours is faster. **Bold**: ours is slower, or a target is missed. Tokens and GFLOP are "
    "of real tokens only, whatever a contender computes. Of the roof: over the rate that the machine's units reach "
    "in what the contender multiplies (float32: multiply-adds, or on tiles a sixth of bfloat16's). Of memory roof: "
    "the encoder's weights read once, over the copy rate; it is what bounds a few tokens. Error: largest error at "
    "real positions against float64, over the largest value. "
    "Peak: resident in a process of its own that runs only this, and in brackets what was resident before there "
    "was a model (torch, or the engine)."
)


def unavailable(results: dict[str, Any]) -> str:
    return "\n".join(f"* {name} was not measured: {why}" for name, why in results["unavailable"].items())


def body(results: dict[str, Any], images: Iterable[str]) -> str:
    """Everything but a title; images: as links."""
    size = {row["model"] for row in results["models"]}
    parts = [conditions(results)]
    if size:
        parts.append(
            f"A model of the size of {', '.join(sorted(size))}, random weights, float32 unless the name says otherwise."
        )
    parts.append(LEGEND)
    if outcomes(results):
        parts += ["#### Targets", targets(results)]
    if results["models"]:
        before = replaced(results)
        parts += ["#### Against what it replaces", before] if before else []
        parts += ["#### Times", times(results), "#### Against each peer", ratios(results)]
        if any(row["direction"] != "forward" for row in results["models"]):
            backward = "forward_backward"
            parts += ["#### Forward + backward", times(results, backward), ratios(results, backward)]
        parts += ["#### Every measurement", details(results)]
    parts += [notes(results), unavailable(results), "\n".join(f"![{Path(i).stem}]({i})" for i in images)]
    return "\n\n".join(part for part in parts if part)


def markdown(results: dict[str, Any], images: Iterable[str] = ()) -> str:
    """The report of a run."""
    return f"# Whole models on a CPU\n\n{body(results, images)}\n"


# What a user has, beside what he would have instead.
_GAINS = (
    ("ours", "HF sdpa", "float32, over transformers"),
    ("ours", "ONNX Runtime", "over ONNX Runtime"),
    ("ours", "OpenVINO", "over OpenVINO"),
    ("ours, bfloat16 model", "HF bfloat16 model", "bfloat16, over transformers"),
    ("ours, bfloat16 model", "OpenVINO bfloat16", "over OpenVINO"),
    ("ours int8-dynamic", "ONNX Runtime int8", "int8, over ONNX Runtime"),
)


def gains(results: dict[str, Any]) -> str:
    """How many times as fast, by workload, forward; bold where the other is faster."""
    by_case = {workload: rows for (workload, direction), rows in _by_case(results).items() if direction == "forward"}
    pairs = [gain for gain in _GAINS if any(gain[0] in rows and gain[1] in rows for rows in by_case.values())]
    lines = []
    for workload, rows in by_case.items():
        cells = []
        for own, other, _ in pairs:
            if own not in rows or other not in rows:
                cells.append("")
                continue
            median = ratio(rows[own], rows[other])["median"]
            cells.append(_bold(f"{median:.2f} x", median < 1.0))
        if any(cells):
            lines.append([workload, *cells])
    return table(["", *(title for *_, title in pairs)], lines)


def readme(results: dict[str, Any], picture: str) -> str:
    """What the README shows."""
    machine, commit = results["machine_info"], results["commit_info"]
    return "\n\n".join(
        (
            f"On {machine['cpu']}, {machine['cores']} cores ({machine['isa_kernels']}), {results['datetime'][:10]}, "
            f"commit {commit.get('id', 'unknown')[:12]}: a model of RoBERTa-base size, all in turns in one run. "
            "How many times as fast; **bold**: slower.",
            gains(results),
            f"![speed of whole models by workload]({picture})",
        )
    )
