"""Interleaved timing: the contenders of a case take turns, so that what disturbs the machine disturbs them alike.

A turn of a contender is: a rest (on a CPU: the worker threads of whoever ran before go on spinning for a while and
would take a core away), calls that are not counted (they wake this contender's own threads and fill the caches), then
some timed calls. The turns go round-robin, and the order is reversed from round to round, so that nobody always comes
after the same neighbour.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Effort:
    """How long to measure a case: `turns` rounds, or fewer (but min_turns) once `budget` seconds are spent."""

    turns: int
    min_turns: int
    turn_seconds: float
    max_calls: int
    rest: float
    budget: float


FULL = Effort(turns=7, min_turns=3, turn_seconds=0.02, max_calls=50, rest=0.1, budget=5.0)
GPU = Effort(turns=9, min_turns=5, turn_seconds=0.004, max_calls=40, rest=0.0, budget=2.0)
# Whole models on a CPU: the slowest calls take seconds, and four turns of those have to do.
MODELS = Effort(turns=15, min_turns=4, turn_seconds=0.1, max_calls=20, rest=0.15, budget=60.0)
CORPUS = Effort(turns=15, min_turns=3, turn_seconds=0.1, max_calls=20, rest=0.15, budget=60.0)
SCALING = Effort(turns=7, min_turns=3, turn_seconds=0.05, max_calls=10, rest=0.15, budget=6.0)
QUICK = Effort(turns=3, min_turns=3, turn_seconds=0.003, max_calls=10, rest=0.01, budget=1.0)


@dataclass
class Samples:
    """Seconds of the timed calls, turn by turn: of each on a CPU, their mean on a GPU."""

    turns: list[list[float]] = field(default_factory=list)

    @property
    def calls(self) -> list[float]:
        return [seconds for turn in self.turns for seconds in turn]

    @property
    def turn_medians(self) -> list[float]:
        return [statistics.median(turn) for turn in self.turns]


@dataclass(frozen=True)
class Call:
    """What is timed, and the context that its turns run in. slow: known to fill a turn with one call."""

    run: Callable[[], Any]
    active: Callable[[], AbstractContextManager[None]]
    slow: bool = False


class Clock:
    """Times calls on one device.

    On a GPU one pair of CUDA events stands around all calls of a turn, divided by their number. queued: the GPU is kept
    busy with nothing until the host has launched all of them, so that they run back to back, and the time is the
    kernels' own however long the host takes to launch them. Not queued: as a caller sees it, launches included (whole
    models, and calls that wait for the GPU themselves).
    """

    def __init__(self, device: str, *, queued: bool = True) -> None:
        self.device = device
        self.queued = queued
        self._launching: dict[int, float] = {}  # a call -> seconds that the host needs to launch it
        self._waiting: set[int] = set()  # calls that wait for the GPU themselves: nothing can be queued before them

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def calls(self, run: Callable[[], Any], count: int) -> list[float]:
        """Seconds of `count` calls, one after another; on a GPU one figure, their mean."""
        if count <= 0:
            return []
        return self._cuda(run, count) if self.device == "cuda" else self._cpu(run, count)

    def _cpu(self, run: Callable[[], Any], count: int) -> list[float]:
        now = time.perf_counter
        seconds = []
        for _ in range(count):
            start = now()
            run()
            seconds.append(now() - start)
        return seconds

    def _cuda(self, run: Callable[[], Any], count: int) -> list[float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for attempt in range(3):
            nap = 0.0
            if self.queued and id(run) not in self._waiting:
                nap = min(_LONGEST_NAP, 1.5 * count * self._launching.get(id(run), 1e-4) + 1e-4)
                torch.cuda._sleep(int(nap * _CYCLES_PER_SECOND))
            began = time.perf_counter()
            begin.record()
            for _ in range(count):
                run()
            end.record()
            launched = time.perf_counter() - began
            ran_dry = nap > 0.0 and begin.query()
            torch.cuda.synchronize()
            if not ran_dry:
                break
            self._launching[id(run)] = launched / count
            if attempt == 1:  # after a nap longer than it took before
                self._waiting.add(id(run))
        return [begin.elapsed_time(end) / 1e3 / count]


_LONGEST_NAP = 0.05
_SHORT = 0.25
_CYCLES_PER_SECOND = 2e9  # at most: a slower GPU naps longer


def measure(calls: dict[str, Call], clock: Clock, effort: Effort) -> dict[str, Samples]:
    """Times all calls round-robin. They have run once before (compiled, checked)."""
    samples = {name: Samples() for name in calls}
    counts = {}
    for name, call in calls.items():
        if call.slow:
            counts[name] = 1
            continue
        with call.active():
            seconds = min(clock.calls(call.run, 1))
            if seconds < _SHORT:  # the first may have had threads to wake
                seconds = min(seconds, *clock.calls(call.run, 1))
        counts[name] = max(1, min(effort.max_calls, round(effort.turn_seconds / max(seconds, 1e-7))))
    rest = effort.rest if clock.device == "cpu" else 0.0
    order = list(calls)
    gc.collect()
    gc.disable()
    try:
        started = time.perf_counter()
        for turn in range(effort.turns):
            if turn >= effort.min_turns and time.perf_counter() - started > effort.budget:
                break
            for name in order if turn % 2 == 0 else reversed(order):
                time.sleep(rest)
                with calls[name].active():
                    clock.calls(calls[name].run, 1 + counts[name] // 4 if counts[name] > 1 else 0)
                    samples[name].turns.append(clock.calls(calls[name].run, counts[name]))
    finally:
        gc.enable()
    return samples
