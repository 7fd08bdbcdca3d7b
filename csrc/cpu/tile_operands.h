// Operands of the products on tiles (tile_products.h): numbers cut into bfloat16 parts and laid out as tiles.
//
// A float32 number is the sum of three bfloat16 numbers (24 bits, 8 each): the first is the number rounded to 8 bits,
// the second what is left of it, rounded likewise, the third the rest, exactly. Rounded (halves away from zero) rather
// than cut, the parts that follow are half as large and of either sign: leaving the smallest products out costs a sixth.
// kParts of them are kept, one for "medium", two for "high", three for "highest"; a bfloat16 number is one part as it is.
//
//   special numbers  What would round to infinity is cut instead, all its parts. An infinity or NaN is its own first part, and the others
//                    are zero: its product with a part that is zero would be NaN, so the rows that have one are
//                    marked, and the product computes what they meet in float32.
//   denormals        Tiles take them as zero (amx.h): a part below 2^-126 is lost, of numbers below 2^-102.
//
// A step is 32 elements along K: what one tile holds. Per step and part an operand has two tiles: of 32 weight rows (a
// strip) tiles [16 rows][32 elements], of 32 tokens (a panel) tiles [16 pairs of elements][16 tokens][2]. Steps are
// grouped into slabs; a slab is [part][step][2 tiles].
//
//   few tokens       Up to 16 tokens are one tile a step and part, [16 pairs][4, 8 or 16 tokens][2]: what is not there is
//                    not brought into the first-level cache. A tile is loaded from there as any other, rows closer
//                    together, so that its further columns are numbers of other tokens: sums that nobody reads.
#pragma once
#include "csrc/cpu/amx.h"
#include "csrc/cpu/gemm.h"
#include "csrc/cpu/scratch.h"
#include "csrc/cpu/util.h"

namespace rk::cpu::RK_CPU_ISA {

constexpr int kStepElements = 32;
constexpr int kGroup32 = 32;  // rows of a strip, tokens of a panel
constexpr int kPairBytes = 2 * kTileBytes;
static_assert(kTileSide % kLanes == 0, "a row of a tile is whole vectors");

// Steps of a slab: of the parts of 128 rows it leaves half of the second-level cache free.
template <int kParts>
constexpr int64_t kSlabSteps = kParts == 1 ? 96 : 24;

// Where the tiles of a strip or panel are.
template <int kParts>
struct TileLayout {
    int64_t steps;       // along K
    int64_t step_bytes;  // of a part of a step
    RK_INLINE explicit TileLayout(int64_t k_size, int64_t step_bytes_ = kPairBytes)
        : steps(max64(1, ceil_div(k_size, kStepElements))), step_bytes(step_bytes_) {}
    RK_INLINE int64_t slabs() const { return ceil_div(steps, kSlabSteps<kParts>); }
    RK_INLINE int64_t steps_of(int64_t slab) const {
        return min64(kSlabSteps<kParts>, steps - slab * kSlabSteps<kParts>);
    }
    RK_INLINE int64_t bytes() const { return steps * kParts * step_bytes; }
    RK_INLINE int64_t offset(int64_t slab) const { return slab * kSlabSteps<kParts> * kParts * step_bytes; }
    RK_INLINE int64_t part_bytes(int64_t slab) const { return steps_of(slab) * step_bytes; }
};

// ---- parts ----

// From here on a number has no finite rounding to 8 bits.
constexpr uint32_t kSpecialBits = 0x7f7f8000u;
RK_INLINE vu32 size_bits(vf32 x) {
    return bits(x) & 0x7fffffffu;
}
RK_INLINE bool has_special(vu32 largest) {
    return any((vi32)(largest >= kSpecialBits));
}
RK_INLINE vu32 larger(vu32 a, vu32 b) {
    return a > b ? a : b;
}

// The next part of x, in the upper half of each word; x becomes the rest.
RK_INLINE vu32 take_part(vf32* x) {
    const vu32 part = (bits(*x) + 0x8000u) & 0xffff0000u;
    *x -= as_float(part);
    return part;
}

// The same for any number.
struct ScalarParts {
    uint16_t part[3];
};
inline ScalarParts split_any(float x) {
    ScalarParts parts{};
    const uint32_t u = bit_cast<uint32_t>(x);
    if ((u & 0x7f800000u) == 0x7f800000u) {
        parts.part[0] = uint16_t((u >> 16) | (x != x ? 0x40u : 0u));
        return parts;
    }
    const bool cut = (u & 0x7fffffffu) >= kSpecialBits;
    for (int i = 0; i < 3; ++i) {
        const uint32_t part = (bit_cast<uint32_t>(x) + (cut ? 0u : 0x8000u)) & 0xffff0000u;
        parts.part[i] = uint16_t(part >> 16);
        x -= bit_cast<float>(part);
    }
    return parts;
}
RK_INLINE bool is_finite(float x) {
    return x - x == 0.0f;
}

// The upper halves of the words of two vectors, side by side.
RK_INLINE void store_upper_halves(char* to, vu32 first, vu32 second) {
#if defined(RK_AVX512)
    const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31,
                                         29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16((__m512i)first, odd, (__m512i)second));
#else
    const vu16 a = __builtin_convertvector(first >> 16, vu16),
               b = __builtin_convertvector(second >> 16, vu16);
    __builtin_memcpy(to, &a, sizeof a);
    __builtin_memcpy(to + sizeof a, &b, sizeof b);
#endif
}

// `left` (or 32) elements along K, zeros behind them, to 64 bytes a part; the parts lie part_bytes apart. Returns the
// largest size.
template <int kParts>
RK_INLINE vu32 split_step(const float* in, int64_t left, char* out, int64_t part_bytes) {
    vu32 largest{};
#pragma GCC unroll 4
    for (int i = 0; i < kStepElements; i += 2 * kLanes) {
        vf32 a, b;
        if (left >= kStepElements) {
            a = load(in + i), b = load(in + i + kLanes);
        } else {
            a = load_some(in + i, int(max64(0, left - i)));
            b = load_some(in + i + kLanes, int(max64(0, left - i - kLanes)));
        }
        largest = larger(largest, larger(size_bits(a), size_bits(b)));
#pragma GCC unroll 3
        for (int part = 0; part < kParts; ++part) {
            // What two parts leave has 8 bits: nothing of it rounds.
            const vu32 pa = part < 2 ? take_part(&a) : bits(a), pb = part < 2 ? take_part(&b) : bits(b);
            store_upper_halves(out + part * part_bytes + 2 * i, pa, pb);
        }
    }
    return largest;
}
template <int kParts>
RK_INLINE vu32 split_step(const bf16* in, int64_t left, char* out, int64_t) {
    static_assert(kParts == 1, "a bfloat16 number is one part");
    const int64_t count = min64(left, kStepElements);
    if (count < kStepElements) __builtin_memset(out, 0, 2 * kStepElements);
    __builtin_memcpy(out, in, size_t(2 * max64(0, count)));
    return vu32{};
}

// Over again for a step with special numbers; says whether it has an infinity or NaN.
template <int kParts>
inline bool split_special_step(const float* in, int64_t left, char* out, int64_t part_bytes) {
    bool found = false;
    for (int i = 0; i < min64(left, kStepElements); ++i) {
        const ScalarParts parts = split_any(in[i]);
        found |= !is_finite(in[i]);
        for (int part = 0; part < kParts; ++part)
            __builtin_memcpy(out + part * part_bytes + 2 * i, &parts.part[part], 2);
    }
    return found;
}
template <int kParts>
RK_INLINE bool split_special_step(const bf16*, int64_t, char*, int64_t) {
    return false;
}

// With one part an infinity or NaN meets what it meets in the original, so there is nothing to mark.
template <int kParts>
constexpr bool kMarksSpecial = kParts > 1;

// ---- weight rows ----

// Steps of a row that are split before the next row's.
constexpr int kRowSteps = 2;

// The weights that come next, asked for line by line, in the order in which pack_strip reads them: kRowSteps steps of 32
// rows, the next kRowSteps of these rows, and so on; then those of the next strip.
class ReadAhead {
  public:
    // Rows of row_bytes, stride bytes apart, of which the first `column` bytes have been asked for.
    template <class T>
    RK_INLINE ReadAhead(const T* strip, const T* next_strip, int64_t stride, int64_t row_bytes,
                        int64_t column)
        : strip_(reinterpret_cast<const char*>(strip)),
          next_(reinterpret_cast<const char*>(next_strip)),
          stride_(stride),
          row_bytes_(row_bytes),
          column_(column),
          width_(kRowSteps * kStepElements * int(sizeof(T))) {
        turn();
    }
    RK_INLINE void step(int lines) {
        for (; lines > 0; --lines) {
            __builtin_prefetch(at_ + line_, 0, 2);
            if ((line_ += 64) < width_) continue;
            line_ = 0, at_ += stride_;
            if (--rows_ == 0) column_ += width_, turn();
        }
    }

  private:
    RK_INLINE void turn() {
        if (column_ >= row_bytes_) strip_ = next_, column_ = 0;
        at_ = strip_ + column_, rows_ = kGroup32;
    }
    const char *strip_, *next_, *at_;
    int64_t stride_, row_bytes_, column_;
    int width_, line_ = 0, rows_;
};

// Some steps of `rows` weight rows, from their element k on (at `in`), as a strip's tiles; rows that are not there are
// zero. nonfinite[r]: row r has an infinity or NaN. kRowSteps steps of each row go before the next row, so that the tiles
// are written line by line (a row at a time its lines, 2 KB apart, fight for two sets of the first-level cache: 1.4 times
// as long). For each `lines` lines of what comes next are asked for.
template <int kParts, class T>
inline void pack_strip(const T* in, int rows, int64_t stride, int64_t elements, int64_t steps, char* tiles,
                       uint8_t* nonfinite, ReadAhead* next, int lines) {
    const int64_t part_bytes = steps * kPairBytes;
    if (rows < kGroup32) __builtin_memset(tiles, 0, size_t(kParts * part_bytes));
    for (int64_t step = 0; step < steps; step += kRowSteps) {
        const int64_t here = min64(kRowSteps, steps - step);
        const T* from = in + step * kStepElements;
        char* to = tiles + step * kPairBytes;
        for (int r = 0; r < rows; ++r, from += stride, to += kTileRowBytes) {
            next->step(lines);
            vu32 largest{};
            for (int64_t i = 0; i < here; ++i)
                largest = larger(largest, split_step<kParts>(from + i * kStepElements,
                                                             elements - (step + i) * kStepElements,
                                                             to + i * kPairBytes, part_bytes));
            if (!has_special(largest)) continue;
            for (int64_t i = 0; i < here; ++i)
                if (split_special_step<kParts>(from + i * kStepElements,
                                               elements - (step + i) * kStepElements, to + i * kPairBytes,
                                               part_bytes))
                    nonfinite[r] = 1;
        }
    }
}

// The first `count` (or all) words of a vector.
RK_INLINE void store_words(char* to, vu32 words, int count) {
    float* const out = reinterpret_cast<float*>(to);
    count >= kLanes ? store(out, as_float(words)) : store_some(out, as_float(words), count);
}

// ---- operands that lie across K ----

// One step of 16 rows (or tokens) that are contiguous: rows of K, k_stride elements apart, two of which make the words of
// one row of a right operand's tile: [16 pairs][row_bytes] to `to`, the next part part_bytes further. `left`: along K.
// mark(row): row has an infinity or NaN.
template <int kParts, class T, class Mark>
inline void interleave_step(const T* in, int64_t k_stride, int rows, int64_t left, char* to, int row_bytes,
                            int64_t part_bytes, const Mark& mark) {
    vu32 largest{};
    for (int pair = 0; pair < kTileSide; ++pair)
        for (int v = 0; v * 4 < row_bytes; v += kLanes) {
            vf32 x[2];
            for (int i = 0; i < 2; ++i)
                x[i] = 2 * pair + i < left && v < rows
                           ? load_some(in + (2 * pair + i) * k_stride + v, int(rows - v))
                           : zero();
            largest = larger(largest, larger(size_bits(x[0]), size_bits(x[1])));
            char* out = to + pair * row_bytes + v * 4;
            for (int part = 0; part < kParts; ++part, out += part_bytes) {
                const vu32 even = sizeof(T) == 2 ? bits(x[0]) : take_part(&x[0]);
                const vu32 odd = sizeof(T) == 2 ? bits(x[1]) : take_part(&x[1]);
                store_words(out, (even >> 16) | odd, row_bytes / 4 - v);
            }
        }
    if (sizeof(T) == 2 || !has_special(largest)) return;
    for (int k = 0; k < min64(left, kStepElements); ++k)
        for (int row = 0; row < rows; ++row) {
            const float x = load1(in + k * k_stride + row);
            const ScalarParts parts = split_any(x);
            if (!is_finite(x)) mark(row);
            for (int part = 0; part < kParts; ++part)
                __builtin_memcpy(to + part * part_bytes + k / 2 * row_bytes + row * 4 + k % 2 * 2,
                                 &parts.part[part], 2);
        }
}

// A transposed 16 x 16 tile of words; of its rows the first row_bytes, as far apart.
RK_INLINE void transpose_tile(const char* from, char* to, int row_bytes = kTileRowBytes) {
    const float* const in = reinterpret_cast<const float*>(from);
    for (int i = 0; i * 4 < row_bytes; i += kLanes)
        for (int j = 0; j < kTileSide; j += kLanes) {
            vf32 block[kLanes];
#pragma GCC unroll 16
            for (int r = 0; r < kLanes; ++r) block[r] = load(in + (i + r) * kTileSide + j);
            transpose(block);
#pragma GCC unroll 16
            for (int r = 0; r < kLanes; ++r)
                store_words(to + (j + r) * row_bytes + i * 4, bits(block[r]), row_bytes / 4 - i);
        }
}

// pack_strip for rows that lie across K.
template <int kParts, class T>
inline void pack_strip_across(const T* in, int rows, int64_t k_stride, int64_t elements, int64_t steps,
                              char* tiles, uint8_t* nonfinite) {
    const int64_t part_bytes = steps * kPairBytes;
    alignas(64) char words[kParts][kTileBytes];
    for (int64_t step = 0; step < steps; ++step)
        for (int first = 0; first < kGroup32; first += kTileSide) {
            interleave_step<kParts>(in + step * kStepElements * k_stride + first, k_stride,
                                    int(max64(0, min64(kTileSide, rows - first))),
                                    elements - step * kStepElements, words[0], kTileRowBytes, kTileBytes,
                                    [&](int row) { nonfinite[first + row] = 1; });
            char* to = tiles + step * kPairBytes + first / kTileSide * kTileBytes;
            for (int part = 0; part < kParts; ++part, to += part_bytes) transpose_tile(words[part], to);
        }
}

// ---- tokens ----

// The right operand of a product: tokens, packed.
template <int kParts>
struct TokenTiles {
    TileLayout<kParts> layout;
    int64_t tokens;
    char* tiles;         // [panels][layout]
    uint8_t* nonfinite;  // [panels * 32], 1: the token has an infinity or NaN (kMarksSpecial)
    int row_bytes;       // of a tile

    RK_INLINE int64_t panels() const { return ceil_div(tokens, kGroup32); }
    RK_INLINE int real(int64_t panel) const { return int(min64(kGroup32, tokens - panel * kGroup32)); }
    RK_INLINE char* slab(int64_t panel, int64_t slab) const {
        return tiles + panel * layout.bytes() + layout.offset(slab);
    }
    // Where the two tiles of a step are; those of the next part lie part_bytes(slab of the step) further.
    RK_INLINE char* step(int64_t panel, int64_t step) const {
        const int64_t in_slab = step / kSlabSteps<kParts>;
        return slab(panel, in_slab) + (step - in_slab * kSlabSteps<kParts>)*layout.step_bytes;
    }
    // The first part's of a token.
    RK_INLINE char* tile(int64_t token, int64_t in_step) const {
        return step(token / kGroup32, in_step) + token % kGroup32 / kTileSide * kTileBytes;
    }
    RK_INLINE void mark(int64_t token) const { __atomic_store_n(nonfinite + token, 1, __ATOMIC_RELAXED); }
};

// Room for them in the calling thread's memory; valid until the next call for the same use.
template <int kParts>
inline TokenTiles<kParts> token_tiles(Use use, int64_t tokens, int64_t k_size) {
    // Rows closer than lines of the cache are loaded in two halves: with one part that costs more than it saves.
    const int row_bytes = kParts == 1 || tokens > 8 ? kTileRowBytes : tokens > 4 ? 32 : 16;
    const TileLayout<kParts> layout(k_size, tokens > kTileSide ? kPairBytes : kTileSide * row_bytes);
    const int64_t panels = ceil_div(tokens, kGroup32);
    Scratch& memory = thread_scratch(use);
    const int64_t bytes =
        panels * layout.bytes() + kTileRowBytes - row_bytes;  // the last row is loaded whole
    memory.reset(size_t(bytes + panels * kGroup32), 2);
    char* const tiles = memory.take<char>(bytes);
    uint8_t* const nonfinite = memory.take<uint8_t>(panels * kGroup32);
    __builtin_memset(nonfinite, 0, size_t(panels * kGroup32));
    return {layout, tokens, tiles, nonfinite, row_bytes};
}

// One step of 16 tokens (of which `rows` are there).
template <int kParts, class T>
inline void pack_token_step(const TokenTiles<kParts>& out, const T* x, int64_t stride, int64_t token,
                            int rows, int64_t step, int64_t left) {
    alignas(64) char halves[kParts][kTileBytes];
    char* const rows_of = halves[0];
    if (rows < kTileSide) __builtin_memset(halves, 0, sizeof halves);
    vu32 largest{};
    for (int r = 0; r < rows; ++r) {
        constexpr int kBytes = kStepElements * int(sizeof(T));
        for (int line = 0; line < kBytes; line += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(x + r * stride) + 4 * kBytes + line);
        largest = larger(largest,
                         split_step<kParts>(x + r * stride, left, rows_of + r * kTileRowBytes, kTileBytes));
    }
    if (has_special(largest))
        for (int r = 0; r < rows; ++r)
            if (split_special_step<kParts>(x + r * stride, left, rows_of + r * kTileRowBytes, kTileBytes))
                out.mark(token + r);
    char* to = out.tile(token, step);
    const int64_t part_bytes = out.layout.part_bytes(step / kSlabSteps<kParts>);
    for (int part = 0; part < kParts; ++part, to += part_bytes)
        transpose_tile(halves[part], to, out.row_bytes);
}

// x: [tokens, K], of strides of which one is 1.
template <int kParts, class T>
inline void pack_token_tiles(const TokenTiles<kParts>& out, const Matrix<T>& x) {
    const int64_t k_size = x.columns;
    const int64_t halves = ceil_div(out.tokens, kTileSide), steps = out.layout.steps;
    // For few tokens the threads share the steps.
    const int64_t runs = max64(1, min64(ceil_div(steps, 8), ceil_div(2 * num_threads(), halves)));
    parallel_for(0, halves * runs, 1 + 16384 / (kTileSide * k_size + 1), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t token = i / runs * kTileSide, run = i % runs;
            const int rows = int(min64(kTileSide, out.tokens - token));
            for (int64_t step = steps * run / runs; step < steps * (run + 1) / runs; ++step) {
                const int64_t k = step * kStepElements;
                const T* const from = x.data + token * x.row_stride + k * x.column_stride;
                if (x.column_stride == 1)
                    pack_token_step(out, from, x.row_stride, token, rows, step, k_size - k);
                else
                    interleave_step<kParts>(from, x.column_stride, rows, k_size - k, out.tile(token, step),
                                            out.row_bytes, out.layout.part_bytes(step / kSlabSteps<kParts>),
                                            [&](int row) { out.mark(token + row); });
            }
        }
    });
}

// Element k of a token, put together again from its parts.
template <int kParts>
RK_INLINE float token_element(const TokenTiles<kParts>& x, int64_t token, int64_t k) {
    const int64_t step = k / kStepElements, in_step = k % kStepElements;
    const char* at =
        x.tile(token, step) + in_step / 2 * x.row_bytes + token % kTileSide * 4 + in_step % 2 * 2;
    const int64_t part_bytes = x.layout.part_bytes(step / kSlabSteps<kParts>);
    float sum = 0.0f;
    for (int part = kParts - 1; part >= 0; --part) {
        uint16_t half;
        __builtin_memcpy(&half, at + part * part_bytes, 2);
        sum += bit_cast<float>(uint32_t(half) << 16);
    }
    return sum;
}

}  // namespace rk::cpu::RK_CPU_ISA
