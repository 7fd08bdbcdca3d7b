"""The roofs of the machine, measured at the start of every run: nothing can move bytes or multiply faster than these.

Copy: `b.copy_(a)` counting the bytes read and the bytes written, the best of many, for blocks from 64 KiB up. On a CPU
small blocks stay in cache and move faster, and so do the operands of a small case; a case's roof is therefore the best
copy among the blocks that move at least as many bytes as the case does. On a GPU the calls take turns on sets of inputs
larger than the cache, and the roof is that of device memory, of the largest block.

Products: the best `torch.mm` over a few large shapes, for each dtype: on a CPU in float32, that is the rate of fused
multiply-adds that a tuned library reaches with all threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from benchmarks.timing import Clock
from benchmarks.workloads import DTYPES, Cost


def measure_roofs(device: str, dtypes: Iterable[str], clock: Clock, *, quick: bool = False) -> dict[str, Any]:
    """{"copy": [{"bytes", "bytes_per_s"}, ...], "matmul": {dtype: flop/s}, "how": ...}"""
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
    return {
        "copy": copy,
        "matmul": matmul,
        "how": "copy: best b.copy_(a), bytes read + written; matmul: best torch.mm of large random matrices, by dtype",
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
    compute = cost.flops / roofs["matmul"][dtype] if cost.products else 0.0
    return max((memory, "memory"), (compute, "compute"))
