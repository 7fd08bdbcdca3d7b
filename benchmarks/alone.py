"""Contenders measured each in a process of its own, so that the memory that one needs is its own."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Given = dict[str, Any]  # the parsed arguments


def run(
    module: str,
    parser: argparse.ArgumentParser,
    contenders: Sequence[str],
    arguments: list[str],
    *,
    measure: Callable[[Given], Any],
    table: Callable[[Given, dict[str, Any]], str],
) -> int:
    """The command line of `python -m <module>`: prints table(arguments, results by contender), and returns 1 where a
    contender failed. parser gets --out, and --contender, with which a process measures one alone."""
    parser.add_argument("--out", type=Path, help="results as JSON")
    parser.add_argument("--contender", choices=contenders, help="this one alone, in this process; prints JSON")
    given = vars(parser.parse_args(arguments))
    out, contender = given.pop("out"), given["contender"]
    if contender is not None:
        print(json.dumps(measure(given)))
        return 0
    results = {}
    for name in contenders:
        command = [sys.executable, "-m", module, *arguments, "--contender", name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            print(f"{name} failed ({done.returncode}): {done.stderr[-2000:]}", file=sys.stderr)
            return 1
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}: {results[name]['peak_bytes'] / 1e9:.2f} GB", file=sys.stderr, flush=True)
    if out is not None:
        out.write_text(json.dumps({"order": given, "results": results}, indent=1) + "\n")
    print(table(given, results))
    return 0
