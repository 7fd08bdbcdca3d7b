// C = X W^T in integers on tiles (amx.h): rows that are rounded in the call, and a weight that was rounded and laid
// out as tiles beforehand (packed_weight.h, int8-dynamic).
//
//   numbers      x ~ scale (u - zero), u from 0 to 255, one scale and zero for a row; w ~ scale q, q from -127 to 127, one
//                scale for a row of W.  sum x w = scale_x scale_w (sum u q - zero sum q)
//   exact        the sums are of 32 bits and never overflow (K below 66,000): so they are those of every other
//                instruction set, bit for bit, in whatever order.
//   layout       a step is 64 elements along K. W: strips of 32 rows, [strip][step][2 tiles][16 fours along K][16 rows][4].
//                X: groups of 16 rows, [group][step][16 rows][64]. Zeros fill both.
//   a task       a few strips x a range of rows whose tiles stay in the second-level cache. A strip is met by all of the
//                range before the next, so that its tiles (24 KB at K = 768) stay in the first level.
//
// The roof: 16 cycles for 16,384 multiply-adds. A block of 32 x 32 loads four tiles for four products: 2 from the first
// level (8 cycles each), 2 from the second (19): 54 of 64 cycles. Up to 16 rows, reading the weight takes the time.
#pragma once
#include "csrc/cpu/amx.h"
#include "csrc/cpu/int8.h"
#include "csrc/cpu/util.h"

namespace rk::cpu::RK_CPU_ISA {

constexpr int64_t kWholeStep = 64;        // elements along K of a tile
constexpr int64_t kWholeStrip = 32;       // rows of W
constexpr int64_t kRangeBytes = 1 << 20;  // of X, of a task

RK_INLINE int64_t whole_steps(int64_t k) {
    return max64(1, ceil_div(k, kWholeStep));
}
RK_INLINE int64_t whole_padded(int64_t n) {
    return ceil_div(n, kWholeStrip) * kWholeStrip;
}
RK_INLINE int64_t bytes_of_whole_tiles(int64_t n, int64_t k) {
    return whole_padded(n) * whole_steps(k) * kWholeStep;
}
// Where element k of a row of W goes.
RK_INLINE int64_t place_in_strips(int64_t row, int64_t k, int64_t steps) {
    return (row / kWholeStrip * steps + k / kWholeStep) * 2 * kTileBytes +
           row % kWholeStrip / kTileSide * kTileBytes + k % kWholeStep / 4 * kTileRowBytes +
           row % kTileSide * 4 + k % 4;
}

// X, rounded: tiles [groups][steps], scale and zero [rows].
struct WholeRows {
    const uint8_t* tiles;
    const float* scale;
    const int32_t* zero;
    int64_t rows;
};
// W: tiles [strips][steps][2], scales and sums of q [N, padded].
struct WholeWeight {
    const char* tiles;
    const float* scales;
    const int32_t* sums;
    int64_t rows, columns;
};

// The numbers of a row, [K], to its place in a group's tiles.
RK_INLINE void put_whole_row(const int32_t* numbers, int64_t k_size, uint8_t* tiles) {
    for (int64_t k = 0; k < k_size; k += kWholeStep, tiles += kTileBytes)
        for (int64_t i = 0; i < min64(kWholeStep, k_size - k); ++i) tiles[i] = uint8_t(numbers[k + i]);
}

// sums[2 tiles of rows of X][2 tiles of rows of W][16][16] of a strip and one or two groups.
template <int kGroups>
RK_INLINE void multiply_whole_block(const char* w, const uint8_t* x, int64_t steps, int32_t* sums) {
    tile_zero<0>(), tile_zero<1>();
    if constexpr (kGroups == 2) tile_zero<2>(), tile_zero<3>();
    const uint8_t* const other = x + steps * kTileBytes;
    for (int64_t i = 0; i < steps; ++i, w += 2 * kTileBytes) {
        if constexpr (kGroups == 1)
            for (int line = 0; line < 2 * kTileBytes; line += 64)
                __builtin_prefetch(w + 8 * kTileBytes + line, 0, 2);
        tile_load<4>(x + i * kTileBytes);
        tile_load<6>(w);
        tile_dot_u8s8<0, 4, 6>();
        tile_load<7>(w + kTileBytes);
        tile_dot_u8s8<1, 4, 7>();
        if constexpr (kGroups == 2) {
            tile_load<5>(other + i * kTileBytes);
            tile_dot_u8s8<2, 5, 6>();
            tile_dot_u8s8<3, 5, 7>();
        }
    }
    tile_store<0>(sums), tile_store<1>(sums + kTileFloats);
    if constexpr (kGroups == 2) tile_store<2>(sums + 2 * kTileFloats), tile_store<3>(sums + 3 * kTileFloats);
}

// Scales 16 rows of X by up to 32 of W, and gives them to an epilogue of gemm.h in pieces of kColumns.
template <class Epilogue>
RK_INLINE void finish_whole_block(const WholeWeight& w, const WholeRows& x, int64_t row, int64_t column,
                                  const int32_t* sums, const Epilogue& epilogue) {
    const int height = int(min64(kTileSide, x.rows - row));
    for (int64_t from = 0; from < kWholeStrip && column + from < w.rows; from += kColumns) {
        alignas(64) float scaled[kTileSide * kColumns];
        for (int v = 0; v < kColumns; v += kLanes) {
            const int64_t at = from + v;  // in the strip
            const vf32 scale = load(w.scales + column + at);
            const vi32 sum = (vi32)load(reinterpret_cast<const float*>(w.sums) + column + at);
            const int32_t* tile = sums + at / kTileSide * kTileFloats + at % kTileSide;
            for (int i = 0; i < height; ++i, tile += kTileSide) {
                const vi32 whole = (vi32)load(reinterpret_cast<const float*>(tile));
                store(scaled + i * kColumns + v,
                      scale_whole(whole, sum, x.zero[row + i], scale, x.scale[row + i]));
            }
        }
        epilogue(row, column + from, height, int(min64(kColumns, w.rows - column - from)),
                 static_cast<const float*>(scaled));
    }
}

// C = X W^T; epilogue as in gemm.h, of up to 16 rows.
template <class Epilogue>
inline void multiply_whole_tiles(const WholeWeight& w, const WholeRows& x, const Epilogue& epilogue) {
    const int64_t steps = whole_steps(w.columns), strips = ceil_div(w.rows, kWholeStrip);
    const int64_t pairs = ceil_div(x.rows, 2 * kTileSide), threads = num_threads();
    if (strips == 0 || pairs == 0) return;
    const int64_t fitting = max64(1, kRangeBytes / (2 * steps * kTileBytes));  // pairs of groups
    const int64_t most = max64(1, min64(8, strips / (8 * threads))), blocks = ceil_div(strips, most);
    const int64_t ranges = min64(pairs, max64(ceil_div(pairs, fitting), ceil_div(2 * threads, blocks)));
    parallel_tasks(blocks * ranges, threads, [&](int64_t task) {
        const int64_t range = task / blocks, block = task % blocks;
        const TileUse use;
        // A block is finished after the tiles of the next: what they store can be read again only after a while.
        alignas(64) int32_t sums[2][4 * kTileFloats];
        int64_t last_row = -1, last_column = 0;
        int turn = 0;
        const auto finish_last = [&] {
            if (last_row < 0) return;
            const int32_t* const last = sums[1 - turn];
            finish_whole_block(w, x, last_row, last_column, last, epilogue);
            if (last_row + kTileSide < x.rows)
                finish_whole_block(w, x, last_row + kTileSide, last_column, last + 2 * kTileFloats, epilogue);
        };
        for (int64_t strip = block * most; strip < min64(strips, (block + 1) * most); ++strip) {
            const char* const tiles = w.tiles + strip * steps * 2 * kTileBytes;
            for (int64_t pair = pairs * range / ranges; pair < pairs * (range + 1) / ranges; ++pair) {
                const int64_t row = pair * 2 * kTileSide, column = strip * kWholeStrip;
                const uint8_t* const group = x.tiles + pair * 2 * steps * kTileBytes;
                row + kTileSide < x.rows ? multiply_whole_block<2>(tiles, group, steps, sums[turn])
                                         : multiply_whole_block<1>(tiles, group, steps, sums[turn]);
                finish_last();
                last_row = row, last_column = column, turn = 1 - turn;
            }
        }
        finish_last();
    });
}

}  // namespace rk::cpu::RK_CPU_ISA
