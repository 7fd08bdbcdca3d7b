"""The roofs of the machine, measured at the start of every run: nothing can move bytes or multiply faster than these.

Copy: `b.copy_(a)` counting the bytes read and the bytes written, the best of many, for blocks from 64 KiB up. On a CPU
small blocks stay in cache and move faster, and so do the operands of a small case; a case's roof is therefore the best
copy among the blocks that move at least as many bytes as the case does. On a GPU the calls take turns on sets of inputs
larger than the cache, and the roof is that of device memory, of the largest block.

Products: the best `torch.mm` over a few large shapes, for each dtype. On a CPU with a C++ compiler also the rates that
the cores' units reach with all threads and no memory at all (units.cpp, built for this machine): float32 multiply-adds,
and dot products of bfloat16 and int8, on tiles where the processor has AMX. No product can exceed these; without a
compiler, the products stand for them.

A float32 product can be had from six bfloat16 ones, and one with the precision of "high" from three: so where there are
tiles, a sixth or a third of their rate may be the roof.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Clock
from benchmarks.workloads import DTYPES, Cost


def measure_roofs(device: str, dtypes: Iterable[str], clock: Clock, *, quick: bool = False) -> dict[str, Any]:
    """{"copy": [{"bytes", "bytes_per_s"}, ...], "matmul": {dtype: flop/s}, "fma": flop/s or None, "units": {dtype: op/s
    or None}, "how": ...}"""
    largest = 22 if quick else (30 if device == "cuda" else 28)
    seconds = 0.01 if quick else 0.1
    smallest = largest if device == "cuda" else 16
    copy = [_copy(device, 2**size, clock, seconds) for size in range(smallest, largest + 1, 2 if quick else 1)]
    if quick:
        shapes = [(512, 512, 512)]
    elif device == "cuda":
        shapes = [(4096, 4096, 4096), (8192, 8192, 8192), (8192, 4096, 16384)]
    else:
        shapes = [(1024, 1024, 1024), (2048, 2048, 2048), (2048, 1024, 4096)]
    matmul = {name: max(_matmul(device, name, shape, clock) for shape in shapes) for name in dtypes}
    units = _units(torch.get_num_threads(), seconds) if device == "cpu" else {}
    return {
        "copy": copy,
        "matmul": matmul,
        "fma": units.get("float32"),
        "units": {name: rate for name, rate in units.items() if name != "float32"},
        "how": "copy: best b.copy_(a), bytes read + written; matmul: best torch.mm of large random matrices, by "
        "dtype; fma and units: float32 multiply-adds, and dot products by dtype, in registers, all threads (null: no "
        "such instruction, no C++ compiler, or a GPU)",
    }


def _copy(device: str, size: int, clock: Clock, seconds: float) -> dict[str, float]:
    source = torch.randint(0, 100, (size // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    first = min(clock.calls(lambda: target.copy_(source), 3))
    count = max(5, min(1000, round(seconds / max(first, 1e-7))))
    fastest = _fastest(clock, lambda: target.copy_(source), count)
    return {"bytes": 2 * size, "bytes_per_s": 2 * size / fastest}


def _fastest(clock: Clock, run: Callable[[], Any], count: int) -> float:
    """Seconds of the fastest call, or on a GPU of the fastest of some turns."""
    turns = [count // 5 or 1] * 5 if clock.device == "cuda" else [count]
    return min(seconds for calls in turns for seconds in clock.calls(run, calls))


def _matmul(device: str, dtype: str, shape: tuple[int, int, int], clock: Clock) -> float:
    m, k, n = shape
    a = torch.randn(m, k, device=device).to(DTYPES[dtype])
    b = torch.randn(k, n, device=device).to(DTYPES[dtype])
    out = torch.mm(a, b)
    return 2 * m * k * n / _fastest(clock, lambda: torch.mm(a, b, out=out), 5 if device == "cpu" else 50)


_UNITS = {"float32": "multiply_add", "bfloat16": "dot_bfloat16", "int8": "dot_int8"}


def _units(threads: int, seconds: float) -> dict[str, float | None]:
    """Operations per second of so many threads at once, by dtype; None: no such instruction. {} without a compiler that
    builds units.cpp."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "units.so"
        command = [*shlex.split(os.environ.get("CXX", "g++")), "-O3", "-march=native", "-ffp-contract=fast"]
        command += ["-shared", "-fPIC", str(Path(__file__).with_name("units.cpp")), "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            loaded = ctypes.CDLL(str(library))
        except (OSError, subprocess.SubprocessError):
            return {}
    return {name: _rate(loaded[function], threads, seconds) for name, function in _UNITS.items()}


def _rate(function: Any, threads: int, seconds: float) -> float | None:
    function.argtypes, function.restype = (ctypes.c_longlong, ctypes.c_void_p), ctypes.c_longlong
    out = ctypes.c_float()  # written by all threads, read by none

    def run(rounds: int) -> int:
        return function(rounds, ctypes.addressof(out))  # without the interpreter's lock

    rounds = 100_000
    began = time.perf_counter()
    if run(rounds) == 0:
        return None
    rounds = max(1, round(rounds * seconds / (time.perf_counter() - began)))
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            began = time.perf_counter()
            done = sum(pool.map(run, [rounds] * threads))
            best = max(best, done / (time.perf_counter() - began))
    return best


def compute_roof(roofs: dict[str, Any], arithmetic: str) -> float:
    """Operations per second that products could reach: "float32", "three parts" (each float32 number in three bfloat16
    products of parts), "bfloat16", "float16" or "int8". 0.0: not known. A product may always be taken in float32.
    """
    units, products = roofs.get("units") or {}, roofs["matmul"]
    if arithmetic == "int8":
        return units.get("int8") or 0.0
    dots = units.get("bfloat16") or 0.0
    float32 = max(products.get("float32", 0.0), roofs.get("fma") or 0.0, dots / 6)
    if arithmetic == "float32":
        return float32
    if arithmetic == "three parts":
        return max(float32, dots / 3)
    return max(float32, products.get(arithmetic, 0.0), dots if arithmetic == "bfloat16" else 0.0)


def copy_roof(roofs: dict[str, Any], size: float) -> float:
    """Bytes per second that a case moving `size` bytes could reach."""
    blocks = [block["bytes_per_s"] for block in roofs["copy"] if block["bytes"] >= size]
    return max(blocks, default=memory_roof(roofs))


def memory_roof(roofs: dict[str, Any]) -> float:
    """Copy bandwidth of main (device) memory: of the largest block."""
    return roofs["copy"][-1]["bytes_per_s"]


def roof_seconds(roofs: dict[str, Any], cost: Cost, dtype: str) -> tuple[float, str]:
    """(the least time that a case can take, what bounds it: "memory" or "compute")."""
    memory = cost.bytes / copy_roof(roofs, cost.bytes)
    compute = cost.flops / compute_roof(roofs, dtype) if cost.products else 0.0
    return max((memory, "memory"), (compute, "compute"))
