"""Runs Python in processes that have torch, or torch and transformers, imported already, for a fraction of what a
process of its own costs: these imports take seconds. For what needs a process, and not their absence.

Run as a script, with names of modules, it imports these, reads a job a line from its input, forks, and answers with the
child's exit status. The child is a Python process like any other from there on, its exit included. Nothing is computed
before the fork, and nothing of this package imported.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping
from pathlib import Path

SECONDS = 600  # for a job, at most
# What transformers imports of torch first of all.
TORCH = ("torch", "torch._dynamo", "torch.distributed.tensor")
TRANSFORMERS = (*TORCH, "transformers", "transformers.models.auto", "transformers.models.roberta.modeling_roberta")


class Forks:
    """The process that forks."""

    def __init__(self, *modules: str) -> None:
        # Who asks whether there is a GPU must not begin to use it.
        environment = os.environ | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(
        self, *arguments: str | Path, environment: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """arguments: python's, -c or -m or a script first. environment: all of it; None: this process's."""
        with tempfile.TemporaryDirectory(prefix="forks-") as folder:
            said = [Path(folder, name) for name in ("stdout", "stderr")]
            job = {
                "arguments": list(map(str, arguments)),
                "environment": dict(os.environ if environment is None else environment),
                "cwd": str(cwd or Path.cwd()),
                "said": list(map(str, said)),
            }
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            status = int(self.process.stdout.readline())
            return subprocess.CompletedProcess(job["arguments"], status, *(path.read_text() for path in said))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@functools.cache
def _with_transformers() -> Forks:
    return Forks(*TRANSFORMERS)  # it ends with this process, when its input does


def python(
    *arguments: str | Path, environment: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs python with these arguments, torch and transformers being imported."""
    return _with_transformers().run(*arguments, environment=environment, cwd=cwd)


def become(job: dict) -> None:
    """The process of a job, which this one is from now on."""
    for descriptor, path in enumerate((os.devnull, *job["said"])):
        opened = os.open(path, os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, descriptor)
        os.close(opened)
    signal.alarm(SECONDS)
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["cwd"])
    first, *rest = job["arguments"]
    named = rest[0] if first in ("-c", "-m") else first
    folder = {"-c": "", "-m": job["cwd"]}.get(first, os.path.dirname(os.path.abspath(named)))
    added = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = [folder, *added, *(entry for entry in sys.path[1:] if entry not in before)]
    sys.argv = [first if first == "-c" else named, *(rest[1:] if first in ("-c", "-m") else rest)]
    if first == "-c":
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(named, "<string>", "exec"), main.__dict__)
    elif first == "-m":
        runpy.run_module(named, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(named, run_name="__main__")


def main() -> None:
    for name in sys.argv[1:]:
        __import__(name)
    unexpected = {"roberta_kernels", *(() if "transformers" in sys.argv else ("transformers",))} & set(sys.modules)
    assert not unexpected, unexpected
    gc.freeze()  # or each child collects, and so copies, all that was imported
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return become(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
