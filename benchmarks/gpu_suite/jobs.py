"""Processes of the suite: several at a time, each under a time limit, ended by their own process group."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
_GRACE = 3.0


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

    def poll(self) -> bool:
        """Whether it has ended."""
        self.job.seconds = time.monotonic() - self.began
        self.job.status = self.process.poll()
        return self.job.status is not None

    def stop(self) -> None:
        """Asks it to end, and then ends it."""
        for signal_number, patience in ((signal.SIGTERM, _GRACE), (signal.SIGKILL, _GRACE)):
            try:
                os.killpg(self.process.pid, signal_number)
            except ProcessLookupError:
                break
            try:
                self.process.wait(patience)
                break
            except subprocess.TimeoutExpired:
                continue
        self.poll()


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
                    one.stop()
                    running.remove(one)
            tick()
            time.sleep(0.05)
    finally:
        for one in running:
            one.stop()
            one.job.late = True
    for job in waiting:
        job.late = True
    return jobs
