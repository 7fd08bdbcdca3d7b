// The products of one strip of weight rows with one panel of tokens on tiles: the micro-kernels of tile_products.h, which
// says what is multiplied and in what order it is summed. A block is the sums, 32 x 32 float32 in four tiles.
#pragma once
#include "csrc/cpu/tile_operands.h"

namespace rk::cpu::RK_CPU_ISA {

constexpr int64_t kChunkSteps = 12;  // steps along K that w0 x0 is summed over in tiles
template <int kParts>
constexpr int64_t kPieceSteps = kParts == 1 ? 4 : 2;  // that few tokens are multiplied with at a time
constexpr int kBlockFloats = 4 * kTileFloats;

// A block's sums: [2 tiles of weight rows][2 tiles of tokens][16 rows][16 tokens].
RK_INLINE float* block_row(float* block, int row, int token_half) {
    return block + (row / kTileSide * 2 + token_half) * kTileFloats + row % kTileSide * kTileSide;
}
RK_INLINE const float* block_row(const float* block, int row, int token_half) {
    return block_row(const_cast<float*>(block), row, token_half);
}

// Memory that the epilogue of a block will write (or read), asked for while the block is multiplied: rows of up to 128
// bytes; and rows as far from these as `others` says, unless that is 0.
struct WriteAhead {
    char* at = nullptr;
    int64_t stride = 0;
    int rows = 0;
    int64_t others[2] = {0, 0};
    RK_INLINE void step(int count) {
        for (; count > 0 && rows > 0; --count, --rows, at += stride) {
            ask(at);
            if (others[0] != 0) ask(at + others[0]), ask(at + others[1]);
        }
    }
    RK_INLINE static void ask(char* row) {
        __builtin_prefetch(row, 1);
        __builtin_prefetch(row + 64, 1);
    }
};

// ---- micro-kernels ----
// Tiles 0 to 3: sums; 4, 5: weights; 6, 7: tokens. kHalves: tiles of tokens that are multiplied, 1 or 2.

template <int kHalves>
RK_INLINE void zero_sums() {
    tile_zero<0>(), tile_zero<2>();
    if constexpr (kHalves == 2) tile_zero<1>(), tile_zero<3>();
}
template <int kHalves>
RK_INLINE void load_sums(const float* block) {
    tile_load<0>(block), tile_load<2>(block + 2 * kTileFloats);
    if constexpr (kHalves == 2) tile_load<1>(block + kTileFloats), tile_load<3>(block + 3 * kTileFloats);
}
template <int kHalves>
RK_INLINE void store_sums(float* block) {
    tile_store<0>(block), tile_store<2>(block + 2 * kTileFloats);
    if constexpr (kHalves == 2) tile_store<1>(block + kTileFloats), tile_store<3>(block + 3 * kTileFloats);
}
template <int kHalves>
RK_INLINE void add_sums(float* block) {
    alignas(64) float sums[kBlockFloats];
    store_sums<kHalves>(sums);
    for (int i = 0; i < kBlockFloats; i += kLanes)
        if (kHalves == 2 || i / kTileFloats % 2 == 0) store(block + i, load(block + i) + load(sums + i));
}
RK_INLINE void load_weights(const char* w) {
    tile_load<4>(w), tile_load<5>(w + kTileBytes);
}
template <int kHalves>
RK_INLINE void load_tokens(const char* x) {
    tile_load<6>(x);
    if constexpr (kHalves == 2) tile_load<7>(x + kTileBytes);
}
template <int kHalves>
RK_INLINE void multiply_loaded() {
    tile_dot_bf16<0, 4, 6>();
    if constexpr (kHalves == 2) tile_dot_bf16<1, 4, 7>();
    tile_dot_bf16<2, 5, 6>();
    if constexpr (kHalves == 2) tile_dot_bf16<3, 5, 7>();
}

// block (+)= w0 x0 over some steps, the sums in tiles all the way; the tokens' steps are x_step bytes apart, their tiles'
// rows x_row. Each step asks for some lines of what is `ahead`.
template <int kHalves, class Ahead>
inline void multiply_once(const char* w, const char* x, int64_t x_step, int64_t x_row, int64_t steps,
                          float* block, bool first, Ahead* ahead, int lines) {
    first ? zero_sums<kHalves>() : load_sums<kHalves>(block);
    for (int64_t i = 0; i < steps; ++i, w += kPairBytes, x += x_step) {
        ahead->step(lines);
        tile_load_once<4>(w);
        tile_load<6>(x, x_row);
        tile_dot_bf16<0, 4, 6>();
        if constexpr (kHalves == 2) {
            tile_load<7>(x + kTileBytes);
            tile_dot_bf16<1, 4, 7>();
        }
        tile_load_once<5>(w + kTileBytes);
        tile_dot_bf16<2, 5, 6>();
        if constexpr (kHalves == 2) tile_dot_bf16<3, 5, 7>();
    }
    store_sums<kHalves>(block);
}

// Some steps of a strip's slab and of a panel's: where their first parts are, and how far the next parts.
struct StepsOf {
    const char *w, *x;
    int64_t w_part, x_part, steps;
};

// Adds the products of the steps but the largest to the sums in tiles.
template <int kParts, int kHalves, class Ahead>
RK_INLINE void multiply_small(const StepsOf& of, Ahead* ahead, int lines) {
    const char *w = of.w, *x = of.x;
    for (int64_t i = 0; i < of.steps; ++i, w += kPairBytes, x += kPairBytes) {
        ahead->step(lines);
        if constexpr (kParts == 3) {
            load_weights(w + 2 * of.w_part), load_tokens<kHalves>(x);
            multiply_loaded<kHalves>();
            load_weights(w + of.w_part);
        } else {
            load_weights(w + of.w_part), load_tokens<kHalves>(x);
        }
        multiply_loaded<kHalves>();
        load_tokens<kHalves>(x + of.x_part);
        if constexpr (kParts == 3) multiply_loaded<kHalves>();
        load_weights(w);
        multiply_loaded<kHalves>();
        if constexpr (kParts == 3) {
            load_tokens<kHalves>(x + 2 * of.x_part);
            multiply_loaded<kHalves>();
        }
    }
}
// The largest.
template <int kHalves>
RK_INLINE void multiply_large(const char* w, const char* x, int64_t steps) {
    for (int64_t i = 0; i < steps; ++i, w += kPairBytes, x += kPairBytes) {
        load_weights(w), load_tokens<kHalves>(x);
        multiply_loaded<kHalves>();
    }
}

// block (+)= the products of a slab.
template <int kParts, int kHalves>
inline void multiply_slab(const StepsOf& slab, float* block, bool first, WriteAhead ahead) {
    zero_sums<kHalves>();
    multiply_small<kParts, kHalves>(slab, &ahead, 2);
    first ? store_sums<kHalves>(block) : add_sums<kHalves>(block);
    for (int64_t chunk = 0; chunk < slab.steps; chunk += kChunkSteps) {
        zero_sums<kHalves>();
        multiply_large<kHalves>(slab.w + chunk * kPairBytes, slab.x + chunk * kPairBytes,
                                min64(kChunkSteps, slab.steps - chunk));
        add_sums<kHalves>(block);
    }
}

// The sums of a slab that is multiplied piece by piece: of the small products, and of each chunk.
template <int kParts>
struct PieceSums {
    static constexpr int kChunks = int(ceil_div(kSlabSteps<kParts>, kChunkSteps));
    alignas(64) float small[kBlockFloats], large[kChunks][kBlockFloats];
};
static_assert(kChunkSteps % kPieceSteps<2> == 0 && kChunkSteps % kPieceSteps<3> == 0,
              "a piece is of one chunk");

// Adds a piece, whose first step is `step` of the slab's, to the slab's sums; `left`: steps from there to its end. x_row:
// bytes of a row of the tokens' tiles (kHalves = 1). Each step asks for `lines` lines of what is ahead.
template <int kParts, int kHalves, class Ahead>
inline void multiply_piece(const StepsOf& piece, int64_t x_row, int64_t step, int64_t left,
                           PieceSums<kParts>* sums, Ahead* ahead, int lines) {
    float* const large = sums->large[step / kChunkSteps];
    const bool first = step % kChunkSteps == 0;
    if constexpr (kHalves == 2) {
        step == 0 ? zero_sums<2>() : load_sums<2>(sums->small);
        multiply_small<kParts, 2>(piece, ahead, lines);
        store_sums<2>(sums->small);
        first ? zero_sums<2>() : load_sums<2>(large);
        multiply_large<2>(piece.w, piece.x, piece.steps);
        store_sums<2>(large);
    } else {
        // Half of the tiles are free: for the sums of the large products (1, 3), and a second part of the tokens (7).
        // So the sums stay where they are from piece to piece.
        if (step == 0) tile_zero<0>(), tile_zero<2>();
        if (first) tile_zero<1>(), tile_zero<3>();
        const char *w = piece.w, *x = piece.x;
        for (int64_t i = 0; i < piece.steps; ++i, w += kPairBytes, x += kTileSide * x_row) {
            tile_load<6>(x, x_row), tile_load<7>(x + piece.x_part, x_row);
            if constexpr (kParts == 3) {
                load_weights(w + 2 * piece.w_part);
                tile_dot_bf16<0, 4, 6>(), tile_dot_bf16<2, 5, 6>();
                ahead->step(lines / 2);
            }
            load_weights(w + piece.w_part);
            tile_dot_bf16<0, 4, 6>(), tile_dot_bf16<2, 5, 6>();
            if constexpr (kParts == 3) tile_dot_bf16<0, 4, 7>(), tile_dot_bf16<2, 5, 7>();
            ahead->step(kParts == 3 ? lines / 2 : lines);
            load_weights(w);
            tile_dot_bf16<0, 4, 7>(), tile_dot_bf16<2, 5, 7>();
            if constexpr (kParts == 3) {
                tile_load<7>(x + 2 * piece.x_part, x_row);
                tile_dot_bf16<0, 4, 7>(), tile_dot_bf16<2, 5, 7>();
            }
            tile_dot_bf16<1, 4, 6>(), tile_dot_bf16<3, 5, 6>();
        }
        if ((step + piece.steps) % kChunkSteps == 0 || piece.steps == left)
            tile_store<1>(large), tile_store<3>(large + 2 * kTileFloats);
        if (piece.steps == left) tile_store<0>(sums->small), tile_store<2>(sums->small + 2 * kTileFloats);
    }
}

// block (+)= sums, in the order of multiply_slab.
template <int kParts, int kHalves>
inline void add_pieces(const PieceSums<kParts>& sums, int64_t steps, float* block, bool first) {
    for (int i = 0; i < kBlockFloats; i += kLanes) {
        if (kHalves == 1 && i / kTileFloats % 2 == 1) continue;
        vf32 sum = load(sums.small + i);
        if (!first) sum = load(block + i) + sum;
        for (int64_t chunk = 0; chunk * kChunkSteps < steps; ++chunk) sum += load(sums.large[chunk] + i);
        store(block + i, sum);
    }
}

}  // namespace rk::cpu::RK_CPU_ISA
