"""Requests to a service: `python -m benchmarks service` runs examples/serve.py on this machine; needs ray[serve].

The service is Ray Serve's, around a model of all-MiniLM-L6-v2's size with random weights and one thread, as it comes
and patched. Sixteen clients load it from the same machine, and so share its cores with it, the proxy and the rest of
Ray: rates are of all that together. The texts are docstrings of Python's standard library.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import cluster, machine
from benchmarks.results_file import finish

ROOT = Path(__file__).parents[1]
TURNS, SECONDS, CLIENTS = 2, 12.0, 16
SMOKE = (1, 2.0, 4)
_LINE = re.compile(
    r"^(stock|patched): ([\d.]+) requests/s, p50 ([\d.]+) ms, p99 ([\d.]+) ms, (\d+) refused$", re.MULTILINE
)
_NUMBERS = ("requests_per_s", "p50_ms", "p99_ms", "refused")


def read(said: str) -> dict[str, dict[str, float]]:
    """What the example printed, by contender. Raises ValueError where one is missing."""
    found = {name: dict(zip(_NUMBERS, map(float, numbers), strict=True)) for name, *numbers in _LINE.findall(said)}
    if set(found) != {"stock", "patched"}:
        raise ValueError(f"the example printed {said[-500:]!r}")
    return found


def measure(folder: Path, console: Console, *, smoke: bool) -> dict[str, Any]:
    """The result file's content. folder: for what is written on the way."""
    turns, seconds, clients = SMOKE if smoke else (TURNS, SECONDS, CLIENTS)
    cluster.prepare(folder, 1, smoke=smoke)
    results: dict[str, Any] = {
        "service": True,
        "quick": smoke,
        **machine.conditions("cpu", "ray"),
        "seconds": seconds,
        "clients": clients,
        "turns": [],
    }
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "RAY_ADDRESS": "local"}
    command = [sys.executable, str(ROOT / "examples" / "serve.py"), "--model", str(folder / "MiniLM")]
    command += ["--seconds", str(seconds), "--clients", str(clients)]
    for _ in range(turns):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"the example failed ({done.returncode}): {done.stderr[-2000:]}")
        results["turns"].append(read(done.stdout))
        console.print(results["turns"][-1])
    return results


def lines(results: dict[str, Any]) -> Iterator[str]:
    """The results in words."""
    info, turns = results["machine_info"], results["turns"]
    load = results["load_average_at_start"]
    yield f"{results['clients']} clients, {info['cpu']}, {info['cores']} cores, load {load:.1f} at the start"
    for turn in turns:
        for name, row in turn.items():
            yield (
                f"{name:<8} {row['requests_per_s']:7.1f} requests/s, p50 {row['p50_ms']:.1f} ms, "
                f"p99 {row['p99_ms']:.1f} ms, {row['refused']:.0f} refused"
            )
        yield f"patched over stock: {turn['patched']['requests_per_s'] / turn['stock']['requests_per_s']:.2f}"


def run(arguments: argparse.Namespace, console: Console, folder: Path) -> int:
    """Writes service.json into folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-service-") as work:
        results = measure(Path(work), console, smoke=arguments.smoke)
    finish(folder / "service.json", results, lines(results), console)
    return 0
