"""The memory of one contender, in a process of its own: `python -m benchmarks.memory ORDER`.

ORDER is a JSON file: "contender", "smoke", "threads", "exported" (the folder of benchmarks.engines), "batches" (pairs
of a name and lengths, the smallest first) and "out", the file to write: {"base_bytes": resident before there is a
model, "batches": {name: the most that was resident while it ran}}. An engine's process never imports torch.

Linux only: the high-water mark of /proc/self/status, set back before each batch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engines import ENGINES


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def _engine(name: str, exported: Path, threads: int) -> tuple[int, Callable[[dict[str, np.ndarray]], Any]]:
    engine = ENGINES[name]
    __import__(engine.packages[-1])
    base = _status("VmRSS")
    return base, engine.start(exported / engine.file, threads)


def _model(order: dict[str, Any], exported: Path) -> tuple[int, Callable[[dict[str, np.ndarray]], Any]]:
    import torch

    from benchmarks.cpu_suite import contenders
    from benchmarks.models import make

    torch.set_num_threads(order["threads"])
    torch._dynamo.config.recompile_limit = 64
    runner = contenders(exported, order["threads"], smoke=order["smoke"])[order["contender"]]
    base = _status("VmRSS")
    run, _ = make(runner, "cpu", torch.float32, smoke=order["smoke"])

    def call(arguments: dict[str, np.ndarray]) -> Any:
        with torch.no_grad():
            return run(**{name: torch.from_numpy(array) for name, array in arguments.items()})

    return base, call


def main(path: str) -> int:
    order = json.loads(Path(path).read_text())
    exported, name = Path(order["exported"]), order["contender"]
    base, call = _engine(name, exported, order["threads"]) if name in ENGINES else _model(order, exported)
    peaks = {}
    draw = np.random.default_rng(0)
    for batch, lengths in order["batches"]:
        real = np.arange(max(lengths)) < np.array(lengths)[:, None]
        ids = np.where(real, draw.integers(5, 290, real.shape), 1)  # 1: padding
        arguments = {"input_ids": ids}
        if not real.all() or name in ENGINES:
            arguments["attention_mask"] = real.astype(np.int64)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is now what is resident
        call(arguments)
        peaks[batch] = _status("VmHWM")
    Path(order["out"]).write_text(json.dumps({"base_bytes": base, "batches": peaks}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
