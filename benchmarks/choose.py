"""`python -m benchmarks choose RESULTS`: the choosing table, backends/choices.json, from the suite's results.

What counts of an op, in a dtype, at a size is the geometric mean of its times over all cases there, forward and forward
+ backward and of every model size alike: one choice serves them all. The CUDA kernels are entered where they took less
than MARGIN of Triton's time; a variant of them is the one that took the least over all sizes and dtypes, and must have
given right answers in all. An entry reaches from the smallest to the largest size that was measured, the border between
two of them halfway; beyond that nothing is said.

Refused: results of a smoke run, of a tree with changes, in which the tests or the sanitizer failed or did not run, and
files that are not committed.
"""

from __future__ import annotations

import math
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import report
from roberta_kernels.backends import choosing
from roberta_kernels.backends.choosing import Entry

ROOT = Path(__file__).parents[1]
MARGIN = 0.97
_MUST_PASS = ("build", "tests", "sanitizer")


def choose(path: Path, say: Callable[[str], None], *, table: Path = choosing.PATH) -> int:
    """Writes the table; raises ValueError where the results do not support one."""
    results = report.load(path)
    check(results, path)
    name = str(path.resolve().relative_to(ROOT))
    new = entries(results, name)
    if not new:
        raise ValueError(f"{path} holds no op of which both the CUDA and the Triton kernels were measured")
    merged = choosing.merged(choosing.load(table), new)
    table.write_text(choosing.dumps(merged))
    for entry in new:
        say(f"{entry}: {entry.backend}" + (f" ({entry.variant})" if entry.variant else ""))
    say(f"wrote {table.name}: {len(merged)} entries, {len(new)} of them from {name}")
    return 0


def check(results: dict[str, Any], path: Path) -> None:
    """Raises ValueError where nothing may be chosen by these results."""
    if not results.get("suite"):
        raise ValueError(f"{path} was not written by gpu-suite")
    if results["quick"]:
        raise ValueError(f"{path} is of a smoke run, which measures nothing")
    for stage in _MUST_PASS:
        if (status := results["stages"][stage]["status"]) != "passed":
            raise ValueError(f"the stage {stage} of {path} is {status}: only what was tested on the GPU is chosen")
    if results["commit_info"]["dirty"]:
        raise ValueError(f"{path} measured a tree with changes that no commit has")
    if not committed(path):
        raise ValueError(f"{path} is not committed: an entry must say where it comes from")


def committed(path: Path) -> bool:
    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments, str(path.resolve())], cwd=ROOT, capture_output=True, text=True)
        return done.stdout if done.returncode == 0 else None

    return git("ls-files", "--error-unmatch") is not None and git("status", "--porcelain") == ""


def size_of(row: dict[str, Any]) -> int:
    """As choosing.py means it."""
    lengths = row["batch"]["lengths"]
    return max(lengths) if row["op"] == "attention" else sum(lengths)


def entries(results: dict[str, Any], name: str) -> list[Entry]:
    """What the results say, as entries."""
    major, minor = results["machine_info"]["gpu_capability"].split(".")
    arch = 10 * int(major) + int(minor)
    # (op, dtype, size) -> (backend, variant) -> case -> seconds
    times: dict[tuple[str, str, int], dict[tuple[str, str | None], dict[str, float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for row in report.rows(results):
        if row["ours"] and row["backend"] in choosing.BACKENDS:
            key = row["op"], row["dtype"], size_of(row)
            times[key][row["backend"], row["variant"]][row["case"]] = row["median_s"]
    broken = {(f.get("op"), f["contender"]) for f in results["failures"] if f["broken"]}
    found = []
    for op in choosing.OPS:
        mine = {(dtype, size): by_kernel for (o, dtype, size), by_kernel in times.items() if o == op}
        kernel = _best_variant(op, mine, broken)
        if kernel is None or (op, "triton") in broken:
            continue
        for dtype in choosing.DTYPES:
            wins = {}
            for (of, size), by_kernel in sorted(mine.items()):
                scores = _scores(by_kernel, [kernel, ("triton", None)]) if of == dtype else None
                if scores is not None:
                    wins[size] = scores[0] < MARGIN * scores[1]
            for low, high, won in _runs(wins):
                backend, variant = kernel if won else ("triton", None)
                found.append(
                    Entry(op, arch, arch, dtype, low, high, backend, variant, name, results["commit_info"]["id"])
                )
    return found


def _scores(
    by_kernel: dict[tuple[str, str | None], dict[str, float]], kernels: list[tuple[str, str | None]]
) -> list[float] | None:
    """Geometric means over the same cases; None where one of the kernels lacks a case that another has."""
    cases = [set(by_kernel.get(kernel, ())) for kernel in kernels]
    if not cases[0] or any(other != cases[0] for other in cases):
        return None
    return [statistics.geometric_mean(by_kernel[kernel][case] for case in sorted(cases[0])) for kernel in kernels]


def _best_variant(
    op: str,
    mine: dict[tuple[str, int], dict[tuple[str, str | None], dict[str, float]]],
    broken: set[tuple[Any, str]],
) -> tuple[str, str | None] | None:
    """The CUDA kernel to compare with Triton: it has every case that any variant has, and takes the least time."""
    candidates = {kernel for by_kernel in mine.values() for kernel in by_kernel if kernel[0] == "cuda"}
    candidates = {k for k in candidates if (op, f"cuda {k[1]}" if k[1] else "cuda") not in broken}
    whole: dict[tuple[str, str | None], dict[str, float]] = {
        kernel: {case: t for by_kernel in mine.values() for case, t in by_kernel.get(kernel, {}).items()}
        for kernel in candidates
    }
    most = max((len(times) for times in whole.values()), default=0)
    complete = {k: statistics.geometric_mean(times.values()) for k, times in whole.items() if len(times) == most}
    return min(complete, key=lambda kernel: complete[kernel]) if complete else None


def _runs(wins: dict[int, bool]) -> list[tuple[int, int, bool]]:
    """Measured sizes with one winner as ranges (first, last, won) without gaps between them."""
    found: list[tuple[int, int, bool]] = []
    for size, won in sorted(wins.items()):
        if found and found[-1][2] == won:
            found[-1] = (found[-1][0], size, won)
        elif found:
            border = int(math.sqrt(found[-1][1] * size))
            found[-1] = (found[-1][0], border, found[-1][2])
            found.append((border + 1, size, won))
        else:
            found.append((size, size, won))
    return found
