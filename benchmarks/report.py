"""The JSON of a run as Markdown: nobody types a number."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.roofs import memory_roof

Row = dict[str, Any]

TITLES = {"forward": "forward", "forward_backward": "forward + backward"}
_NOISY = 0.15


def load(path: Path) -> dict[str, Any]:
    """A result file; raises ValueError where it is not one of ours."""
    results = json.loads(path.read_text())
    if results.get("roberta_kernels_schema") != 1:
        raise ValueError(f"{path} was not written by these benchmarks, or by another version of them")
    return results


def rows(results: dict[str, Any]) -> list[Row]:
    """One entry for each contender of each case, of the kernels."""
    return [row["extra_info"] for row in results["benchmarks"] if "case" in row["extra_info"]]


def measurements(results: dict[str, Any]) -> list[Row]:
    """The same of kernels and whole models."""
    return rows(results) + results.get("models", [])


def seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 1.0 or unit == "us":
            return f"{value * scale:.3g} {unit}"
    raise AssertionError


def rate(row: Row) -> str:
    """Useful bytes or operations per second, whichever its roof is about."""
    if row["bound"] == "memory":
        return f"{row['bytes_per_s'] / 1e9:.3g} GB/s"
    return operations(row["flops_per_s"])


def operations(flops_per_s: float) -> str:
    """A rate of arithmetic."""
    if flops_per_s >= 1e12:
        return f"{flops_per_s / 1e12:.3g} TFLOP/s"
    return f"{flops_per_s / 1e9:.3g} GFLOP/s"


def noise(results: dict[str, Any]) -> float:
    """The median over all rows of (p80 - p20) / median."""
    spreads = [(row["p80_s"] - row["p20_s"]) / row["median_s"] for row in measurements(results)]
    return statistics.median(spreads) if spreads else 0.0


def table(header: list[str], lines: Iterable[list[str]]) -> str:
    out = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    out += ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join(out)


def conditions(results: dict[str, Any]) -> str:
    """Machine, versions, commit and roofs, as a list."""
    machine, roofs, commit = results["machine_info"], results["roofs"], results["commit_info"]
    hardware = f"{machine['cpu']}, {machine['cores']} cores, threads used: {machine['threads']}"
    if "gpu" in machine:
        hardware = f"{machine['gpu']} ({machine['gpu_memory_gib']} GiB); host {hardware}"
    else:
        hardware += f"; instruction set {machine['isa_kernels'] or 'none compiled'} (torch: {machine['isa_torch']})"
    products = ", ".join(f"{name} {operations(flops)}" for name, flops in roofs["matmul"].items())
    units = {"float32": roofs.get("fma"), **(roofs.get("units") or {})}
    registers = ", ".join(f"{name} {operations(rate)}" for name, rate in units.items() if rate)
    cached = max(block["bytes_per_s"] for block in roofs["copy"])
    dirty = " with local changes" if commit.get("dirty") else ""
    lines = [
        f"Machine: {hardware}.",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in results["versions"].items()) + ".",
        f"Commit {commit.get('id', 'unknown')[:12]}{dirty}, {results['datetime'][:10]}.",
        f"Roofs measured in the same run: copy {memory_roof(roofs) / 1e9:.3g} GB/s from memory, "
        f"{cached / 1e9:.3g} GB/s at best from cache; largest torch.mm {products}"
        + (f"; the units, in registers: {registers}." if registers else "."),
        f"Noise: three calls of five lie within {noise(results):.0%} (the median over all rows).",
    ]
    if noise(results) > _NOISY:
        lines.append("**The machine was not quiet: take these ratios with care, and measure again.**")
    if results["quick"]:
        lines.append("**A quick run: small shapes, few calls, one thread. It proves that everything runs, no more.**")
    return "\n".join(f"* {line}" for line in lines)


def ratio_cell(row: Row, peer: str, failed: dict[tuple[str, str], str]) -> str:
    found = row.get("ratios", {}).get(peer)
    if found is None:
        return "failed" if (row["case"], peer) in failed else ""
    text = f"{found['median']:.2f} ({found['p20']:.2f} to {found['p80']:.2f})"
    return f"**{text}**" if found["median"] < 1.0 else text


def contender_cell(row: Row) -> str:
    """Its name, and what ran where that is not the variant that was set."""
    served = row.get("served") or []
    return row["contender"] + (f" (ran: {', '.join(served)})" if served not in ([], [row["variant"]]) else "")


def error_cell(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


def summary(results: dict[str, Any]) -> str:
    """One table for each op and direction: each backend under test against each of its peers."""
    found, failed = rows(results), {(f["case"], f["contender"]): f["reason"] for f in results["failures"]}
    by_case = {(row["case"], row["contender"]): row for row in found}
    parts = []
    for op, direction in dict.fromkeys((row["op"], row["direction"]) for row in found):
        chosen = [row for row in found if (row["op"], row["direction"]) == (op, direction)]
        ours = {row["contender"] for row in found if row["ours"]}
        cases = {row["case"] for row in chosen}
        named = [row["contender"] for row in chosen] + [name for case, name in failed if case in cases]
        peers = [name for name in dict.fromkeys(named) if name not in ours]
        lines = []
        for row in chosen:
            if row["ours"]:
                eager = by_case.get((row["case"], "eager"), {})
                line = [row["size"]["name"], row["dtype"], row["batch"]["name"], contender_cell(row)]
                line += [seconds(row["median_s"]), rate(row), f"{row['roof_fraction']:.0%}"]
                line += [ratio_cell(row, peer, failed) for peer in peers]
                lines.append([*line, error_cell(row["error"]), error_cell(eager.get("error"))])
        if lines:
            header = ["model", "dtype", "batch", "backend", "time", "rate", "of roof"]
            header += [f"vs {peer}" for peer in peers] + ["error", "eager's"]
            parts.append(f"#### {op}, {TITLES[direction]}\n\n{table(header, lines)}")
    return "\n\n".join(parts)


def details(results: dict[str, Any]) -> str:
    """Every contender of every case."""
    lines = []
    for row in rows(results):
        tokens = f"{row['useful_tokens']}"
        if row["computed_tokens"] != row["useful_tokens"]:
            tokens += f" of {row['computed_tokens']}"
        line = [row["case"], row["contender"]]
        line += [seconds(row["median_s"]), f"{seconds(row['p20_s'])} to {seconds(row['p80_s'])}", str(row["calls"])]
        line += [rate(row), f"{row['roof_fraction']:.0%} ({row['bound']})"]
        lines.append([*line, tokens, f"{row['useful_tokens_per_s']:.3g}", error_cell(row["error"])])
    header = ["case", "contender", "median", "p20 to p80", "calls", "useful rate", "of roof"]
    header += ["tokens", "tokens/s", "error"]
    return table(header, lines)


def notes(results: dict[str, Any]) -> str:
    """What each contender is, and what is missing and why."""
    known = {row["contender"]: row for row in measurements(results)}
    lines = [f"* {name}: {row['note']}." for name, row in known.items()]
    by_reason: dict[tuple[str, str], list[str]] = {}
    for failure in results["failures"]:
        by_reason.setdefault((failure["contender"], failure["reason"]), []).append(failure["case"])
    for (name, reason), cases in by_reason.items():
        where = cases[0] if len(cases) == 1 else f"{len(cases)} cases ({cases[0]}, ...)"
        lines.append(f"* No figure for {name} in {where}: {reason}")
    return "\n".join(lines)


LEGEND = (
    'Under "vs", how many times as long the peer took, turn by turn: median (20th to 80th percentile). Above 1 the '
    "kernel is faster; **bold** where it is slower. Error: largest error against float64, over the largest value "
    "(blank: not checked in this case)."
)


def markdown(results: dict[str, Any], images: Iterable[str] = ()) -> str:
    """The whole report."""
    return (
        "\n\n".join(
            part
            for part in (
                "# Kernel benchmarks",
                conditions(results),
                "## Against the peers",
                LEGEND,
                summary(results),
                notes(results),
                "\n".join(f"![{image}]({image})" for image in images),
                "## Every measurement",
                details(results),
            )
            if part
        )
        + "\n"
    )


def section(results: dict[str, Any], images: Iterable[Path], folder: Path) -> str:
    """Conditions, tables and plots, for a document in folder."""
    pictures = "\n".join(f"![{image.stem}]({image.relative_to(folder)})" for image in images)
    return "\n\n".join((conditions(results), LEGEND, summary(results), notes(results), pictures))


def insert(document: Path, name: str, text: str) -> None:
    """Puts text between a document's markers `<!-- results:NAME -->` and `<!-- /results:NAME -->`.

    Raises ValueError where the document has no such markers.
    """
    begin, end = f"<!-- results:{name} -->", f"<!-- /results:{name} -->"
    body = "\n\n".join((begin, text, end))
    found = document.read_text()
    changed, count = re.subn(re.escape(begin) + ".*?" + re.escape(end), lambda _: body, found, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{document} needs one pair of the markers {begin} and {end}, and has {count}")
    document.write_text(changed)


def suite_markdown(results: dict[str, Any], images: Iterable[str] = ()) -> str:
    """The report of the GPU suite: stages, tests, whole models, and the kernels as markdown() has them."""
    machine = results["machine_info"] or {}
    where = machine.get("gpu") or machine.get("cpu", "an unknown machine")
    title = f"# GPU suite, slot {results['slot']}: {where}"
    if results["quick"]:
        title += "\n\n**A smoke run: tiny sizes. It proves that everything runs, no more.**"
    stages = [
        [name, told["status"], f"{told['seconds']:.0f} s", _cell(told["reason"])]
        for name, told in results["stages"].items()
    ]
    parts = [title, "## Stages", table(["stage", "status", "time", ""], stages)]
    for key, heading in (("tests", "## Tests"), ("sanitizer", "## compute-sanitizer")):
        lines = [
            [
                name,
                c["verdict"],
                *(str(c[k]) for k in ("passed", "failed", "skipped", "collected")),
                f"{c['seconds']:.0f} s",
                _cell(", ".join(c["served"])),
                _cell("; ".join(dict.fromkeys([*filter(None, [c["why"]]), *c["failures"][:2]]))),
            ]
            for name, c in results[key].items()
        ]
        if lines:
            header = ["tests", "", "passed", "failed", "skipped", "selected", "time", "served", "first failures"]
            parts += [heading, table(header, lines)]
    if results["models"]:
        parts += ["## Whole models", _model_legend(results), _models(results)]
    if results["roofs"] and results["machine_info"]:
        heading = ["## Kernels", conditions(results)]
        parts += [*heading, LEGEND, summary(results), notes(results)]
        parts += ["\n".join(f"![{image}]({image})" for image in images), "## Every measurement", details(results)]
    if results["choices"]:
        keys = ("op", "architecture", "dtype", "size", "backend", "from")
        parts += [
            "## Choosing, as it was",
            table(list(keys), [[row[key] for key in keys] for row in results["choices"]]),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:300]


def _model_legend(results: dict[str, Any]) -> str:
    known = {row["contender"]: row["note"] for row in results["models"]}
    return (
        'Times as a caller sees them, launches included. Under "vs", how many times as long the peer took. Peak: '
        "bytes beyond the weights and what else was there. Of roof: useful products over the measured matrix rate.\n\n"
        + "\n".join(f"* {name}: {note}." for name, note in known.items())
    )


def _models(results: dict[str, Any]) -> str:
    found = results["models"]
    peers = list(dict.fromkeys(row["contender"] for row in found if not row["ours"]))
    lines = []
    for row in found:
        peak = f"{row['peak_bytes'] / 2**20:.0f} MiB" if "peak_bytes" in row else ""
        line = [row["batch"]["name"], TITLES[row["direction"]], row["contender"], seconds(row["median_s"])]
        line += [
            f"{row['useful_tokens_per_s']:.3g}",
            peak,
            f"{row.get('roof_fraction', 0.0):.1%}",
            error_cell(row["error"]) + (" **beyond the promise**" if row["within_promise"] is False else ""),
        ]
        lines.append([*line, *(ratio_cell(row, peer, {}) for peer in peers)])
    header = ["batch", "direction", "model", "time", "tokens/s", "peak", "of roof", "error"]
    return table(header + [f"vs {peer}" for peer in peers], lines)
