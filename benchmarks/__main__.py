"""`python -m benchmarks run` measures the kernels and `models` whole models on a CPU: JSON, tables and plots. Also
`rerank`, a reranker on a CPU, `multi-vector`, ColBERT, `generation`, summaries, `cluster`, a corpus on Ray, `service`,
requests to Ray Serve, `host-time`, what a forward on CUDA kernels takes of the host, `report`, `compare`, the
`gpu-suite` with its `gpu-bundle`, and `choose`, which makes the package follow its results.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import gpu_suite, options, report
from benchmarks.compare import THRESHOLD, DifferentMachine, check_same_machine, compare

if TYPE_CHECKING:
    import pytest

HERE = Path(__file__).parent
DOCUMENT, README = HERE.parent / "docs" / "performance.md", HERE.parent / "README.md"
REGRESSED, REFUSED = 3, 4


class _Bar:
    """A pytest plugin that shows how far the run is; pytest's own report goes to a file."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("[bold]{task.description:<60}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=console)
        self._task = self.progress.add_task("collecting", total=None)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.progress.update(self._task, total=len(session.items))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.progress.update(self._task, description=nodeid.partition("[")[2].rstrip("]") or nodeid)

    def pytest_runtest_logfinish(self) -> None:
        self.progress.advance(self._task)


def _default_folder(described: dict[str, Any]) -> Path:
    name = described.get("gpu") or f"{described['cpu']}-{described['cores']}cores-{described['isa_kernels'] or 'torch'}"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return HERE / "results" / f"{slug}-{datetime.date.today()}"


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Measures, then writes the report; returns pytest's exit status, or that of the comparison."""
    # Here, as it imports the package: gpu-suite builds it first.
    import pytest

    from benchmarks import machine

    old = report.load(arguments.compare) if arguments.compare else None
    if arguments.quick:
        torch.set_num_threads(1)
    described = machine.machine(machine.pick_device(arguments.device))
    if old is not None:
        check_same_machine(old["machine_info"], described)  # before the minutes of measuring
    folder = (arguments.out or _default_folder(described)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    results, log = folder / "kernels.json", folder / "pytest.txt"
    results.unlink(missing_ok=True)
    command = [str(HERE / "test_kernels.py"), "-p", "no:cacheprovider"]
    command += ["--benchmark-enable", f"--benchmark-json={results}", *options.as_arguments(arguments)]
    bar = _Bar(console)
    with log.open("w") as stream, contextlib.redirect_stdout(stream), bar.progress:
        status = pytest.main(command, plugins=[bar])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or not results.is_file():
        console.print(log.read_text()[-4000:], markup=False, highlight=False)
        return int(status) or 1
    _write_report(results, console)
    if status == pytest.ExitCode.TESTS_FAILED:
        console.print(f"[red]A backend failed, or gave wrong answers: see {log.name} and the notes in the report.")
    if old is not None:
        return _compare(old, report.load(results), arguments.threshold, console) or int(status)
    return int(status)


def models(arguments: argparse.Namespace, console: Console) -> int:
    """Measures whole models, then writes the report; returns the suite's exit status, or that of the comparison."""
    from benchmarks import machine
    from benchmarks.cpu_suite import CpuSuite

    old = report.load(arguments.compare) if arguments.compare else None
    if arguments.smoke:
        torch.set_num_threads(1)
    described = machine.machine("cpu")
    if old is not None:
        check_same_machine(old["machine_info"], described)
    folder = (arguments.out or _default_folder(described)).resolve()
    suite = CpuSuite(folder, console, only=arguments.only, smoke=arguments.smoke)
    status = suite.run()
    _write_report(suite.path, console)
    new = report.load(suite.path)
    if arguments.write_docs:
        _fill_documents(new, console)
    if old is not None:
        return _compare(old, new, arguments.threshold, console) or status
    return status


def small_suite(arguments: argparse.Namespace, console: Console) -> int:
    """`rerank`, `multi-vector`, `generation`, `cluster`, `service` or `host-time`; returns 1 where ours failed."""
    import importlib

    from benchmarks import machine

    folder = (arguments.out or _default_folder(machine.machine("cpu"))).resolve()
    return importlib.import_module(f"benchmarks.{arguments.command.replace('-', '_')}").run(arguments, console, folder)


def _write_report(results_path: Path, console: Console) -> None:
    from benchmarks import model_plots, model_report, plots

    results = report.load(results_path)
    folder, whole = results_path.parent, results.get("whole_models")
    images = (model_plots if whole else plots).write(results, folder)
    text = (model_report if whole else report).markdown(results, [image.name for image in images])
    written = results_path.with_suffix(".md")
    written.write_text(text)
    for path in (results_path, written, *images):
        console.print(f"wrote {os.path.relpath(path)}", markup=False, highlight=False)


def _fill_document(document: Path, results: dict[str, Any]) -> None:
    from benchmarks import model_plots, model_report, plots

    folder = document.parent
    if results.get("whole_models"):
        images = model_plots.write(results, folder / "images")
        links = [str(image.relative_to(folder)) for image in images]
        report.insert(document, f"{model_report.kind(results)}-models", model_report.body(results, links))
    else:
        device = results["machine_info"]["device"]
        images = plots.write(results, folder / "images")
        report.insert(document, device, report.section(results, images, folder))


def _fill_documents(results: dict[str, Any], console: Console) -> None:
    """docs/performance.md, and the picture and the targets in the README."""
    from benchmarks import model_report

    if results["quick"]:
        raise ValueError("a smoke run measures nothing: it is not for the documents")
    _fill_document(DOCUMENT, results)
    kind = model_report.kind(results)
    report.insert(README, f"{kind}-models", model_report.readme(results, f"docs/images/models-{kind}-speed.png"))
    for path in (DOCUMENT, README):
        console.print(f"filled {os.path.relpath(path)}", markup=False, highlight=False)


def _compare(old: dict[str, Any], new: dict[str, Any], threshold: float, console: Console) -> int:
    changes = compare(old, new)
    told = [change for change in changes if change.regressed(threshold) or change.improved(threshold)]
    for change in sorted(told, key=lambda change: -change.slowdown):
        colour, word = ("red", "SLOWER") if change.regressed(threshold) else ("green", "faster")
        console.print(
            f"[{colour}]{word}[/] {change.case} {change.contender}: {report.seconds(change.old)} -> "
            f"{report.seconds(change.new)}, {change.slowdown:.2f} times as long once the peers' own "
            f"change ({change.drift:.2f}) is taken out",
            highlight=False,
            soft_wrap=True,
        )
    regressed = sum(change.regressed(threshold) for change in changes)
    console.print(f"{len(changes)} measurements compared, {regressed} regressed by more than {threshold:.0%}")
    return REGRESSED if regressed else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    runs = commands.add_parser("run", help="measure, and write JSON, tables and plots")
    runs.add_argument("--out", type=Path, help="folder to write; default: benchmarks/results/<machine>-<date>")
    runs.add_argument("--compare", type=Path, metavar="OLD.json", help="then look for regressions, as compare does")
    options.add_options(runs.add_argument)

    wholes = commands.add_parser(
        "models",
        help="whole models on a CPU against transformers, ONNX Runtime and OpenVINO; some twenty minutes on two cores",
    )
    wholes.add_argument("--out", type=Path, help="folder to write; default: benchmarks/results/<machine>-<date>")
    wholes.add_argument("--compare", type=Path, metavar="OLD.json", help="then look for regressions, as compare does")
    wholes.add_argument(
        "--write-docs", action="store_true", help="fill docs/performance.md, its pictures, and the README's section"
    )
    wholes.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="WHAT",
        help="only this workload (1x4, ...), part (corpus, training, scaling, memory) or contender (ours, 'HF sdpa', "
        "...); repeatable; an unknown one names them all",
    )
    wholes.add_argument("--smoke", action="store_true", help="a tiny model: proves that it runs, measures nothing")

    for name, what in (
        ("rerank", "CrossEncoder.rank on a CPU against stock and other engines; some minutes on two cores"),
        ("multi-vector", "ColBERT on a CPU against stock: documents and queries; some minutes on two cores"),
        ("generation", "summaries by an encoder-decoder on a CPU against stock: some minutes on two cores"),
        ("cluster", "a corpus by two Ray workers against one process, and what Ray costs; needs ray[data]"),
        ("service", "requests to Ray Serve around a model, stock against patched; needs ray[serve]"),
        ("host-time", "what a forward on CUDA kernels takes of the host, by part; needs the CUDA headers, no GPU"),
    ):
        small = commands.add_parser(name, help=what)
        small.add_argument("--out", type=Path, help="folder to write; default: benchmarks/results/<machine>-<date>")
        small.add_argument("--smoke", action="store_true", help="tiny: proves that it runs, measures nothing")
        if name == "rerank":
            help_ = "Python of the environment with sentence-transformers' other backends (default: .venv-optimum's)"
            beside = Path(__file__).parents[1] / ".venv-optimum/bin/python"
            small.add_argument("--optimum-python", type=Path, default=beside, help=help_)

    renders = commands.add_parser("report", help="render a result file again")
    renders.add_argument("results", type=Path)
    renders.add_argument(
        "--into",
        type=Path,
        metavar="DOCUMENT.md",
        help="fill that document, at its markers; plots go to images/ beside it",
    )

    compares = commands.add_parser("compare", help="look for regressions; refuses results of different machines")
    compares.add_argument("old", type=Path)
    compares.add_argument("new", type=Path)
    suites = commands.add_parser(
        "gpu-suite",
        help="build, test, check and measure on the GPU at hand, in slots of under ten minutes",
        description=gpu_suite.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    gpu_suite.add_options(suites)

    commands.add_parser("gpu-bundle", help="build the CUDA library that gpu-suite need not build then")

    chooses = commands.add_parser("choose", help="write the choosing table from committed results of gpu-suite")
    chooses.add_argument("results", type=Path, nargs="+", help="of one commit and one card: its slots, in any order")
    for command in (runs, wholes, compares):
        command.add_argument("--threshold", type=float, default=THRESHOLD, help="default: %(default)s")

    arguments = parser.parse_args(argv)
    # A descriptor of its own: pytest captures the usual ones.
    with os.fdopen(os.dup(sys.stderr.fileno()), "w") as stream:
        console = Console(file=stream)
        try:
            if arguments.command == "run":
                return run(arguments, console)
            if arguments.command == "models":
                return models(arguments, console)
            if arguments.command in ("rerank", "multi-vector", "generation", "cluster", "service", "host-time"):
                return small_suite(arguments, console)
            if arguments.command == "gpu-suite":
                return gpu_suite.run(arguments)
            if arguments.command == "gpu-bundle":
                return gpu_suite.bundle.run(print)
            if arguments.command == "choose":
                from benchmarks.choose import choose

                return choose(arguments.results, lambda line: console.print(line, markup=False, highlight=False))
            if arguments.command == "report":
                if arguments.into:
                    _fill_document(arguments.into, report.load(arguments.results))
                else:
                    _write_report(arguments.results, console)
                return 0
            return _compare(report.load(arguments.old), report.load(arguments.new), arguments.threshold, console)
        except DifferentMachine as error:
            console.print(f"refused: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            return REFUSED
        except (ValueError, OSError) as error:
            console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            return 2


if __name__ == "__main__":
    sys.exit(main())
