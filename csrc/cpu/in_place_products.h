// C^T = W X^T: the encoder's products with weights read where they lie, row-major [N, K], never packed or copied as a
// whole.
//
// The weight is the left operand: an element of it is broadcast. Activations are the right one, packed with tokens in
// the vector lanes: panels of kColumns tokens, [K words][kColumns], the last one narrower by whole vectors. A tile of
// C^T, kRows weight rows by up to kColumns tokens, stays in registers, as in gemm.h.
//
//   task        a run of row panels x a block of token panels (as many as half of the second-level cache holds)
//   row panel   kRows rows of W, taken kChunk words along K at a time into 7 KB of first-level cache: broadcasts from
//               there have constant addresses, and rows that lie a multiple of 4 KB apart (K = 3072) do not fight for
//               one set of that cache. A bfloat16 weight is widened on the way where the processor has no vdpbf16ps.
//   few tokens  (one token panel) each weight is read once and that takes the time: the lines that come next are asked
//               for while this chunk is multiplied.
//
// Every kChunk words the sums in registers are added to the tile. So each element of C is summed in an order that
// depends on K alone: not on the number of tokens, their place, or the threads.
//
// What an element costs: a broadcast for each row and each vector of tokens: 2 flops a lane and kLanes tokens for 4
// bytes of W. At 16 tokens or fewer a core takes in about 7 bytes of W a cycle at most, more than memory brings.
#pragma once
#include "csrc/cpu/encoder.h"
#include "csrc/cpu/gemm.h"

namespace rk::cpu::RK_CPU_ISA {

constexpr int64_t kStepTokens = kColumns * (1024 / kColumns);  // tokens of one product

// ---- the right operand ----

// Tokens packed as panels of kColumns, [k_words][width(panel)] each.
struct TokenPanels {
    int64_t tokens, k_words;
    RK_INLINE int64_t count() const { return ceil_div(tokens, kColumns); }
    RK_INLINE int real(int64_t panel) const { return int(min64(kColumns, tokens - panel * kColumns)); }
    RK_INLINE int vectors(int64_t panel) const { return int(ceil_div(real(panel), kLanes)); }
    RK_INLINE int64_t offset(int64_t panel) const { return panel * kColumns * k_words; }
    RK_INLINE int64_t words() const { return round_up(tokens, kLanes) * k_words; }
};

struct RightOperand {
    TokenPanels panels;
    const float* words;
};

// Packs x: [tokens, K], into the calling thread's memory, where it stays until the next call.
template <class T>
inline RightOperand pack_tokens(const T* x, int64_t tokens, int64_t k_size) {
    const TokenPanels panels{tokens, words_of<T>(k_size)};
    float* const packed = thread_scratch(Use::right_operand).words(panels.words());
    const int64_t vectors = ceil_div(tokens, kLanes);
    parallel_for(0, vectors, 1 + 65536 / (kLanes * k_size), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t panel = i / kVectors, first = i * kLanes;
            pack_along_k(x + first * k_size, k_size, int(min64(kLanes, tokens - first)), k_size,
                         packed + panels.offset(panel) + i % kVectors * kLanes,
                         panels.vectors(panel) * kLanes, kLanes);
        }
    });
    return {panels, packed};
}

// ---- the left operand ----

// Rows of up to three weights of one K, cut into panels of at most kRows rows, which start at whole words of a next
// product's K.
template <class T>
struct WeightPanels {
    static constexpr int kUnit = kPerWord<T>;
    const Weight* parts;
    int count;
    int64_t first_panel[4] = {};

    WeightPanels(const Weight* parts_, int count_) : parts(parts_), count(count_) {
        for (int i = 0; i < count; ++i) first_panel[i + 1] = first_panel[i] + panels_of(parts[i]);
    }
    static int64_t panels_of(const Weight& w) { return ceil_div(ceil_div(w.rows, kUnit), kRows / kUnit); }
    int64_t panels() const { return first_panel[count]; }
    // Where rows start when they are cut as equally as can be.
    static int64_t first_row(const Weight& w, int64_t panel) {
        const int64_t panels = panels_of(w), units = ceil_div(w.rows, kUnit);
        return min64(w.rows, (units / panels * panel + min64(panel, units % panels)) * kUnit);
    }
};

struct RowPanel {
    int part;
    int64_t row;
    int height;
};
template <class T>
RK_INLINE RowPanel row_panel(const WeightPanels<T>& panels, int64_t i) {
    int part = 0;
    while (i >= panels.first_panel[part + 1]) ++part;
    const Weight& w = panels.parts[part];
    const int64_t panel = i - panels.first_panel[part], row = panels.first_row(w, panel);
    return {part, row, int(panels.first_row(w, panel + 1) - row)};
}

// Words [k, k + count) of some rows: out[row][kChunk].
template <class T>
RK_INLINE void copy_rows_chunk(const Weight& w, int64_t row, int rows, int64_t k, int64_t count, float* out) {
    const T* in = static_cast<const T*>(w.data) + row * w.row_stride + k * kPerWord<T>;
    const int64_t elements = min64(count * kPerWord<T>, w.columns - k * kPerWord<T>);
    for (int r = 0; r < rows; ++r, in += w.row_stride, out += kChunk)
        for (int64_t i = 0; i < count; i += kLanes)
            store(out + i, load_words(in + i * kPerWord<T>, elements - i * kPerWord<T>));
}

// ---- the product ----

// tile[i][j] (+)= sum over k of a[i][k] b[k][j], j < kWidth * kLanes. ahead: what to ask for meanwhile, kHeight rows
// `ahead_stride` bytes apart; or null.
template <class T, int kHeight, int kWidth>
__attribute__((noinline)) void multiply_rows_tile(int64_t k_words, const float* a, const float* b,
                                                  float* tile, bool add, const char* ahead,
                                                  int64_t ahead_stride) {
    vf32 c[kHeight][kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kHeight; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < kWidth; ++v) c[i][v] = zero();
    const auto step = [&]() __attribute__((always_inline)) {
        vf32 bk[kWidth];
#pragma GCC unroll 4
        for (int v = 0; v < kWidth; ++v) bk[v] = load(b + v * kLanes);
#pragma GCC unroll 16
        for (int i = 0; i < kHeight; ++i) {
            const vf32 ak = set1(a[i * kChunk]);
#pragma GCC unroll 4
            for (int v = 0; v < kWidth; ++v) c[i][v] = multiply_add<T>(ak, bk[v], c[i][v]);
        }
        ++a, b += kWidth * kLanes;
    };
    if (ahead == nullptr) {
        for (int64_t k = 0; k < k_words; ++k) step();
    } else {
        constexpr int64_t kLine = 16;  // words
        for (int64_t k = 0; k < k_words; k += kLine, ahead += 64) {
            const char* line = ahead;
            for (int i = 0; i < kHeight; ++i, line += ahead_stride) __builtin_prefetch(line, 0, 2);
            for (int64_t j = 0; j < min64(kLine, k_words - k); ++j) step();
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kHeight; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < kWidth; ++v) {
            float* to = tile + i * kColumns + v * kLanes;
            store(to, add ? load(to) + c[i][v] : c[i][v]);
        }
}

struct TileCall {
    int64_t k_words;
    const float *a, *b;
    float* tile;
    bool add;
    const char* ahead;
    int64_t ahead_stride;
};
template <class T, int kHeight = kRows>
RK_INLINE void multiply_rows_tile_of(int height, int vectors, const TileCall& t) {
    if (height == kHeight) {
        if (vectors == kVectors)
            return multiply_rows_tile<T, kHeight, kVectors>(t.k_words, t.a, t.b, t.tile, t.add, t.ahead,
                                                            t.ahead_stride);
        return multiply_rows_tile<T, kHeight, 1>(t.k_words, t.a, t.b, t.tile, t.add, t.ahead, t.ahead_stride);
    }
    if constexpr (kHeight > 1) multiply_rows_tile_of<T, kHeight - 1>(height, vectors, t);
}
static_assert(kVectors == 2, "a token panel has one vector or two");

// For every tile: epilogue(part, row, token, rows, tokens, tile), tile: [rows][kColumns], float32.
template <class T, class Epilogue>
inline void multiply_in_place(const Weight* parts, int part_count, const RightOperand& x,
                              const Epilogue& epilogue) {
    constexpr int64_t kTile = kRows * kColumns;
    const WeightPanels<T> rows(parts, part_count);
    const int64_t k_words = x.panels.k_words, token_panels = x.panels.count(), threads = num_threads();
    if (token_panels == 0 || rows.panels() == 0) return;
    // A block of tokens stays in the second-level cache, with kDepth words along K.
    const int64_t k_blocks = token_panels == 1 ? 1 : ceil_div(k_words, kDepth);
    const int64_t depth = round_up(ceil_div(k_words, k_blocks), kChunk);
    const int64_t fitting = max64(1, kBlockWords / (kColumns * depth));
    const int64_t blocks = ceil_div(token_panels, fitting);
    const int64_t runs =
        max64(1, min64(rows.panels(), max64(ceil_div(8 * threads, blocks), rows.panels() / 16)));
    parallel_tasks(blocks * runs, threads, [&](int64_t task) {
        const int64_t block = task / runs, run = task % runs;
        const int64_t left = token_panels * block / blocks, right = token_panels * (block + 1) / blocks;
        const int64_t top = rows.panels() * run / runs, bottom = rows.panels() * (run + 1) / runs;
        const int64_t kept = (k_blocks == 1 ? 1 : bottom - top) * (right - left);
        float* const a = thread_scratch(Use::column_block).words(kRows * kChunk + kept * kTile);
        float* const tiles = a + kRows * kChunk;
        for (int64_t k_block = 0; k_block < k_blocks; ++k_block)
            for (int64_t i = top; i < bottom; ++i) {
                const RowPanel panel = row_panel(rows, i);
                const Weight& w = parts[panel.part];
                float* const row_tiles = tiles + (k_blocks == 1 ? 0 : (i - top) * (right - left) * kTile);
                const int64_t k_end = min64(k_words, (k_block + 1) * depth);
                for (int64_t k = k_block * depth; k < k_end; k += kChunk) {
                    const int64_t here = min64(kChunk, k_end - k);
                    copy_rows_chunk<T>(w, panel.row, panel.height, k, here, a);
                    // The next chunk of these rows, or the first of the next.
                    const bool more = k + kChunk < k_end;
                    const T* ahead = static_cast<const T*>(w.data) +
                                     (panel.row + (more ? 0 : panel.height)) * w.row_stride +
                                     (more ? (k + kChunk) * kPerWord<T> : 0);
                    for (int64_t j = left; j < right; ++j)
                        multiply_rows_tile_of<T>(
                            panel.height, x.panels.vectors(j),
                            {here, a, x.words + x.panels.offset(j) + k * x.panels.vectors(j) * kLanes,
                             row_tiles + (j - left) * kTile, k > 0,
                             j == left ? reinterpret_cast<const char*>(ahead) : nullptr,
                             w.row_stride * int64_t(sizeof(T))});
                }
                if (k_block == k_blocks - 1)
                    for (int64_t j = left; j < right; ++j)
                        epilogue(panel.part, panel.row, j * kColumns, panel.height, x.panels.real(j),
                                 static_cast<const float*>(row_tiles + (j - left) * kTile));
            }
    });
}

// ---- what becomes of a tile ----

// out[token][row] = tile[row][token] + bias[row]
template <class T>
RK_INLINE void store_transposed(const float* tile, int rows, int tokens, const T* bias, T* out,
                                int64_t out_stride) {
    const vf32 b = bias == nullptr ? zero() : load_some(bias, rows);
    for (int j = 0; j < tokens; j += kLanes) {
        vf32 block[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) block[i] = i < rows ? load(tile + i * kColumns + j) : zero();
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i)
            if (j + i < tokens) store_some(out + (j + i) * out_stride, block[i] + b, rows);
    }
}

// The rows of a tile, [rows][kColumns], as words along K of a right operand: out[word][vectors * kLanes].
template <class T>
RK_INLINE void store_words(const float* tile, int rows, int vectors, float* out) {
    for (int i = 0; i < rows; i += kPerWord<T>)
        for (int v = 0; v < vectors; ++v, out += kLanes) {
            vf32 words = load(tile + i * kColumns + v * kLanes);
            if constexpr (kPerWord<T> == 2) {
                const vf32 odd = i + 1 < rows ? load(tile + (i + 1) * kColumns + v * kLanes) : zero();
                words = as_float((bits(round_to_bf16(words)) >> 16) | bits(round_to_bf16(odd)));
            }
            store(out, words);
        }
}

// f(first, count) for steps of tokens.
template <class F>
inline void for_token_steps(int64_t tokens, const F& f) {
    for (int64_t first = 0; first < tokens; first += kStepTokens)
        f(first, min64(kStepTokens, tokens - first));
}

// The products of encoder_layers.h.
template <class T>
struct InPlaceProducts {
    using Element = T;
    using Weight = rk::cpu::Weight;

    // out[r] = x[r] (W_0 | W_1 | ...)^T + biases, the parts side by side
    static void project(const Weight* parts, const void* const* biases, int count, const T* x, int64_t rows,
                        T* out) {
        int64_t columns = 0, offset[3];
        for (int i = 0; i < count; ++i) offset[i] = columns, columns += parts[i].rows;
        for_token_steps(rows, [&](int64_t first, int64_t tokens) {
            const int64_t k_size = parts[0].columns;
            multiply_in_place<T>(
                parts, count, pack_tokens(x + first * k_size, tokens, k_size),
                [&](int part, int64_t row, int64_t token, int height, int width, const float* tile) {
                    const T* bias = static_cast<const T*>(biases[part]);
                    store_transposed(tile, height, width, bias == nullptr ? bias : bias + row,
                                     out + (first + token) * columns + offset[part] + row, columns);
                });
        });
    }
    void qkv(const EncoderLayer<Weight>& l, const T* x, int64_t rows, T* out) const {
        project(l.qkv, l.qkv_bias, 3, x, rows, out);
    }
    void attention_out(const EncoderLayer<Weight>& l, const T* context, int64_t rows, T* out) const {
        const void* const none = nullptr;
        project(&l.attention_out, &none, 1, context, rows, out);
    }
    template <bool kTanh>
    void feed_forward(const EncoderLayer<Weight>& l, const T* x, int64_t rows, T* out) const {
        const int64_t hidden = l.in.columns, inner = l.in.rows;
        for_token_steps(rows, [&](int64_t first, int64_t tokens) {
            const TokenPanels panels{tokens, words_of<T>(inner)};
            float* const activation = thread_scratch(Use::activation).words(panels.words());
            multiply_in_place<T>(
                &l.in, 1, pack_tokens(x + first * hidden, tokens, hidden),
                [&](int, int64_t row, int64_t token, int height, int, const float* tile) {
                    const int64_t panel = token / kColumns;
                    const int vectors = panels.vectors(panel);
                    const T* bias = static_cast<const T*>(l.in_bias) + row;
                    alignas(64) float activated[kRows * kColumns];
                    for (int i = 0; i < height; ++i)
                        for (int v = 0; v < vectors * kLanes; v += kLanes)
                            store(activated + i * kColumns + v,
                                  gelu<kTanh>(load(tile + i * kColumns + v) + load1(bias + i)));
                    store_words<T>(activated, height, vectors,
                                   activation + panels.offset(panel) + row / kPerWord<T> * vectors * kLanes);
                });
            multiply_in_place<T>(
                &l.out, 1, RightOperand{panels, activation},
                [&](int, int64_t row, int64_t token, int height, int width, const float* tile) {
                    store_transposed<T>(tile, height, width, nullptr, out + (first + token) * hidden + row,
                                        hidden);
                });
        });
    }
};

}  // namespace rk::cpu::RK_CPU_ISA
