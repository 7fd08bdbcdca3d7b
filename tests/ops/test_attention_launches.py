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
def test_every_layout(layout: Layout, device: ctypes.CDLL) -> None:
    device.rk_emulation_set_device(layout.arch, layout.multiprocessors)
    with Served("cuda", "cpu", layout.dtype).serving():
        run_case(layout.case, Draw(int.from_bytes(os.urandom(4), "little"), "cpu"), layout.dtype)


PLANS = r"""
#include <stdio.h>

#include "csrc/cuda/attention_plan.h"

using namespace rk::cuda;
using namespace rk::cuda::attention;

static int failures = 0;
static void expect(bool holds, const char* what, const Sizes& s, size_t shared, long long work) {
    if (holds) return;
    ++failures;
    printf("%s: batch %lld heads %lld head_dim %lld lengths %lld %lld: shared %zu work %lld\n", what, (long long)s.batch,
           (long long)s.heads, (long long)s.head_dim, (long long)s.max_seqlen_q, (long long)s.max_seqlen_k, shared, work);
}

static void check(const Sizes& s, const Machine& machine) {
    const int64_t pairs = s.batch * s.heads;
    const ForwardPlan f = plan_forward(s, machine);
    expect(f.d >= s.head_dim && f.d <= 128, "padded head dim", s, f.shared_bytes, f.work);
    expect(f.warps >= 1 && f.warps <= kMostForwardWarps, "warps", s, f.shared_bytes, f.work);
    expect(f.groups == 1 || (f.groups == 2 && f.d <= 64 && !s.dropout), "groups", s, f.shared_bytes, f.work);
    expect(f.slots >= 1 && (f.slots >= 2 || s.max_seqlen_k <= forward_tile(s.dtype)), "slots", s, f.shared_bytes, f.work);
    expect(f.shared_bytes <= machine.shared_bytes_per_block, "shared memory", s, f.shared_bytes, f.work);
    expect(f.splits >= 1 && f.splits < 2147483647, "splits", s, f.shared_bytes, f.work);
    expect(f.work == (s.max_seqlen_q == 0 ? 0 : pairs * f.splits), "work", s, f.shared_bytes, f.work);
    for (const bool owns_keys : {true, false}) {
        const BackwardPlan b = plan_backward(s, machine, owns_keys);
        const int64_t own = owns_keys ? s.max_seqlen_k : s.max_seqlen_q;
        expect(b.warps >= 1 && b.warps <= kMostBackwardWarps, "backward warps", s, b.shared_bytes, b.work);
        expect(b.slots >= 1, "backward slots", s, b.shared_bytes, b.work);
        expect(b.shared_bytes <= machine.shared_bytes_per_block, "backward shared memory", s, b.shared_bytes, b.work);
        expect(b.tiles * b.warps * 16 >= own && b.tiles < 2147483647, "backward tiles", s, b.shared_bytes, b.work);
        expect(b.work == pairs * b.tiles, "backward work", s, b.shared_bytes, b.work);
    }
    if (const auto b = plan_backward_of_sequences(s, machine)) {
        expect(b->warps * 16 >= s.max_seqlen_k && b->warps <= kMostBackwardWarps, "sequence warps", s, b->shared_bytes, b->work);
        expect(b->shared_bytes <= machine.shared_bytes_per_block, "sequence shared memory", s, b->shared_bytes, b->work);
        expect(b->work == pairs && b->slots >= 1, "sequence work", s, b->shared_bytes, b->work);
    }
}

int main() {
    const int64_t most = 2147483647;
    for (const size_t shared : {99 * 1024, 163 * 1024, 227 * 1024})
        for (const int multiprocessors : {1, 28, 132})
            for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16})
                for (const int64_t head_dim : {16, 40, 64, 72, 96, 104, 128})
                    for (const int64_t heads : {1, 12, 70000})
                        for (const int64_t batch : {0, 1, 64, 5462, 178956970})
                            for (const int64_t q : {int64_t(0), int64_t(1), int64_t(17), int64_t(128), int64_t(512), int64_t(8192), most / heads})
                                for (const int64_t k : {int64_t(0), int64_t(1), int64_t(128), int64_t(513), most / heads})
                                    for (const int flags : {0, 1, 2, 3})
                                        check({batch, heads, head_dim, q, k, dtype, (flags & 1) != 0, (flags & 2) != 0},
                                              {multiprocessors, shared});
    if (statistics_blocks(0, 12) != 0 || statistics_blocks(1, 1) != 1 || statistics_blocks(most, 70000) > kMostBlocks) ++failures;
    return failures != 0;
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_layouts_of_extreme_sizes(tmp_path: Path) -> None:
    """No tokens, one, as many as an int32 can name; more (sequence, head) pairs than a grid may have blocks."""
    source, program = tmp_path / "plans.cpp", tmp_path / "plans"
    source.write_text(PLANS)
    command = ["g++", "-std=c++17", "-O1", "-fsanitize=undefined", "-fno-sanitize-recover", f"-I{ROOT}"]
    subprocess.run([*command, str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[:4000]
