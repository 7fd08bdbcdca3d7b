"""`python -m benchmarks choose RESULTS...`: the choosing table, backends/choices.json, from the results of the suite's
slots.

What counts of an op, in a dtype, at a size is the geometric mean of its times over all cases there, forward and forward
+ backward and of every model size alike: one choice is for them all. The CUDA kernels are entered where they took less
than MARGIN of Triton's time; a variant of them is the one that took the least over all sizes and dtypes, and must have
given right answers in all. An entry reaches from the smallest to the largest size that was measured, the border between
two of them halfway; beyond that nothing is said.

Only what was proved on that GPU is chosen. A variant of the CUDA kernels: its tests, those of the portable one (which
runs what it does not take), those of its whole backend, and both sanitizers passed. Triton: its tests passed. Where
they failed, came too late or never ran, that backend or variant is out, and no other; where Triton is out, the CUDA
kernels are entered wherever they were measured.

Refused: results of a smoke run, of a tree with changes, of more than one commit or GPU, in which tests failed that no
backend is alone in, and files that are not committed.
"""

from __future__ import annotations

import math
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.gpu_suite.plan import SANITIZERS
from roberta_kernels.backends import choosing
from roberta_kernels.backends.choosing import Entry

ROOT = Path(__file__).parents[1]
MARGIN = 0.97
_WORSE = ("late", "passed", "failed")  # what came too late in one run may have passed in another
# (op, backend, variant) -> why it may not be chosen
Vetoes = dict[tuple[str, str, str | None], str]


def choose(paths: Sequence[Path], say: Callable[[str], None], *, table: Path = choosing.PATH) -> int:
    """Writes the table; raises ValueError where the results do not support one."""
    files = {path: report.load(path) for path in paths}
    for path, results in files.items():
        check(results, path)
    results = merged(files)
    name = " + ".join(str(path.resolve().relative_to(ROOT)) for path in paths)
    out = vetoes(results)
    for (op, backend, variant), why in out.items():
        say(f"not chosen: {op}, {backend}{f' ({variant})' if variant else ''}: {why}")
    new = entries(results, name, out)
    if not new:
        raise ValueError("no op was measured of which a CUDA kernel, or Triton beside it, may be chosen")
    found = choosing.merged(choosing.load(table), new)
    table.write_text(choosing.dumps(found))
    for entry in new:
        say(f"{entry}: {entry.backend}" + (f" ({entry.variant})" if entry.variant else ""))
    say(f"wrote {table.name}: {len(found)} entries, {len(new)} of them from {name}")
    return 0


def check(results: dict[str, Any], path: Path) -> None:
    """Raises ValueError where nothing may be chosen by these results."""
    if not results.get("suite"):
        raise ValueError(f"{path} was not written by gpu-suite")
    if results["quick"]:
        raise ValueError(f"{path} is of a smoke run, which measures nothing")
    if results["machine_info"] is None:
        raise ValueError(f"{path} does not say which GPU it is of: that slot did not get so far")
    if results["commit_info"]["dirty"]:
        raise ValueError(f"{path} measured a tree with changes that no commit has")
    if not committed(path):
        raise ValueError(f"{path} is not committed: an entry must say where it comes from")


def merged(files: Mapping[Path, dict[str, Any]]) -> dict[str, Any]:
    """The results of slots as one: of a case that stands in two the later one's rows, of tests the worse outcome.

    Raises ValueError for files of more than one commit or GPU.
    """
    (first_path, first), *others = files.items()
    found = {**first, **{key: {} for key in ("tests", "sanitizer")}}
    for path, results in others:
        for what, one, other in (
            ("commit", first["commit_info"]["id"], results["commit_info"]["id"]),
            *((key, first["machine_info"][key], results["machine_info"][key]) for key in ("gpu", "gpu_capability")),
        ):
            if one != other:
                raise ValueError(f"{first_path} and {path} are not of one {what}: {one} and {other}")
    rows: dict[str, list[dict[str, Any]]] = {}
    for results in files.values():
        by_case: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in report.rows(results):
            by_case[row["case"]].append(row)
        rows |= by_case
        for key in ("tests", "sanitizer"):
            for name, told in results[key].items():
                before = found[key].get(name)
                if before is None or _WORSE.index(told["verdict"]) > _WORSE.index(before["verdict"]):
                    found[key][name] = told
    found["benchmarks"] = [{"extra_info": row} for case in rows.values() for row in case]
    found["failures"] = [failure for results in files.values() for failure in results["failures"]]
    return found


def vetoes(results: dict[str, Any]) -> Vetoes:
    """What was not proved. Raises ValueError where tests failed that no backend is alone in, or did not run."""
    tests, sanitizer = results["tests"], results["sanitizer"]
    common = [told for told in tests.values() if told["backend"] not in choosing.BACKENDS]
    if not common or any(told["verdict"] != "passed" for told in common):
        why = next((told["why"] for told in common if told["verdict"] != "passed"), "they did not run (slot 1)")
        raise ValueError(f"the tests of what all backends have in common did not pass: {why}")
    found: Vetoes = {}
    for op in choosing.OPS:
        found[op, "triton", None] = _unproved(tests, "triton", op, None)
        for variant in choosing.VARIANTS.get(op, (None,)):
            why = _unproved(tests, "cuda", op, variant)
            for tool in SANITIZERS:
                own = {name: told for name, told in sanitizer.items() if told["tool"] == tool}
                why = why or _unproved(own, "cuda", op, variant, what=tool)
            found[op, "cuda", variant] = why
    for failure in results["failures"]:  # wrong answers, or the end of its process, while it was measured
        if failure["broken"]:
            for key in _concerns(failure):
                found[key] = found.get(key) or f"{failure['case']}: {failure['reason']}"
    return {key: why for key, why in found.items() if why}


def _concerns(failure: dict[str, Any]) -> list[tuple[str, str, str | None]]:
    """Whom a broken measurement speaks against: an op's kernel, or all that may have run in a whole model."""
    backend, _, variant = failure["contender"].removeprefix("ours, ").partition(" ")
    if backend not in choosing.BACKENDS:
        return []
    found: list[tuple[str, str, str | None]] = []
    for op in choosing.OPS if failure.get("op") is None else (failure["op"],):
        known = choosing.VARIANTS.get(op, (None,)) if backend == "cuda" else (None,)
        found += [(op, backend, v) for v in known if v == (variant or None) or variant == "portable"]
    return found


def _unproved(
    outcomes: dict[str, dict[str, Any]], backend: str, op: str, variant: str | None, *, what: str = "the tests"
) -> str:
    """Why these outcomes do not prove a backend's op in a variant; "" where they do."""
    portable = choosing.VARIANTS.get(op, (None,))[0]  # runs what the variant does not take
    own = {
        name: one
        for name, one in outcomes.items()
        if one["backend"] == backend and one["op"] in (None, op) and one["variant"] in (None, portable, variant)
    }
    for name, one in own.items():
        if one["verdict"] != "passed":
            return f"{name} {one['verdict']}: {one['why']}"
    of_its_own = [one for one in own.values() if backend == "triton" or (one["op"], one["variant"]) == (op, variant)]
    return "" if of_its_own else f"{what} did not run"


def committed(path: Path) -> bool:
    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments, str(path.resolve())], cwd=ROOT, capture_output=True, text=True)
        return done.stdout if done.returncode == 0 else None

    return git("ls-files", "--error-unmatch") is not None and git("status", "--porcelain") == ""


def size_of(row: dict[str, Any]) -> int:
    """As choosing.py means it."""
    lengths = row["batch"]["lengths"]
    return max(lengths) if row["op"] == "attention" else sum(lengths)


def entries(results: dict[str, Any], name: str, out: Vetoes) -> list[Entry]:
    """What the results say, as entries, without what is out."""
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
    found = []
    for op in choosing.OPS:
        of_op = {(dtype, size): by_kernel for (o, dtype, size), by_kernel in times.items() if o == op}
        kernel = _best_variant(op, of_op, out)
        if kernel is None:
            continue
        rivals = [kernel] if (op, "triton", None) in out else [kernel, ("triton", None)]
        for dtype in choosing.DTYPES:
            wins = {}
            for (of, size), by_kernel in sorted(of_op.items()):
                scores = _scores(by_kernel, rivals) if of == dtype else None
                if scores is not None:
                    wins[size] = all(scores[0] < MARGIN * other for other in scores[1:])
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
    of_op: dict[tuple[str, int], dict[tuple[str, str | None], dict[str, float]]],
    out: Vetoes,
) -> tuple[str, str | None] | None:
    """The CUDA kernel to compare with Triton: it has every case that any variant has, and takes the least time."""
    candidates = {kernel for by_kernel in of_op.values() for kernel in by_kernel if kernel[0] == "cuda"}
    candidates = {kernel for kernel in candidates if (op, *kernel) not in out}
    whole: dict[tuple[str, str | None], dict[str, float]] = {
        kernel: {case: t for by_kernel in of_op.values() for case, t in by_kernel.get(kernel, {}).items()}
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
