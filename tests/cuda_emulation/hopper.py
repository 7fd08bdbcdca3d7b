"""A pytest plugin: the op tests on an emulated Hopper GPU, with attention's variant for it, as a call reaches it.

python tests/cuda_emulation/build.py --plain -- python -m pytest -p tests.cuda_emulation.hopper tests/ops -k cuda
"""

from __future__ import annotations

import ctypes
import os

import pytest

_MULTIPROCESSORS = 3
_THREADS = (384, 512)  # of its blocks; the portable kernels' have at most 256


def _library() -> ctypes.CDLL:
    from roberta_kernels import backends

    return ctypes.CDLL(os.environ[backends.EMULATION_VARIABLE])


_idle: list[str] = []  # pytest-xdist's workers that launched none of its kernels


def _runs_tests(config: pytest.Config) -> bool:
    """With pytest-xdist only its workers do."""
    return hasattr(config, "workerinput") or not config.getoption("numprocesses", None)


def pytest_sessionstart(session: pytest.Session) -> None:
    import torch

    from roberta_kernels import backends

    if _runs_tests(session.config):
        assert backends.emulating()
        _library().rk_emulation_set_device(90, _MULTIPROCESSORS)
        torch.ops.roberta_kernels_cuda.set_variant("attention", "sm90")


def _launched() -> bool:
    room = 1 << 20
    launches = (ctypes.c_int64 * (7 * room))()
    take = _library().rk_emulation_take_launches
    take.restype = ctypes.c_int64
    count = min(take(launches, ctypes.c_int64(room)), room)
    return any(launches[7 * i + 3] in _THREADS for i in range(count))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error: object) -> None:
    if not getattr(node, "workeroutput", {}).get("launched"):
        _idle.append(node.gateway.id)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tests that none of its kernels ran in would pass and say nothing."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["launched"] = _launched()
    elif _idle or (_runs_tests(session.config) and not _launched()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print(f"\nno kernel of attention's variant sm90 was launched {' or '.join(_idle)}".rstrip())
