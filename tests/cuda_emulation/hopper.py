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


def pytest_sessionstart() -> None:
    import torch

    from roberta_kernels import backends

    assert backends.emulating()
    _library().rk_emulation_set_device(90, _MULTIPROCESSORS)
    torch.ops.roberta_kernels_cuda.set_variant("attention", "sm90")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tests that none of its kernels ran in would pass and say nothing."""
    room = 1 << 20
    launches = (ctypes.c_int64 * (7 * room))()
    take = _library().rk_emulation_take_launches
    take.restype = ctypes.c_int64
    count = min(take(launches, ctypes.c_int64(room)), room)
    if not any(launches[7 * i + 3] in _THREADS for i in range(count)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print("\nno kernel of attention's variant sm90 was launched")
