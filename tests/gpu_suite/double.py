"""A machine with a Hopper GPU, as far as the suite can see it: `nvidia-smi`, `compute-sanitizer` and `nvcc` on PATH are
stubs, and in the place of pytest and of the suite's parts run scripts that say what those would (stand_in.py), in
milliseconds. Everything else is the suite itself.

Run as a program it is that suite: OUT SLOT.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_suite  # noqa: E402
from benchmarks.gpu_suite.bundle import cuda_build  # noqa: E402
from benchmarks.gpu_suite.jobs import Job  # noqa: E402

STAND_IN = Path(__file__).with_name("stand_in.py")
CARD = "NVIDIA H100 80GB HBM3, 9.0, 580.159.04, 81559 MiB"
STUBS = {
    "nvidia-smi": f'echo "{CARD}"',
    "nvcc": ': > "$3"',
    # What it is given to run begins with Python. The faulty kernels are found, unless it is set to be blind.
    "compute-sanitizer": f"""
case "$*" in
    *--help*) echo "--kernel-name"; exit 0 ;;
    */canary*) [ -e "$(dirname "$0")/blind" ] && exit 0; exit 99 ;;
esac
while [ "$1" != "{sys.executable}" ]; do shift; done
exec "$@"
""",
}


def make_machine(folder: Path) -> dict[str, str]:
    """Stubs and a bundle of these sources in a folder; what the environment has to hold."""
    programs = folder / "bin"
    programs.mkdir(parents=True)
    for name, script in STUBS.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    (folder / "package").mkdir()
    (folder / "bundle").mkdir()
    (folder / "bundle/_cuda.so").write_text("prebuilt")
    described = {
        "sources": cuda_build.sources_hash(),
        "machine": platform.machine(),
        "cuda_architectures": ["9.0a"],
        "report": {"cuda": "built", "cuda_architectures": ["9.0a"]},
    }
    (folder / "bundle/bundle.json").write_text(json.dumps(described))
    (folder / "behaviour.json").write_text("{}")
    return {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "RK_SUITE_COMMIT": "0123456789abcdef",
        "RK_REHEARSAL": str(folder),
    }


class Rehearsal(gpu_suite.Suite):
    """The suite on that machine."""

    def __init__(self, out: Path, slot: int, **options: Any) -> None:
        given = argparse.Namespace(out=out, smoke=False, limit=gpu_suite.LIMIT, only=None)
        vars(given).update(options)
        self.said: list[str] = []
        super().__init__(given, slot, self.said.append)
        folder = Path(os.environ["RK_REHEARSAL"])
        self.package, self.bundle = folder / "package", folder / "bundle"

    def _python(self, name: str, *arguments: str, **environment: str) -> Job:
        what = next(a for a in arguments if a in ("pytest", "benchmarks.gpu_suite.child", "setup.py"))
        job = super()._python(name, *arguments, **environment)
        job.command[1:] = ["-I", "-S", str(STAND_IN), what, arguments[-1]]
        return job

    def _write_now_and_then(self) -> None:
        self._write()


if __name__ == "__main__":
    Rehearsal._report = lambda self: None  # type: ignore[method-assign]  # it needs torch, and seconds
    sys.exit(Rehearsal(Path(sys.argv[1]), int(sys.argv[2])).run())
