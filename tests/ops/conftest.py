"""Fixtures of the op tests: the backend that runs, and fresh random inputs from a seed that a failure reports."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

import pytest

from roberta_kernels import backends
from roberta_kernels.backends.choosing import NOT_IN_CUDA

from .cases import DEVICE, Draw, Served


@pytest.fixture
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    """The combination that a test was parametrised with; inside the test that backend runs."""
    combination: Served = request.param
    op = request.node.callspec.params.get("op", request.node.path.stem.removeprefix("test_"))
    if combination.backend == "cuda" and op in NOT_IN_CUDA:
        pytest.skip(f"CUDA C++ has no {op}")
    with combination.serving():
        yield combination


@pytest.fixture
def draw(request: pytest.FixtureRequest) -> Draw:
    """Random inputs, other ones on every run. RK_TEST_SEED=<the number that a failure prints> draws them again."""
    asked = os.environ.get("RK_TEST_SEED")
    seed = int(asked) if asked else int.from_bytes(os.urandom(4), "little")
    print(f"RK_TEST_SEED={seed}")  # captured; shown with a failure
    if backends.emulating():  # the same seed orders the threads of the emulated kernels
        ctypes.CDLL(os.environ[backends.EMULATION_VARIABLE]).rk_emulation_set_seed(ctypes.c_uint64(seed))
    combination = request.node.callspec.params.get("served") if hasattr(request.node, "callspec") else None
    return Draw(seed, combination.device if combination is not None else DEVICE)
