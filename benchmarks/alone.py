"""Contenders measured each in a process of its own, so that the memory that one needs is its own."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results_file import save

Given = dict[str, Any]  # the parsed arguments


def run(
    module: str,
    parser: argparse.ArgumentParser,
    contenders: Sequence[str],
    arguments: list[str],
    *,
    measure: Callable[[Given], Any],
    table: Callable[[Given, dict[str, Any]], str],
    packages: Sequence[str] = (),
) -> int:
    """The command line of `python -m <module>`: prints table(arguments, results by contender), and returns 1 where a
    contender failed. parser has --threads, and gets --out, and --contender, with which a process measures one alone.
    packages: whose versions the results name too."""
    parser.add_argument("--out", type=Path, help="results as JSON, with the machine, the versions and the commit")
    parser.add_argument("--contender", choices=contenders, help="this one alone, in this process; prints JSON")
    given = vars(parser.parse_args(arguments))
    out, contender = given.pop("out"), given["contender"]
    if contender is not None:
        print(json.dumps(measure(given)))
        return 0
    described = _conditions(given["threads"], packages) if out is not None else {}
    results = {}
    for name in contenders:
        command = [sys.executable, "-m", module, *arguments, "--contender", name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            print(f"{name} failed ({done.returncode}): {done.stderr[-2000:]}", file=sys.stderr)
            return 1
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}: {results[name]['peak_bytes'] / 1e9:.2f} GB", file=sys.stderr, flush=True)
    del given["contender"]
    text = table(given, results)
    if out is not None:
        save(out, {**described, "order": given, "results": results})
    print(text)
    return 0


def _conditions(threads: int, packages: Sequence[str]) -> dict[str, Any]:
    import torch  # not where a process only starts others

    from benchmarks import machine

    torch.set_num_threads(threads)
    return machine.conditions("cpu", *packages)
