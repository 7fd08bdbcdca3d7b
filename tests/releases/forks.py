"""Runs scripts in processes that have torch imported already, for half of what a process of its own costs.

Run as a script, it reads a job a line from its input, forks, runs the job in the child, and answers with a line: the
child's exit status. It must never import transformers, nor compute anything: what a child imports is its own.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

SECONDS = 240  # for a job, at most


class Forks:
    """The process that forks. Python's path is that of this one, and in front of it what a job asks for."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, script: Path, arguments: list[str], *, path: list[str], log: Path) -> int:
        """The exit status of a script. What it prints goes to the file `log`."""
        job = {"script": str(script), "arguments": arguments, "path": path, "log": str(log)}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def run_job(job: dict[str, Any]) -> int:
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.alarm(SECONDS)
    sys.path[:0] = [str(Path(job["script"]).parent), *job["path"]]
    sys.argv = [job["script"], *job["arguments"]]
    try:
        runpy.run_path(job["script"], run_name="__main__")
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def serve() -> None:
    # torch, and what transformers imports of it first of all.
    import torch
    import torch._dynamo
    import torch.distributed.tensor

    assert "transformers" not in sys.modules, f"torch {torch.__version__} imports transformers"
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(run_job(json.loads(line)))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
