"""The emulation finds the mistakes that it is there for, and runs what is right."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys

import pytest

from . import build, count

THREADS = 96
NAME = "_faults.so"
pytestmark = pytest.mark.skipif(build.missing() is not None, reason=f"the CUDA emulation: {build.missing()}")


@pytest.fixture(scope="module")
def faults() -> ctypes.CDLL:
    """Built so that it can count: kernels run as ever until it does."""
    return ctypes.CDLL(str(build.library("counted", sources=build.FAULTS, name=NAME)))


def run(library: ctypes.CDLL, kernel: str, seed: int = 1) -> tuple[list[float], str]:
    """(what the kernel wrote, the error)."""
    out = (ctypes.c_float * THREADS)(*[-1.0] * THREADS)
    message = ctypes.create_string_buffer(512)
    library.rk_emulation_set_seed(ctypes.c_uint64(seed))
    library.rk_fault(kernel.encode(), out, message)
    return list(out), message.value.decode()


def test_right_kernels_run(faults: ctypes.CDLL) -> None:
    faults.rk_emulation_set_device(90, 4)
    for seed in range(5):
        assert run(faults, "neighbour", seed) == ([float((i + 1) % THREADS) for i in range(THREADS)], "")
        assert run(faults, "block sum", seed) == ([THREADS * (THREADS - 1) / 2.0] * THREADS, "")
        assert run(faults, "hopper", seed) == ([8.0] * THREADS, "")
        assert run(faults, "waited copy", seed) == ([11.0] * THREADS, "")  # the second copy adds 1 after the product


def test_a_missing_barrier_reads_the_poison(faults: ctypes.CDLL) -> None:
    out, message = run(faults, "no barrier")
    assert message == ""
    assert any(math.isnan(x) for x in out)


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        ("two barriers", "hangs"),
        ("diverged", "diverge"),
        ("ended", "lane 5, which has ended"),
        ("unwaited copy", "never waited for"),
        ("wait two ahead", "by its parity it passes at once"),
        ("wait one behind", "by its parity it waits for the end of another"),
        ("unfenced loads", "copy_box overwrites bytes"),
        ("unfenced stores", "wgmma meets bytes"),
        ("fenced by another", "wgmma meets bytes"),
        ("unannounced barrier", "no fence_mbarrier_init"),
        ("registers that are not there", "for registers, of which the block has no more"),
        ("registers of one warp", "end with 232 and 168 registers"),
        ("more registers by dec", "setmaxnreg.dec to 232 registers from 168"),
        ("matrix within the swizzle", "begins within the pattern of its 128-byte swizzle"),
        ("map on the stack", "not in parameter space"),
    ],
)
def test_a_mistake_is_an_error(faults: ctypes.CDLL, kernel: str, says: str) -> None:
    faults.rk_emulation_set_device(90, 4)
    _, message = run(faults, kernel)
    assert says in message
    assert "RK_EMULATION_SEED=1" in message
    assert run(faults, "block sum")[1] == "", "the emulation must survive a launch that failed"


@pytest.mark.parametrize("kernel", ["past shared", "past global"])
def test_the_sanitizer_sees_an_access_out_of_bounds(kernel: str) -> None:
    library = build.library("sanitized", sources=build.FAULTS, name=NAME)
    program = (
        "import ctypes, sys; library = ctypes.CDLL(sys.argv[1]); libc = ctypes.CDLL(None)\n"
        "libc.malloc.restype = ctypes.c_void_p\n"
        f"out = ctypes.c_void_p(libc.malloc({4 * THREADS})); message = ctypes.create_string_buffer(512)\n"
        "for kernel in sys.argv[2:]:\n"
        "    library.rk_fault(kernel.encode(), out, message); print(kernel, 'ran', message.value, flush=True)\n"
    )
    environment = {**os.environ, **build.environment(library), "PYTHONMALLOC": "malloc"}
    environment.pop("ROBERTA_KERNELS_CUDA_EMULATION")
    command = [sys.executable, "-c", program, str(library), "neighbour", kernel]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert "neighbour ran b''" in done.stdout, done.stderr
    assert f"{kernel} ran" not in done.stdout
    assert "AddressSanitizer" in done.stderr
    assert done.returncode != 0


def counts(library: ctypes.CDLL, kernel: str, seed: int) -> dict[str, int]:
    library.rk_emulation_set_counting(1)
    assert run(library, kernel, seed)[1] == ""
    numbers = (ctypes.c_int64 * (1 + len(count.COUNTS)))()
    library.rk_emulation_take_counts.restype = ctypes.c_int64
    assert library.rk_emulation_take_counts(numbers, ctypes.c_int64(1)) == 1
    library.rk_emulation_set_counting(0)
    return dict(zip(count.COUNTS, numbers[1:], strict=True))


@pytest.mark.parametrize(("kernel", "wavefronts"), [("neighbour", 1), ("stride 2", 2), ("stride 3", 1)])
def test_what_a_kernel_does_is_counted(faults: ctypes.CDLL, kernel: str, wavefronts: int) -> None:
    """Three warps: each stores its words to shared memory, meets the others, loads and stores to global memory."""
    for seed in range(3):  # in whatever order the threads run
        found = counts(faults, kernel, seed)
        assert (found["load_requests"], found["store_requests"]) == (0, 3)
        assert 12 <= found["distinct_store_sectors"] <= 13, "384 bytes, which may begin within a sector"
        assert found["shared_requests"] == 6
        assert found["shared_wavefronts"] == 3 + 3 * wavefronts
        assert found["shared_conflicts"] == 3 * (wavefronts - 1)
        assert found["barrier_arrivals"] == THREADS


def test_what_hopper_does_is_counted(faults: ctypes.CDLL) -> None:
    faults.rk_emulation_set_device(90, 4)
    found = counts(faults, "hopper", 1)
    assert found["tensor_flops"] > 0
    assert found["bulk_wavefronts"] > 0
    assert found["mbarrier_waits"] > 0


def test_a_dry_run_records_and_runs_nothing(faults: ctypes.CDLL) -> None:
    room = (ctypes.c_int64 * 70)()
    faults.rk_emulation_take_launches(room, ctypes.c_int64(0))
    faults.rk_emulation_set_dry_run(1)
    try:
        out, message = run(faults, "diverged")
        assert (out, message) == ([-1.0] * THREADS, "")
        assert faults.rk_emulation_take_launches(room, ctypes.c_int64(10)) == 1
        assert list(room[:7]) == [1, 1, 1, THREADS, 1, 1, 4 * THREADS]
    finally:
        faults.rk_emulation_set_dry_run(0)
