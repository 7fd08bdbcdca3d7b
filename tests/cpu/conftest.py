"""The compiled CPU kernels, called under each instruction set that this processor has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import roberta_kernels

from .tile_library import TileAttention, compiled

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
def nan_memory():
    """Memory that torch hands out is full of NaN: an element of an output that is not written shows."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


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


def has_amx():
    if not LIBRARY.exists():
        return False
    torch.ops.load_library(LIBRARY)
    return torch.ops.roberta_kernels_cpu.isa_available(ISAS.index("amx"))


# Attention on tiles: (twin, AVX-512). Portable vectors have no fused multiply-add: only the second has the bits of the
# third.
TILE_KINDS = {"twin": (True, False), "twin-avx512": (True, True), "hardware": (False, True)}


@pytest.fixture(scope="session")
def attention_libraries(tmp_path_factory: pytest.TempPathFactory):
    """attention_libraries(kind): TileAttention with two threads, compiled once for all tests."""
    built = {}

    def get(kind):
        if kind != "twin" and not has_amx():
            pytest.skip("this processor has no AMX")
        if kind not in built:
            folder, compiler = tmp_path_factory.mktemp(kind), os.environ.get("CXX", "g++")
            built[kind] = TileAttention(compiled("tile_attention", folder, compiler, *TILE_KINDS[kind]))
        built[kind].threads(2)
        return built[kind]

    return get


@pytest.fixture(params=["twin", "hardware"])
def attention(request: pytest.FixtureRequest, attention_libraries):
    """Attention on tiles: of each kind."""
    return attention_libraries(request.param)
