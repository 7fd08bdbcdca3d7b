// The matrix products inside attention: small enough that both operands are in cache, so nothing is packed
// beyond what the caller did. C[rows, columns] = A B with rows of B and C in whole vectors; an element of A
// is broadcast. A tile of C stays in registers over the whole depth: with 32 registers 6 x 4, 8 x 3 or 12 x 2
// vectors (24 accumulators, so 24 multiply-adds for 10 to 14 loads), with 16 registers 4 x 3 or 6 x 2.
#pragma once
#include "csrc/cpu/simd.h"

namespace rk::cpu::RK_CPU_ISA {

#if defined(RK_AVX512)
constexpr int kTileRegisters = 24;
constexpr int kMaxTileVectors = 4;
#else
constexpr int kTileRegisters = 12;
constexpr int kMaxTileVectors = 3;
#endif
constexpr int kMaxTileRows = 12;

#define RK_LAMBDA_INLINE __attribute__((always_inline))

// C starts as zero, as itself, or as itself with row r multiplied by row_scale[r].
enum class Start { zero, accumulate, scale };

struct SmallGemm {
    const float* a;  // element (r, k): a[r * lda + k], or a[k * lda + r] when transposed
    int64_t lda;
    const float* b;  // element (k, n): b[k * ldb + n]
    int64_t ldb;
    float* c;  // element (r, n): c[r * ldc + n]
    int64_t ldc;
    int64_t depth;
    const float* row_scale;
    Start start;
};

template <bool kTransposedA, int kRows, int kVectors>
void gemm_tile(const SmallGemm& g, const float* a, const float* b, float* c, const float* row_scale) {
    vf32 sum[kRows][kVectors];
    const int64_t lda = g.lda, ldb = g.ldb, ldc = g.ldc, depth = g.depth;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < kVectors; ++n) sum[r][n] = vf32{};
    // row r of A is third[r / 3] + (r % 3) * lda: few pointers, and addresses that one instruction can hold
    constexpr int kPointers = (kRows + 2) / 3;
    const float* third[kPointers];
#pragma GCC unroll 8
    for (int i = 0; i < kPointers; ++i) third[i] = kTransposedA ? a : a + 3 * i * lda;
    for (int64_t k = 0; k < depth; ++k) {
        vf32 row[kVectors];
#pragma GCC unroll 4
        for (int n = 0; n < kVectors; ++n) row[n] = load(b + n * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
            const vf32 x = set1(kTransposedA ? third[0][r] : third[r / 3][(r % 3) * lda]);
#pragma GCC unroll 4
            for (int n = 0; n < kVectors; ++n) sum[r][n] = fma(x, row[n], sum[r][n]);
        }
        b += ldb;
#pragma GCC unroll 8
        for (int i = 0; i < kPointers; ++i) third[i] += kTransposedA ? lda : 1;
    }
    const auto for_tile = [&](const auto& f) RK_LAMBDA_INLINE {
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
            for (int n = 0; n < kVectors; ++n) f(r, n, c + r * ldc + n * kLanes);
    };
    if (g.start == Start::accumulate)
        for_tile([&](int r, int n, float* to) RK_LAMBDA_INLINE { sum[r][n] += load(to); });
    if (g.start == Start::scale)
        for_tile([&](int r, int n, float* to)
                     RK_LAMBDA_INLINE { sum[r][n] = fma(load(to), set1(row_scale[r]), sum[r][n]); });
    for_tile([&](int r, int n, float* to) RK_LAMBDA_INLINE { store(to, sum[r][n]); });
}

template <bool kTransposedA, int kVectors>
void gemm_columns(const SmallGemm& g, int64_t rows, int64_t column) {
    constexpr int kMost = kTileRegisters / kVectors < kMaxTileRows ? kTileRegisters / kVectors : kMaxTileRows;
    const int64_t tiles = (rows + kMost - 1) / kMost;
    const float* b = g.b + column;
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t r0 = rows * tile / tiles, r1 = rows * (tile + 1) / tiles;
        const float* a = g.a + (kTransposedA ? r0 : r0 * g.lda);
        float* c = g.c + r0 * g.ldc + column;
        const float* row_scale = g.row_scale + r0;
#define RK_TILE(n)                                                                      \
    case n:                                                                             \
        gemm_tile<kTransposedA, (n <= kMost ? n : 1), kVectors>(g, a, b, c, row_scale); \
        break;
        switch (r1 - r0) {
            RK_TILE(1)
            RK_TILE(2)
            RK_TILE(3)
            RK_TILE(4)
            RK_TILE(5)
            RK_TILE(6)
            RK_TILE(7)
            RK_TILE(8)
            RK_TILE(9)
            RK_TILE(10)
            RK_TILE(11)
            RK_TILE(12)
        }
#undef RK_TILE
    }
}

// A sum in one chain of multiply-adds is accurate enough; where multiplication and addition round separately
// the chain is cut, and the partial sums are added.
#if defined(RK_AVX512) || defined(RK_AVX2)
constexpr int64_t kDepthChunk = int64_t{1} << 40;
#else
constexpr int64_t kDepthChunk = 16;
#endif

// columns: a multiple of kLanes.
template <bool kTransposedA>
void small_gemm(const SmallGemm& whole, int64_t rows, int64_t columns) {
    for (int64_t k = 0; k < whole.depth; k += kDepthChunk) {
        SmallGemm g = whole;
        g.a += kTransposedA ? k * g.lda : k;
        g.b += k * g.ldb;
        g.depth = whole.depth - k < kDepthChunk ? whole.depth - k : kDepthChunk;
        g.start = k == 0 ? whole.start : Start::accumulate;
        int64_t left = columns / kLanes;
        for (int64_t column = 0; left > 0;) {
            int vectors;
            if (kMaxTileVectors == 4)
                vectors = left <= 4 ? static_cast<int>(left) : left == 5 || left == 6 ? 3 : 4;
            else
                vectors = left == 3 ? 3 : left >= 2 ? 2 : 1;
            switch (vectors) {
                case 1:
                    gemm_columns<kTransposedA, 1>(g, rows, column);
                    break;
                case 2:
                    gemm_columns<kTransposedA, 2>(g, rows, column);
                    break;
                case 3:
                    gemm_columns<kTransposedA, 3>(g, rows, column);
                    break;
                case 4:
                    gemm_columns<kTransposedA, (kMaxTileVectors == 4 ? 4 : 1)>(g, rows, column);
                    break;
            }
            column += vectors * kLanes;
            left -= vectors;
        }
    }
}

}  // namespace rk::cpu::RK_CPU_ISA
