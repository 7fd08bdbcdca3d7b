"""The compiled CPU kernels, called under each instruction set that this processor has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import roberta_kernels

LIBRARY = Path(roberta_kernels.__file__).parent / "_cpu.so"
ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kernels" in metafunc.fixturenames:
        metafunc.parametrize("kernels", range(len(ISAS)), ids=ISAS, indirect=True)


@pytest.fixture
def kernels(request: pytest.FixtureRequest):
    """torch.ops.roberta_kernels_cpu with one instruction set active."""
    if not LIBRARY.exists():
        pytest.skip("the CPU library is not built")
    torch.ops.load_library(LIBRARY)
    ops = torch.ops.roberta_kernels_cpu
    if not ops.isa_available(request.param):
        pytest.skip(f"this processor has no {ISAS[request.param]}")
    before = ops.set_isa(request.param)
    yield ops
    ops.set_isa(before)


@pytest.fixture
def on_threads():
    """on_threads(n, function): the function's result with n threads."""

    def call(threads, function):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return function()
        finally:
            torch.set_num_threads(before)

    return call
