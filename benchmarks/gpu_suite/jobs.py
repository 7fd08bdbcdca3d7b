"""Processes of the suite: several at a time, each under a time limit, ended with all that they started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
_GRACE = 3.0

# Reads the process groups that run, and ends them where the suite is gone: killed, it cannot do it itself.
_GUARD = """
import os, signal, sys
running = set()
for line in sys.stdin:
    word, number = line.split()
    (running.add if word == "begun" else running.discard)(int(number))
for number in running:
    try:
        os.killpg(number, signal.SIGKILL)
    except OSError:
        pass
"""


@dataclass
class Job:
    """A command with its environment on top of ours; what it prints goes to `log`.

    stalled: asked now and then; True ends the job.
    """

    name: str
    command: list[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    stalled: Callable[[], bool] = lambda: False
    status: int | None = None  # exit status; negative: ended by that signal; None: not run
    late: bool = False  # stopped, or never begun, for want of time
    seconds: float = 0.0

    @property
    def tail(self) -> str:
        """The end of what it printed."""
        if not self.log.is_file():
            return ""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return "\n".join(lines[-12:])[-2000:]


class Guard:
    """A process beside the suite that outlives it by a moment."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def tell(self, word: str, number: int) -> None:
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-S", "-c", _GUARD]
            # A session of its own: what ends the suite's does not end it.
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word} {number}\n")
        self._process.stdin.flush()


_guard = Guard()


class Running:
    """A job that has begun."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.began = time.monotonic()
        with job.log.open("a") as stream:
            stream.write(f"$ {' '.join(job.command)}\n")
            stream.flush()
            # A session of its own: what it starts ends with it.
            self.process = subprocess.Popen(
                job.command,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **job.environment},
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        _guard.tell("begun", self.process.pid)

    def poll(self) -> bool:
        """Whether it has ended."""
        self.job.seconds = time.monotonic() - self.began
        if self.job.status is None:
            self.job.status = self.process.poll()
            if self.job.status is not None:
                self._signal(signal.SIGKILL)  # what it left behind
                _guard.tell("ended", self.process.pid)
        return self.job.status is not None

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.process.pid, number)
        except (ProcessLookupError, PermissionError):
            return


def stop(running: Iterable[Running]) -> None:
    """Asks all to end, and then ends them."""
    left = [one for one in running if not one.poll()]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for one in left:
            one._signal(number)
        patience = time.monotonic() + _GRACE
        while left and time.monotonic() < patience:
            left = [one for one in left if not one.poll()]
            time.sleep(0.02)


def run_jobs(
    jobs: Iterable[Job], *, parallel: int, deadline: float, tick: Callable[[], None] = lambda: None
) -> list[Job]:
    """Runs them, `parallel` at a time, until time.time() passes the deadline; returns them in the order given."""
    jobs = list(jobs)
    waiting, running = list(jobs), []
    try:
        while waiting or running:
            if time.time() > deadline:
                break
            while waiting and len(running) < parallel:
                running.append(Running(waiting.pop(0)))
            for one in list(running):
                if one.poll():
                    running.remove(one)
                elif one.job.stalled():
                    one.job.late = True
                    stop([one])
                    running.remove(one)
            tick()
            time.sleep(0.02)
    finally:
        stop(running)
        for one in running:
            one.job.late = True
    for job in waiting:
        job.late = True
    return jobs
