"""The kernels against their peers, one test for each contender of each case.

pytest-benchmark times the contenders of a case one after the other, which compares the machine at different moments.
So timing.py times them in turns, and pytest-benchmark is handed the times: its clock replays what was measured.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.conftest import Session
from benchmarks.runner import call_once
from benchmarks.workloads import Case, described


class Replay:
    """A clock that `step` moves on by the next measured time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._seconds: Iterator[float] = iter(())

    def __call__(self) -> float:
        return self.now

    def load(self, seconds: list[float]) -> None:
        self.now, self._seconds = 0.0, iter(seconds)

    def step(self) -> None:
        self.now += next(self._seconds, 0.0)


REPLAY = Replay()


@pytest.mark.benchmark(timer=REPLAY)
def test_kernel(benchmark, shared: Session, case: Case, contender: str) -> None:
    entry = shared.entries(case)[contender]
    if benchmark.disabled:
        try:
            benchmark(call_once, case, entry)
        except NotImplementedError as error:
            pytest.skip(str(error))
        return
    result = shared.result(case, contender)
    if result.samples is None:
        (pytest.fail if result.broken else pytest.skip)(f"{contender}: {result.reason}")
    seconds = result.samples.calls
    REPLAY.load(seconds)
    benchmark.group = case.id
    benchmark.extra_info.update({**described(case), "contender": contender, **result.figures})
    benchmark.pedantic(REPLAY.step, rounds=len(seconds))
