// C^T = W X^T: the encoder's products with weights read where they lie, row-major [N, K], never packed or
// copied as a whole.
//
// The weight is the left operand: an element of it is broadcast. Activations are the right one, packed with
// tokens in the vector lanes: panels of kColumns tokens, [K words][kColumns], the last one narrower by whole
// vectors. A tile of C^T, kRows weight rows by up to kColumns tokens, stays in registers, as in gemm.h.
//
//   task        a run of row panels x a block of token panels (384 KB for K = 768: it stays in the
//               second-level cache)
//   row panel   kRows rows of W, taken kChunk words along K at a time into 7 KB of first-level cache:
//               broadcasts from there have constant addresses, and rows that lie a multiple of 4 KB apart
//               (K = 3072) do not fight for one set of that cache. A bfloat16 weight is widened on the way
//               where the processor has no vdpbf16ps.
//   few tokens  reading the weights takes the time, and each is read once, in one pass: the lines that come
//               256 words later are asked for while this chunk is multiplied, from all rows in turn
//
// Every kChunk words the sums in registers are added to the tile. So each element of C is summed in an order
// that depends on K alone: not on the number of tokens, their place, or the threads.
//
// A word of W costs a broadcast and as many multiply-adds as there are vectors of tokens. At one
// vector (AVX-512: up to 16 tokens) that is 7 bytes of W a cycle at most, more than memory brings to a core.
#pragma once
#include "csrc/cpu/encoder.h"
#include "csrc/cpu/gemm.h"

namespace rk::cpu::RK_CPU_ISA {

constexpr int64_t kStepTokens = 1024;             // tokens of one product
constexpr int64_t kBlockPanels = 128 / kColumns;  // token panels of a block
constexpr int64_t kRunPanels = 784 / kRows;       // row panels of a task, at most
constexpr int64_t kTurnedPanels = 224 / kRows;    // row panels whose tiles are turned round together
constexpr int64_t kAhead = 2 * kChunk;            // how far ahead lines of W are asked for, in words
static_assert(kStepTokens % (kBlockPanels * kColumns) == 0, "steps are whole blocks");

// ---- the right operand ----

// Tokens packed as panels of kColumns (the last one narrower, by whole vectors), kBlockPanels panels to a
// block, in the order in which a task reads them: [block][chunk of K][panel][kChunk words][width].
struct TokenPanels {
    int64_t tokens, k_words;
    RK_INLINE int64_t count() const { return ceil_div(tokens, kColumns); }
    RK_INLINE int64_t blocks() const { return ceil_div(count(), kBlockPanels); }
    RK_INLINE int real(int64_t panel) const { return int(min64(kColumns, tokens - panel * kColumns)); }
    RK_INLINE int vectors(int64_t panel) const { return int(ceil_div(real(panel), kLanes)); }
    // Where word `k` of a panel is, and those after it to the end of its chunk, vectors(panel) * kLanes
    // apart.
    RK_INLINE int64_t offset(int64_t panel, int64_t k) const {
        const int64_t first = panel / kBlockPanels * kBlockPanels * kColumns;
        const int64_t width = min64(kBlockPanels * kColumns, round_up(tokens - first, kLanes));
        const int64_t chunk = k / kChunk * kChunk, here = min64(kChunk, k_words - chunk);
        return first * k_words + chunk * width + (panel * kColumns - first) * here +
               (k - chunk) * vectors(panel) * kLanes;
    }
    RK_INLINE int64_t words() const { return round_up(tokens, kLanes) * k_words; }
};

struct RightOperand {
    TokenPanels panels;
    const float* words;
};

// Packs x: [tokens, K], into the calling thread's memory, where it stays until the next call.
template <class T>
inline RightOperand pack_tokens(const T* x, int64_t tokens, int64_t k_size) {
    constexpr int64_t kStep = kChunk * kPerWord<T>;
    const TokenPanels panels{tokens, words_of<T>(k_size)};
    float* const packed = thread_scratch(Use::right_operand).words(panels.words());
    const int64_t vectors = ceil_div(tokens, kLanes), chunks = ceil_div(k_size, kStep);
    parallel_for(0, vectors * chunks, 32, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t i = task / chunks, k = task % chunks * kStep, first = i * kLanes,
                          panel = i / kVectors;
            pack_along_k(x + first * k_size + k, k_size, int(min64(kLanes, tokens - first)),
                         min64(kStep, k_size - k),
                         packed + panels.offset(panel, k / kPerWord<T>) + i % kVectors * kLanes,
                         panels.vectors(panel) * kLanes, kLanes);
        }
    });
    return {panels, packed};
}

// ---- the left operand ----

// The rows of a weight cut into panels of at most kRows, as equal as can be, which start at whole words of a
// next product's K.
template <class T>
struct WeightPanels {
    static constexpr int kUnit = kPerWord<T>;
    int64_t rows, units, count;
    explicit WeightPanels(int64_t n)
        : rows(n), units(ceil_div(n, kUnit)), count(ceil_div(units, kRows / kUnit)) {}
    RK_INLINE int64_t first(int64_t i) const {
        return min64(rows, (units / count * i + min64(i, units % count)) * kUnit);
    }
    RK_INLINE int height(int64_t i) const { return int(first(i + 1) - first(i)); }
};

// Row panels [top, bottom) of one of the weights.
template <class T>
struct RowRun {
    int part;
    WeightPanels<T> panels;
    int64_t top, bottom;
};

// Up to three weights of one K, cut into runs.
template <class T>
struct RowRuns {
    const Weight* parts;
    int count;
    int64_t first_run[4] = {};

    // wanted: runs that give every thread several.
    RowRuns(const Weight* parts_, int count_, int64_t wanted) : parts(parts_), count(count_) {
        int64_t panels = 0;
        for (int i = 0; i < count; ++i) panels += WeightPanels<T>(parts[i].rows).count;
        const int64_t length = max64(1, min64(kRunPanels, panels / wanted));
        for (int i = 0; i < count; ++i)
            first_run[i + 1] = first_run[i] + ceil_div(WeightPanels<T>(parts[i].rows).count, length);
    }
    int64_t runs() const { return first_run[count]; }
    RowRun<T> run(int64_t i) const {
        int part = 0;
        while (i >= first_run[part + 1]) ++part;
        const WeightPanels<T> panels(parts[part].rows);
        const int64_t runs_here = first_run[part + 1] - first_run[part], at = i - first_run[part];
        return {part, panels, panels.count * at / runs_here, panels.count * (at + 1) / runs_here};
    }
};

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

// What is asked for meanwhile: lines of `rows` rows that are `stride` bytes apart.
struct Ahead {
    const char* at;
    int64_t stride;
    int rows;
};

struct TileCall {
    int64_t k_words;
    const float *a, *b;  // [rows][kChunk], [k_words][width * kLanes]
    float* tile;         // [rows][kColumns]
    bool add;
    Ahead ahead;
};

// tile[i][j] (+)= sum over k of a[i][k] b[k][j], j < kWidth * kLanes.
template <class T, int kHeight, int kWidth>
__attribute__((noinline)) void multiply_rows_tile(const TileCall& t) {
    const float *a = t.a, *b = t.b;
    vf32 c[kHeight][kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kHeight; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < kWidth; ++v) c[i][v] = zero();
    const char* ahead = t.ahead.at;
    constexpr int64_t kLine = 64 / 4;
    for (int64_t k = 0; k < t.k_words; k += kLine, ahead += 64) {
        const char* line = ahead;
        for (int i = 0; i < t.ahead.rows; ++i, line += t.ahead.stride) __builtin_prefetch(line, 0, 2);
        const float* const end = a + min64(kLine, t.k_words - k);
        for (; a != end; ++a, b += kWidth * kLanes) {
            vf32 bk[kWidth];
#pragma GCC unroll 4
            for (int v = 0; v < kWidth; ++v) bk[v] = load(b + v * kLanes);
#pragma GCC unroll 16
            for (int i = 0; i < kHeight; ++i) {
                const vf32 ak = set1(a[i * kChunk]);
#pragma GCC unroll 4
                for (int v = 0; v < kWidth; ++v) c[i][v] = Arithmetic<T>::multiply_add(ak, bk[v], c[i][v]);
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kHeight; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < kWidth; ++v) {
            float* to = t.tile + i * kColumns + v * kLanes;
            store(to, t.add ? load(to) + c[i][v] : c[i][v]);
        }
}

template <class T, int kHeight = kRows>
RK_INLINE void multiply_rows_tile_of(int height, int vectors, const TileCall& t) {
    if (height == kHeight)
        return vectors == kVectors ? multiply_rows_tile<T, kHeight, kVectors>(t)
                                   : multiply_rows_tile<T, kHeight, 1>(t);
    if constexpr (kHeight > 1) multiply_rows_tile_of<T, kHeight - 1>(height, vectors, t);
}
static_assert(kVectors == 2, "a token panel has one vector or two");

// One task: the tiles of a run of row panels and token panels [left, right), tiles[panel - left][row panel -
// top].
template <class T>
inline void multiply_run(const Weight& w, const RowRun<T>& run, const RightOperand& x, int64_t left,
                         int64_t right, float* a, float* tiles) {
    constexpr int64_t kTile = kRows * kColumns;
    const int64_t k_words = x.panels.k_words, height_of_run = run.bottom - run.top, count = right - left;
    // A block of tokens stays in the second-level cache, with `depth` words along K.
    const int64_t k_blocks = count == 1 ? 1 : ceil_div(k_words, kDepth);
    const int64_t depth = ceil_div(ceil_div(k_words, kChunk), k_blocks) * kChunk;
    for (int64_t start = 0; start < k_words; start += depth)
        for (int64_t i = run.top; i < run.bottom; ++i) {
            const int64_t row = run.panels.first(i), end = min64(k_words, start + depth);
            const int height = run.panels.height(i);
            for (int64_t k = start; k < end; k += kChunk) {
                const int64_t here = min64(kChunk, end - k);
                copy_rows_chunk<T>(w, row, height, k, here, a);
                // What comes kAhead words later, of these rows or of the next.
                const int64_t there = k + kAhead < end ? k + kAhead : start + k + kAhead - end;
                const char* const ahead = reinterpret_cast<const char*>(
                    static_cast<const T*>(w.data) + (row + (k + kAhead < end ? 0 : height)) * w.row_stride +
                    there * kPerWord<T>);
                const int64_t stride = w.row_stride * int64_t(sizeof(T));
                for (int64_t j = 0; j < count; ++j) {
                    const int64_t first = height * j / count, last = height * (j + 1) / count;
                    multiply_rows_tile_of<T>(height, x.panels.vectors(left + j),
                                             {here, a, x.words + x.panels.offset(left + j, k),
                                              tiles + (j * height_of_run + i - run.top) * kTile, k > 0,
                                              Ahead{ahead + first * stride, stride, int(last - first)}});
                }
            }
        }
}

// For every run and token panel, once: epilogue(run, panel, tiles), tiles: float32, [row
// panels][kRows][kColumns].
template <class T, class Epilogue>
inline void multiply_in_place(const Weight* parts, int count, const RightOperand& x,
                              const Epilogue& epilogue) {
    constexpr int64_t kTile = kRows * kColumns;
    const int64_t threads = num_threads(), token_panels = x.panels.count(), blocks = x.panels.blocks();
    if (token_panels == 0) return;
    const RowRuns<T> runs(parts, count, ceil_div(8 * threads, blocks));
    parallel_tasks(blocks * runs.runs(), threads, [&](int64_t task) {
        const RowRun<T> run = runs.run(task % runs.runs());
        const int64_t left = task / runs.runs() * kBlockPanels,
                      right = min64(token_panels, left + kBlockPanels);
        const int64_t tiles_of_panel = (run.bottom - run.top) * kTile;
        float* const a =
            thread_scratch(Use::column_block).words(kRows * kChunk + (right - left) * tiles_of_panel);
        float* const tiles = a + kRows * kChunk;
        multiply_run(parts[run.part], run, x, left, right, a, tiles);
        for (int64_t panel = left; panel < right; ++panel)
            epilogue(run, panel, static_cast<const float*>(tiles + (panel - left) * tiles_of_panel));
    });
}

// ---- what becomes of tiles ----

// out[token][row] = C^T[row][token] + bias[row], for the rows of a run and `tokens` tokens: turned round in
// first-level cache, so that whole lines go out (single tiles wrote each line twice: a quarter of the time
// where tokens lie 4 KB apart).
template <class T>
inline void store_rows(const RowRun<T>& run, const float* tiles, int tokens, const T* bias, T* out,
                       int64_t out_stride) {
    constexpr int kStride = int(kTurnedPanels) * kRows + kLanes;
    alignas(64) float turned[kLanes * kStride];
    for (int64_t top = run.top; top < run.bottom; top += kTurnedPanels) {
        const int64_t bottom = min64(run.bottom, top + kTurnedPanels), first = run.panels.first(top);
        const int rows = int(run.panels.first(bottom) - first);
        for (int j = 0; j < tokens; j += kLanes) {
            for (int64_t panel = top; panel < bottom; ++panel) {
                const float* tile = tiles + (panel - run.top) * kRows * kColumns + j;
                const int height = run.panels.height(panel);
                float* const to = turned + run.panels.first(panel) - first;
                vf32 block[kLanes];
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i) block[i] = i < height ? load(tile + i * kColumns) : zero();
                transpose(block);
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i)
                    store(to + i * kStride, block[i]);  // the lanes past `height` are the next panel's
            }
            for (int i = 0; i < min64(kLanes, tokens - j); ++i)
                for (int row = 0; row < rows; row += kLanes) {
                    const vf32 b = bias == nullptr ? zero() : load_some(bias + first + row, rows - row);
                    store_some(out + (j + i) * out_stride + first + row, load(turned + i * kStride + row) + b,
                               rows - row);
                }
        }
    }
}

// Rows [row, row + rows) of C^T, [rows][kColumns], to where a next product with T finds them as words along
// K.
template <class T>
RK_INLINE void store_words(const float* tile, int64_t row, int rows, const TokenPanels& panels, int64_t panel,
                           float* words) {
    const int vectors = panels.vectors(panel);
    for (int i = 0; i < rows; i += kPerWord<T>) {
        float* const out = words + panels.offset(panel, (row + i) / kPerWord<T>);
        for (int v = 0; v < vectors * kLanes; v += kLanes) {
            vf32 word = load(tile + i * kColumns + v);
            if constexpr (kPerWord<T> == 2) {
                const vf32 odd = i + 1 < rows ? load(tile + (i + 1) * kColumns + v) : zero();
                word = as_float(pair_of_bf16(word, odd));
            }
            store(out + v, word);
        }
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
class InPlaceProducts {
  public:
    using Element = T;
    using Weight = rk::cpu::Weight;

    // out[r] = x[r] (W_0 | W_1 | ...)^T + biases, the parts side by side
    static void project(const Weight* parts, const void* const* biases, int count, const T* x, int64_t rows,
                        T* out) {
        int64_t columns = 0, offset[3];
        for (int i = 0; i < count; ++i) offset[i] = columns, columns += parts[i].rows;
        for_token_steps(rows, [&](int64_t first, int64_t tokens) {
            const int64_t k_size = parts[0].columns;
            const RightOperand right = pack_tokens(x + first * k_size, tokens, k_size);
            multiply_in_place<T>(
                parts, count, right, [&](const RowRun<T>& run, int64_t panel, const float* tiles) {
                    store_rows(run, tiles, right.panels.real(panel), static_cast<const T*>(biases[run.part]),
                               out + (first + panel * kColumns) * columns + offset[run.part], columns);
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
            multiply_in_place<T>(&l.in, 1, pack_tokens(x + first * hidden, tokens, hidden),
                                 [&](const RowRun<T>& run, int64_t panel, const float* tiles) {
                                     const T* bias = static_cast<const T*>(l.in_bias);
                                     for (int64_t i = run.top; i < run.bottom; ++i)
                                         activate<kTanh>(tiles + (i - run.top) * kRows * kColumns, bias,
                                                         run.panels.first(i), run.panels.height(i), panels,
                                                         panel, activation);
                                 });
            multiply_in_place<T>(&l.out, 1, RightOperand{panels, activation},
                                 [&](const RowRun<T>& run, int64_t panel, const float* tiles) {
                                     store_rows<T>(run, tiles, panels.real(panel), nullptr,
                                                   out + (first + panel * kColumns) * hidden, hidden);
                                 });
        });
    }

  private:
    template <bool kTanh>
    static RK_INLINE void activate(const float* tile, const T* bias, int64_t row, int height,
                                   const TokenPanels& panels, int64_t panel, float* activation) {
        const int lanes = panels.vectors(panel) * kLanes;
        alignas(64) float activated[kRows * kColumns];
        for (int i = 0; i < height; ++i)
            for (int v = 0; v < lanes; v += kLanes)
                store(activated + i * kColumns + v,
                      gelu<kTanh>(load(tile + i * kColumns + v) + load1(bias + row + i)));
        store_words<T>(activated, row, height, panels, panel, activation);
    }
};

}  // namespace rk::cpu::RK_CPU_ISA
