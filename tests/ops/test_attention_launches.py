"""attention's CUDA kernels, emulated: every way in which their launches can be laid out, and layouts for sizes that no
test can run."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from roberta_kernels import backends

from .cases import BFLOAT16, FLOAT16, FLOAT32, Draw, Served
from .test_attention import Case, run_case

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Layout:
    """A case on a device: its architecture (which tells its shared memory) and number of multiprocessors."""

    case: Case
    dtype: torch.dtype
    arch: int
    multiprocessors: int


# One multiprocessor: a block walks all query tiles of a (sequence, head). 132: tiles are split among blocks.
LAYOUTS = [
    Layout(Case("walks-keys-stay", (150, 20), 1, 64), BFLOAT16, 90, 1),
    Layout(Case("walks-keys-stay-dropout", (150, 20), 1, 32, dropout_p=0.5), FLOAT16, 90, 1),
    Layout(Case("walks-keys-stay-causal", (140, 70), 1, 64, keys=(90, 130), causal=True), FLOAT16, 90, 1),
    Layout(Case("walks-keys-stream", (200, 20), 1, 128), BFLOAT16, 86, 1),
    Layout(Case("walks-keys-stream-causal", (200,), 1, 96, keys=(230,), causal=True), FLOAT16, 86, 1),
    Layout(Case("walks-keys-stream-float32", (150, 40), 1, 128, dropout_p=0.1), FLOAT32, 86, 1),
    Layout(Case("walks-float32", (150, 70), 1, 40, mask="holes"), FLOAT32, 90, 1),
    Layout(Case("split", (150, 20), 1, 64, mask="left"), BFLOAT16, 90, 132),
    Layout(Case("split-dropout", (100, 70), 2, 24, dropout_p=0.1), FLOAT16, 90, 132),
    Layout(Case("split-keys-stream", (40, 20), 1, 64, keys=(330, 100)), BFLOAT16, 86, 132),
    Layout(Case("backward-of-sequences", (60, 128, 17), 1, 64, keys=(128, 70, 1), mask="holes"), BFLOAT16, 80, 1),
    Layout(Case("backward-of-sequences-dropout", (150, 1), 1, 24, keys=(33, 0), dropout_p=0.25), FLOAT16, 80, 4),
    Layout(Case("backward-many-warps", (20, 33), 2, 64, keys=(140, 129)), BFLOAT16, 80, 1),
]


@pytest.fixture
def device() -> Iterator[ctypes.CDLL]:
    library = ctypes.CDLL(os.environ[backends.EMULATION_VARIABLE])
    yield library
    library.rk_emulation_set_device(80, 4)


@pytest.mark.skipif(not backends.emulating(), reason="needs the emulated cuda backend (tests/cuda_emulation)")
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.case.id)
def test_every_layout(layout: Layout, device: ctypes.CDLL, draw: Draw) -> None:
    device.rk_emulation_set_device(layout.arch, layout.multiprocessors)
    with Served("cuda", "cpu", layout.dtype).serving():
        draw.device = "cpu"
        run_case(layout.case, draw, layout.dtype)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_layouts_of_extreme_sizes(tmp_path: Path) -> None:
    """No tokens, one, as many as an int32 can name; more (sequence, head) pairs than a grid may have blocks."""
    source, program = ROOT / "tests/cuda_emulation/attention_plans.cpp", tmp_path / "plans"
    command = ["g++", "-std=c++17", "-O1", "-fsanitize=undefined", "-fno-sanitize-recover", f"-I{ROOT}"]
    subprocess.run([*command, str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[:4000]
