"""How gelu_ffn chooses a variant and a tile: plain C++ functions of numbers (csrc/cuda/gelu_ffn.h)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from . import build, count

PROGRAM = r"""
#include <cstdio>
#include <cstdlib>

#include "csrc/cuda/gelu_ffn.h"

using namespace rk::cuda;
using V = GeluFfnVariant;

static int failures = 0;
#define EXPECT(condition) \
    if (!(condition)) { std::printf("line %d: %s\n", __LINE__, #condition); ++failures; }

static V path(V allowed, int arch, Dtype dtype = Dtype::bfloat16, int64_t tokens = 4096, int64_t depth = 768,
              int64_t inner = 3072, bool aligned = true) {
    return gelu_ffn_path(allowed, arch, dtype, tokens, depth, inner, aligned);
}

int main(int count, char** arguments) {
    if (count > 1) {  // the tile of each number of tokens that is given
        for (int i = 1; i < count; ++i)
            std::puts(fused_forward_tile(std::atoll(arguments[i]), 3072, 132) == FusedTile::large ? "128" : "64");
        return 0;
    }
    // The best of what is allowed and what the device can.
    for (int arch : {80, 86, 89, 90, 100, 120}) {
        EXPECT(path(V::portable, arch) == V::portable);
        EXPECT(path(V::sm80, arch) == V::sm80);
        EXPECT(path(V::sm90, arch) == (arch == 90 ? V::sm90 : V::sm80));
    }
    EXPECT(path(V::sm90, 75) == V::portable);
    // Dtypes, sizes and addresses that the tensor cores' copies do not take.
    for (V allowed : {V::sm80, V::sm90}) {
        EXPECT(path(allowed, 90, Dtype::float16) == allowed);
        EXPECT(path(allowed, 90, Dtype::float32) == V::portable);
        for (int64_t tokens : {0, 1, 63}) EXPECT(path(allowed, 90, Dtype::bfloat16, tokens) == V::portable);
        for (int64_t tokens : {64, 65, 65536, 2147483519})
            EXPECT(path(allowed, 90, Dtype::bfloat16, tokens) == allowed);
        EXPECT(path(allowed, 90, Dtype::bfloat16, 2147483520) == V::portable);
        EXPECT(path(allowed, 90, Dtype::bfloat16, 64, 0) == V::portable);
        EXPECT(path(allowed, 90, Dtype::bfloat16, 64, 767) == V::portable);
        EXPECT(path(allowed, 90, Dtype::bfloat16, 64, 776) == allowed);
        EXPECT(path(allowed, 90, Dtype::bfloat16, 64, 768, 3073) == V::portable);
        EXPECT(path(allowed, 90, Dtype::bfloat16, 64, 768, 8) == allowed);
        EXPECT(path(allowed, 90, Dtype::bfloat16, 64, 768, 3072, false) == V::portable);
    }
    // The tile whose largest share of a multiprocessor is less work.
    EXPECT(fused_forward_tile(64, 3072, 132) == FusedTile::small);
    EXPECT(fused_forward_tile(100, 3072, 132) == FusedTile::small);
    EXPECT(fused_forward_tile(5 * 128, 3072, 132) == FusedTile::large);      // 120 tiles, or 240 halves
    EXPECT(fused_forward_tile(5 * 128 + 1, 3072, 132) == FusedTile::small);  // 144, or 264: two halves each
    EXPECT(fused_forward_tile(1024, 3072, 132) == FusedTile::small);         // 192, two each, or 384, three
    EXPECT(fused_forward_tile(4096, 3072, 132) == FusedTile::large);
    EXPECT(fused_forward_tile(65536, 4096, 132) == FusedTile::large);
    EXPECT(fused_forward_tile(2147483519, 8, 132) == FusedTile::large);
    // Partial sums: a row for each row of tiles, or one for each of its four warps.
    for (int64_t tokens : {64, 128, 129, 2147483519}) {
        const int64_t tiles = (tokens + 127) / 128;
        EXPECT(fused_partials(V::sm80, tokens, 3072).rows == tiles);
        EXPECT(fused_partials(V::sm90, tokens, 3072).rows == 4 * tiles);
    }
    EXPECT(fused_partials(V::sm90, 64, 136).pitch == 256 && fused_partials(V::sm90, 64, 136).columns == 136);
    EXPECT(fused_partials(V::sm80, 64, 128).pitch == 128);
    EXPECT(sum_blocks(0) == 0 && sum_blocks(1) == 1 && sum_blocks(32) == 1 && sum_blocks(33) == 2);
    return failures;
}
"""


pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or build.cuda_include() is None, reason="needs g++ and the CUDA headers"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planning")
    source, program = folder / "planning.cpp", folder / "planning"
    source.write_text(PROGRAM)
    includes = [f"-I{path}" for path in (build.ROOT, build.cuda_include())]
    subprocess.run(["g++", "-std=c++17", "-Wall", "-Werror", *includes, source, "-o", program], check=True)
    return program


def test_planning(program: Path) -> None:
    ran = subprocess.run([program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


def test_the_tile_that_is_counted_is_the_one_that_is_planned(program: Path) -> None:
    tokens = [64, 127, 640, 641, *range(1024, 16385, 1024)]
    ran = subprocess.run([program, *map(str, tokens)], capture_output=True, text=True, check=True)
    assert [count.fused_tile(t, 3072)[0] for t in tokens] == list(map(int, ran.stdout.split()))


def test_a_product_is_counted_by_whole_tiles() -> None:
    """192 tiles on 132 multiprocessors: the busiest has two, so that the products of the others' 72 wait."""
    product = count.Product(1024, 3072, 768, (128, 128), reads=1, writes=2)
    assert product.tiles == 192
    assert product.waves == 192 / 264
    counts = product.by_arithmetic()
    assert counts["tensor_flops"] == 2 * 1024 * 3072 * 768
    assert counts["distinct_load_sectors"] * 16 == (1024 + 3072) * 768 + 1024 * 3072
    assert counts["distinct_store_sectors"] * 16 == 2 * 1024 * 3072
    # A depth of 16 of a tile: 8 KiB written, 4 KiB of x and twice 4 KiB of w read; three matrices in and out again.
    assert counts["bulk_wavefronts"] == 192 * (48 * (64 + 32 + 64) + 3 * 2 * 256)
    whole, waiting = count.units(counts, None), count.units(counts, None, product.waves)
    assert waiting["tensor cores"] == pytest.approx(whole["tensor cores"] * 264 / 192)
    assert waiting["memory H100"] == whole["memory H100"]
    ragged = count.Product(1025, 3072, 768, (128, 128))
    assert ragged.by_arithmetic()["tensor_flops"] == 2 * 1152 * 3072 * 768
