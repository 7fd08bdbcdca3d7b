// C = A B with an epilogue, for the float32 and bfloat16 products of the layers. A is [M, K], B is [K, N],
// both with strides (one of the two must be 1), so a transposed operand costs nothing beyond its packing.
//
// Packed path (many rows). Both operands are laid out as panels that the micro-kernel reads front to back:
// A as panels of up to kRows rows, [K][rows]; B as panels of kColumns columns, [K][kColumns]. The
// micro-kernel holds a kRows x kColumns tile of C in registers (AVX-512: 14 x 32, 28 accumulators; AVX2: 6 x
// 16, 12; portable: 4 x 8, 8) and does kRows * kColumns / kLanes fused multiply-adds for every kRows +
// kColumns / kLanes loads, so it runs at the arithmetic roof with both panels coming from the second-level
// cache. A is packed once, by all threads. A task owns a block of columns: it packs them (all of K, at most
// kBlockWords: half of that cache) into memory of its own, then walks all rows. So each weight is read from
// memory once and its packed form never leaves the core.
//
// Dot path (few rows; both operands contiguous along K). Packing a weight costs about as much as multiplying
// it with ten rows. So up to kFewRows, rows of A meet rows of the weight directly: accumulators are vectors
// along K, summed across at the end. The weight is read once, straight.
//
// Every kChunk steps along K the accumulators are added to the tile and start again from zero: the error of a
// sum of K terms then grows as that of a blocked sum, not as that of a serial one.
//
// The epilogue is called once a tile, with the finished float32 tile in the first-level cache:
//     epilogue(row, column, rows, columns, tile)
//         tile: [rows][kColumns], of which `columns` columns are real
// Each element of C is summed in an order that depends on M, N and K alone, never on the number of threads.
//
// A weight of an inference path is packed beforehand, once and for all calls (packed_weight.h): its panels
// take the place of those that a task packs. Or it is never packed: in_place_products.h.
//
// bfloat16 with AVX512-BF16: two neighbours along K make one 32-bit word, multiplied by vdpbf16ps; elsewhere
// packing converts to float32. So a packed operand is always made of 32-bit words, kPerWord elements along K
// each.
#pragma once
#include "csrc/cpu/scratch.h"
#include "csrc/cpu/simd.h"
#include "csrc/cpu/util.h"

namespace rk::cpu::RK_CPU_ISA {

#if defined(RK_AVX512)
constexpr int kRows = 14, kColumns = 32;
#elif defined(RK_AVX2)
constexpr int kRows = 6, kColumns = 16;
#else
constexpr int kRows = 4, kColumns = 8;
#endif
constexpr int kVectors = kColumns / kLanes;
constexpr int64_t kChunk = 128;             // words along K between two additions to the tile
constexpr int64_t kDepth = 768;             // words along K of a packed block of B
constexpr int64_t kBlockWords = 96 * 1024;  // and all of its words: 384 KB
constexpr int64_t kWordsAtOnce = 2 << 20;   // of A, packed together (and at most 1024 rows): 8 MB
static_assert(kRows <= kLanes, "an A panel is packed by one transposition");

#if defined(RK_CPU_ISA_AVX512_BF16)
template <class T>
constexpr int kPerWord = sizeof(T) == 2 ? 2 : 1;
#else
template <class T>
constexpr int kPerWord = 1;
#endif

template <class T>
struct Matrix {
    const T* data;
    int64_t rows, columns;
    int64_t row_stride, column_stride;  // in elements
    RK_INLINE Matrix<T> transposed() const { return {data, columns, rows, column_stride, row_stride}; }
    RK_INLINE Matrix<T> some_rows(int64_t first, int64_t count) const {
        return {data + first * row_stride, count, columns, row_stride, column_stride};
    }
};
template <class T>
RK_INLINE Matrix<T> row_major(const T* data, int64_t rows, int64_t columns) {
    return {data, rows, columns, columns, 1};
}

// ---- packing ----

template <class T>
RK_INLINE int64_t words_of(int64_t elements) {
    return ceil_div(elements, kPerWord<T>);
}

// kLanes words of `count` (up to kLanes * kPerWord) elements that lie side by side along K; the rest is zero.
template <class T>
RK_INLINE vf32 load_words(const T* p, int64_t count) {
    constexpr int kAll = kLanes * kPerWord<T>;
    if constexpr (kPerWord<T> == 1) {
        return count >= kAll ? load(p) : load_partial(p, int(count));
    } else {
        if (count >= kAll) return load(reinterpret_cast<const float*>(p));
        T elements[kAll] = {};
        for (int64_t i = 0; i < count; ++i) elements[i] = p[i];
        return load(reinterpret_cast<const float*>(elements));
    }
}

// out[k][row] for `rows` (0 to kLanes) rows that are contiguous along K; the first `width` lanes of each k
// are meant to be written. Whole vectors go out where what lies behind them is written later: nothing past
// the last k's width.
template <class T>
RK_INLINE void pack_along_k(const T* in, int64_t row_stride, int rows, int64_t k_size, float* out,
                            int64_t out_stride, int width) {
    constexpr int kStep = kLanes * kPerWord<T>;
    const float* const end = out + (words_of<T>(k_size) - 1) * out_stride + width;
    for (int64_t k = 0; k < k_size; k += kStep, out += kLanes * out_stride) {
        vf32 block[kLanes];
        const int64_t left = k_size - k;
        if (rows == kLanes && left >= kStep) {
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) block[i] = load_words(in + i * row_stride + k, kStep);
        } else {
            for (int i = 0; i < kLanes; ++i)
                block[i] = i < rows ? load_words(in + i * row_stride + k, left) : zero();
        }
        transpose(block);
        if (left >= kStep && out + (kLanes - 1) * out_stride + kLanes <= end) {
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) store(out + i * out_stride, block[i]);
        } else {
            const int words = int(min64(kLanes, words_of<T>(left)));
            for (int i = 0; i < words; ++i) {
                float* to = out + i * out_stride;
                if (to + kLanes <= end)
                    store(to, block[i]);
                else
                    store_partial(to, block[i], width);
            }
        }
    }
}

// The same for rows that are contiguous across K (in[k][row]).
template <class T>
RK_INLINE void pack_across_k(const T* in, int64_t k_stride, int rows, int64_t k_size, float* out,
                             int64_t out_stride, int width) {
    for (int64_t k = 0; k < k_size; k += kPerWord<T>, out += out_stride, in += kPerWord<T> * k_stride) {
        vf32 words = rows == kLanes ? load(in) : load_partial(in, rows);
        if constexpr (kPerWord<T> == 2) {
            // load() puts a bfloat16 into the upper half of its lane; the even element belongs in the lower.
            vf32 odd = zero();
            if (k + 1 < k_size)
                odd = rows == kLanes ? load(in + k_stride) : load_partial(in + k_stride, rows);
            words = as_float((bits(words) >> 16) | bits(odd));
        }
        if (width == kLanes)
            store(out, words);
        else
            store_partial(out, words, width);
    }
}

// Rows [row, row + rows) of `m`, its columns [k, k + k_size), to out[k][row].
template <class T>
RK_INLINE void pack_rows(const Matrix<T>& m, int64_t row, int rows, int64_t k, int64_t k_size, float* out,
                         int64_t out_stride, int width) {
    const T* in = m.data + row * m.row_stride + k * m.column_stride;
    if (m.column_stride == 1)
        pack_along_k(in, m.row_stride, rows, k_size, out, out_stride, width);
    else
        pack_across_k(in, m.column_stride, rows, k_size, out, out_stride, width);
}

// The rows of A cut into panels of at most kRows rows, as equal as can be. Panel i is [K words][rows] at
// packed + offset(i).
struct RowPanels {
    int64_t k_words, count, base, extra;
    RK_INLINE RowPanels(int64_t rows, int64_t k_words_)
        : k_words(k_words_),
          count(max64(1, ceil_div(rows, kRows))),
          base(rows / count),
          extra(rows % count) {}
    RK_INLINE int64_t first(int64_t i) const { return i * base + min64(i, extra); }
    RK_INLINE int height(int64_t i) const { return int(base + (i < extra)); }
    // Which panel `row` opens.
    RK_INLINE int64_t index(int64_t row) const {
        return row < extra * (base + 1) ? row / (base + 1) : extra + (row - extra * (base + 1)) / base;
    }
    RK_INLINE int64_t offset(int64_t i) const { return first(i) * k_words; }
};

template <class T>
inline void pack_a(const Matrix<T>& a, const RowPanels& panels, float* packed) {
    parallel_for(0, panels.count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            pack_rows(a, panels.first(i), panels.height(i), 0, a.columns, packed + panels.offset(i),
                      panels.height(i), panels.height(i));
    });
}

// Columns [column, column + kColumns) of B, given transposed (bt: [N, K]), over k_words words from element k
// on; columns past the end are zero.
template <class T>
inline void pack_b_panel(const Matrix<T>& bt, int64_t column, int64_t k, int64_t k_words, float* out) {
    const int64_t k_size = min64(k_words * kPerWord<T>, bt.columns - k);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
        const int64_t first = column + v * kLanes;
        const int rows = int(max64(0, min64(kLanes, bt.rows - first)));
        pack_rows(bt, rows > 0 ? first : 0, rows, k, k_size, out + v * kLanes, kColumns, kLanes);
    }
}

// ---- micro-kernel ----

// What a product of words is added to, and how. (One type of sum for float32 and integers, with casts,
// makes GCC keep the sums in memory.)
template <class T>
struct Arithmetic {
    using Sum = vf32;
    static RK_INLINE vf32 multiply_add(vf32 a, vf32 b, vf32 c) {
#if defined(RK_CPU_ISA_AVX512_BF16)
        if constexpr (kPerWord<T> == 2)
            return (vf32)_mm512_dpbf16_ps((__m512)c, (__m512bh)bit_cast<vi32>(a),
                                          (__m512bh)bit_cast<vi32>(b));
#endif
        return fma(a, b, c);
    }
};

// Where the micro-kernel reads a panel of B: vector(v) of the words of one k, then step() to the next.
template <class Form>
struct Reader {
    static constexpr int kBytes = kColumns * int(sizeof(Form));  // of one k
    const Form* at;
    RK_INLINE vf32 vector(int v) const { return load(at + v * kLanes); }
    RK_INLINE void step() { at += kColumns; }
    RK_INLINE Reader from(int64_t k) const { return {at + k * kColumns}; }
};

// A narrow weight that few rows meet arrives too slowly without being asked for: 10 to 15% on one core.
// (Words do not: 4 rows in float32 were no faster for it.)
template <class B>
RK_INLINE void read_ahead(const B& b) {
    for (int byte = 0; byte < B::kBytes; byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(b.at) + 2048 + byte);
}
RK_INLINE void read_ahead(const Reader<float>&) {}

// tile[i][j] (+)= sum over k of a[k][i] b[k][j]
template <class T, int kHeight, class B>
__attribute__((noinline)) void multiply_tile(int64_t k_words, const float* a, B b, float* tile, bool add) {
    using Sum = typename Arithmetic<T>::Sum;
    Sum c[kHeight][kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kHeight; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) c[i][v] = Sum{};
    for (int64_t k = 0; k < k_words; ++k, a += kHeight, b.step()) {
        vf32 bk[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) bk[v] = b.vector(v);
        if (kHeight <= kLanes / 2) read_ahead(b);
#pragma GCC unroll 16
        for (int i = 0; i < kHeight; ++i) {
            const vf32 ak = set1(a[i]);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) c[i][v] = Arithmetic<T>::multiply_add(ak, bk[v], c[i][v]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kHeight; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            float* to = tile + i * kColumns + v * kLanes;
            store(to, (vf32)(add ? (Sum)load(to) + c[i][v] : c[i][v]));
        }
}

template <class T, class B, int kHeight = kRows>
RK_INLINE void multiply_tile_of(int height, int64_t k_words, const float* a, const B& b, float* tile,
                                bool add) {
    if (height == kHeight) return multiply_tile<T, kHeight>(k_words, a, b, tile, add);
    if constexpr (kHeight > 1) multiply_tile_of<T, B, kHeight - 1>(height, k_words, a, b, tile, add);
}

// ---- products ----

// Where the panels of B come from: `columns` columns of C; with kCopies, copy() writes the words of a panel
// from word k on into memory of the task; without, reader() reads them where they are.

// B packed by the task that needs it; bt is B transposed, [N, K].
template <class T>
struct PackedHere {
    static constexpr bool kCopies = true;
    Matrix<T> bt;
    int64_t columns;
    RK_INLINE explicit PackedHere(const Matrix<T>& bt_) : bt(bt_), columns(bt_.rows) {}
    RK_INLINE void copy(int64_t panel, int64_t k, int64_t k_words, float* out) const {
        pack_b_panel(bt, panel * kColumns, k * kPerWord<T>, k_words, out);
    }
};

// C = A B for a packed A. T: what the words of both are made of.
template <class T, class Panels, class Epilogue>
inline void multiply_panels(const RowPanels& panels, const float* packed_a, const Panels& b_panels,
                            const Epilogue& epilogue) {
    if (b_panels.columns == 0) return;
    const int64_t k_words = panels.k_words;
    const int64_t k_blocks = max64(1, ceil_div(k_words, kDepth));
    const int64_t depth = ceil_div(ceil_div(k_words, k_blocks), kChunk) * kChunk;  // words along K of a block
    const int64_t columns = ceil_div(b_panels.columns, kColumns);                  // in panels
    // Column panels to a block: as the cache allows, but enough blocks for every thread to have several.
    const int64_t threads = num_threads();
    const int64_t fitting = kBlockWords / (kColumns * max64(kChunk, min64(depth, k_words)));
    const int64_t block = max64(1, min64(fitting, columns / (4 * threads)));
    const int64_t blocks = ceil_div(columns, block);
    const int64_t row_blocks = max64(1, min64(panels.count, ceil_div(2 * threads, blocks)));
    const int64_t tiles = k_blocks == 1 ? 1 : ceil_div(panels.count, row_blocks) * block;
    const int64_t copied = Panels::kCopies ? block * kColumns * min64(depth, k_words) : 0;
    parallel_tasks(blocks * row_blocks, threads, [&](int64_t task) {
        constexpr int64_t kTile = kRows * kColumns;
        float* const packed_b = thread_scratch(Use::column_block).words(copied + tiles * kTile);
        float* const c = packed_b + copied;
        const int64_t first = task / row_blocks * block, last = min64(columns, first + block);
        const int64_t row_block = task % row_blocks;
        const int64_t top = panels.count * row_block / row_blocks;
        const int64_t bottom = panels.count * (row_block + 1) / row_blocks;
        for (int64_t k_block = 0; k_block < k_blocks; ++k_block) {
            const int64_t k_first = k_block * depth, k_here = max64(0, min64(depth, k_words - k_first));
            if constexpr (Panels::kCopies)
                for (int64_t j = first; j < last; ++j)
                    b_panels.copy(j, k_first, k_here, packed_b + (j - first) * kColumns * k_here);
            for (int64_t i = top; i < bottom; ++i) {
                const int height = panels.height(i);
                const float* a = packed_a + panels.offset(i) + k_first * height;
                for (int64_t j = first; j < last; ++j) {
                    const auto b = [&] {
                        if constexpr (Panels::kCopies)
                            return Reader<float>{packed_b + (j - first) * kColumns * k_here};
                        else
                            return b_panels.reader(j, k_first);
                    }();
                    float* tile = c + (k_blocks == 1 ? 0 : (i - top) * block + (j - first)) * kTile;
                    if (k_words == 0)
                        for (int64_t x = 0; x < kTile; ++x) tile[x] = 0.0f;
                    for (int64_t k = 0; k < k_here; k += kChunk)
                        multiply_tile_of<T>(height, min64(kChunk, k_here - k), a + k * height, b.from(k),
                                            tile, k_block > 0 || k > 0);
                    if (k_block == k_blocks - 1)
                        epilogue(panels.first(i), j * kColumns, height,
                                 int(min64(kColumns, b_panels.columns - j * kColumns)),
                                 static_cast<const float*>(tile));
                }
            }
        }
    });
}

// C = A B for a packed A; bt is B transposed, [N, K].
template <class T, class Epilogue>
inline void multiply_packed(const RowPanels& panels, const float* packed_a, const Matrix<T>& bt,
                            const Epilogue& epilogue) {
    multiply_panels<T>(panels, packed_a, PackedHere<T>(bt), epilogue);
}

// An epilogue that writes C, with a bias if there is one.
template <class T>
struct StoreTile {
    T* out;  // [rows, columns]
    int64_t columns;
    const T* bias;  // [columns], or null
    RK_INLINE void operator()(int64_t row, int64_t column, int rows, int width, const float* tile) const {
        for (int j = 0; j < width; j += kLanes) {
            const vf32 b = bias != nullptr ? load_some(bias + column + j, width - j) : zero();
            for (int i = 0; i < rows; ++i)
                store_some(out + (row + i) * columns + column + j, load(tile + i * kColumns + j) + b,
                           width - j);
        }
    }
};

// Rows of an A with k_words words a row that are packed together.
template <class T>
RK_INLINE int64_t rows_at_once(int64_t k_size) {
    return kRows * max64(1, min64(kWordsAtOnce / max64(1, words_of<T>(k_size)), 1024) / kRows);
}

// C = A B; bt is B transposed, [N, K].
template <class T, class Epilogue>
inline void multiply(const Matrix<T>& a, const Matrix<T>& bt, const Epilogue& epilogue) {
    const int64_t step = rows_at_once<T>(a.columns);
    for (int64_t first = 0; first < a.rows; first += step) {
        const int64_t rows = min64(step, a.rows - first);
        const RowPanels panels(rows, words_of<T>(a.columns));
        float* packed_a = thread_scratch(Use::left_operand).words(rows * panels.k_words);
        pack_a(a.some_rows(first, rows), panels, packed_a);
        multiply_packed(panels, packed_a, bt,
                        [&](int64_t row, int64_t column, int height, int width, const float* tile) {
                            epilogue(first + row, column, height, width, tile);
                        });
    }
}

// ---- few rows ----

#if defined(RK_AVX512)
constexpr int kDotRows = 6, kDotColumns = 4;
#elif defined(RK_AVX2)
constexpr int kDotRows = 3, kDotColumns = 4;
#else
constexpr int kDotRows = 2, kDotColumns = 4;
#endif

// Up to this many rows the dot path is the faster one. Dot against packed, GFLOP/s on one Zen 4 core, K = 768
// (3072): AVX-512 float32 58 (51) against 32 (23) at 4 rows, 68 (82) against 67 (59) at 16, 79 (88) against
// 79 (75) at 32; AVX2 48 (55) against 37 (35), 75 (77) against 72 (69), 66 (78) against 66 (77). bfloat16 by
// vdpbf16ps 174 (179) against 79 (80), 180 (184) against 150 (144), 159 (207) against 162 (180); converted to
// float32, which the dot path does over again for every few rows, 31 (33) against 29 (30) at 4 rows and 35
// (37) against 41 (46) at 8.
template <class T>
constexpr int64_t kFewRows = sizeof(T) == 2 && kPerWord<T> == 1 ? 4
                             : kLanes == 16                     ? 24
                                                                : 16;

// tile[i][j] = sum over k of a[i][k] b[j][k]
template <class T, int kHeight>
__attribute__((noinline)) void dot_tile(int64_t k_size, const T* a, int64_t a_stride, const T* b,
                                        int64_t b_stride, float* tile) {
    constexpr int kStep = kLanes * kPerWord<T>;
    vf32 c[kHeight][kDotColumns];
#pragma GCC unroll 16
    for (int i = 0; i < kHeight; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kDotColumns; ++j) c[i][j] = zero();
    const auto step = [&](int64_t k, int64_t count) __attribute__((always_inline)) {
        vf32 bk[kDotColumns];
#pragma GCC unroll 4
        for (int j = 0; j < kDotColumns; ++j) bk[j] = load_words(b + j * b_stride + k, count);
#pragma GCC unroll 16
        for (int i = 0; i < kHeight; ++i) {
            const vf32 ak = load_words(a + i * a_stride + k, count);
#pragma GCC unroll 4
            for (int j = 0; j < kDotColumns; ++j) c[i][j] = Arithmetic<T>::multiply_add(ak, bk[j], c[i][j]);
        }
    };
    int64_t k = 0;
    for (; k + kStep <= k_size; k += kStep) step(k, kStep);
    if (k < k_size) step(k, k_size - k);
#pragma GCC unroll 16
    for (int i = 0; i < kHeight; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kDotColumns; ++j) tile[i * kColumns + j] = hsum(c[i][j]);
}

template <class T, int kHeight = kDotRows>
RK_INLINE void dot_tile_of(int height, int64_t k_size, const T* a, int64_t a_stride, const T* b,
                           int64_t b_stride, float* tile) {
    if (height == kHeight) return dot_tile<T, kHeight>(k_size, a, a_stride, b, b_stride, tile);
    if constexpr (kHeight > 1) dot_tile_of<T, kHeight - 1>(height, k_size, a, a_stride, b, b_stride, tile);
}

// C = A B with both operands contiguous along K; bt is B transposed, [N, K]. For few rows.
template <class T, class Epilogue>
inline void multiply_few_rows(const Matrix<T>& a, const Matrix<T>& bt, const Epilogue& epilogue) {
    const int64_t groups = ceil_div(a.rows, kDotRows);
    parallel_for(0, ceil_div(bt.rows, kColumns), 1, [&](int64_t begin, int64_t end) {
        alignas(64) float tile[kDotRows * kColumns];
        for (int64_t block = begin; block < end; ++block) {
            const int64_t column = block * kColumns;
            const int width = int(min64(kColumns, bt.rows - column));
            for (int64_t group = 0; group < groups; ++group) {
                const int64_t row = a.rows * group / groups;
                const int height = int(a.rows * (group + 1) / groups - row);
                for (int j = 0; j < width; j += kDotColumns) {
                    // The last few columns are taken together with finished ones.
                    const int from = int(max64(0, min64(j, width - kDotColumns)));
                    if (width >= kDotColumns) {
                        dot_tile_of<T>(height, a.columns, a.data + row * a.row_stride, a.row_stride,
                                       bt.data + (column + from) * bt.row_stride, bt.row_stride, tile + from);
                    } else {
                        float narrow[kDotRows * kColumns] = {};
                        for (int n = 0; n < width; ++n) {
                            dot_tile_of<T>(height, a.columns, a.data + row * a.row_stride, a.row_stride,
                                           bt.data + (column + n) * bt.row_stride, 0, narrow);
                            for (int i = 0; i < height; ++i) tile[i * kColumns + n] = narrow[i * kColumns];
                        }
                    }
                }
                epilogue(row, column, height, width, static_cast<const float*>(tile));
            }
        }
    });
}

}  // namespace rk::cpu::RK_CPU_ISA
