// Weights that are packed once, and products with them: the panels of gemm.h, [columns / kColumns][K words]
// [kColumns], with the numbers in one of four forms.
//
//   float32       as they are; the micro-kernel reads the panels in place
//   bfloat16      rounded, half the bytes; a product with float32 rows, in float32
//   int8          w = scale q, q from -127 to 127, with a scale for every kGroup elements of a row (which
//                 rounds a third less away than one for the row); 9 bits an element; likewise in float32
//   int8_dynamic  w = scale q with one scale for the row; the left operand is rounded too, each row by
//                 itself, to x = scale (u - zero), u from 0 to 255, and the sums are of integers, exact:
//                 sum x w = scale_x scale_w (sum u q - zero sum q)
//
// A narrow form is widened in the micro-kernel as it is read where few rows are multiplied (reading it is
// then what takes the time); with more rows a task widens a block of columns once, into its own memory, and
// reads that.
//
// After the panels stand, for int8, scale [panels][groups][kColumns]; for int8_dynamic scale [N] and sum q
// [N] (int32), both padded to whole panels.
//
// Where there are tiles, int8_dynamic has the layout of whole_tiles.h in place of panels, and its product is there.
#pragma once
#include "csrc/cpu/int8.h"
#include "csrc/cpu/weight_kinds.h"
#if defined(RK_CPU_ISA_AMX)
#    include "csrc/cpu/whole_tiles.h"
#endif

namespace rk::cpu::RK_CPU_ISA {

// ---- layout ----

RK_INLINE int64_t padded_columns(int64_t n) {
#if defined(RK_CPU_ISA_AMX)
    return whole_padded(ceil_div(n, kColumns) * kColumns);
#else
    return ceil_div(n, kColumns) * kColumns;
#endif
}
RK_INLINE int64_t words_along_k(WeightKind kind, int64_t k) {
    return kind == WeightKind::int8_dynamic ? ceil_div(k, kWholePerWord) : k;
}
RK_INLINE int64_t bytes_of_word(WeightKind kind) {
    switch (kind) {
        case WeightKind::float32:
            return 4;
        case WeightKind::bfloat16:
            return 2;
        case WeightKind::int8:
            return 1;
        default:
            return kWholePerWord;
    }
}
RK_INLINE int64_t bytes_of_panels(WeightKind kind, int64_t n, int64_t k) {
#if defined(RK_CPU_ISA_AMX)
    if (kind == WeightKind::int8_dynamic) return bytes_of_whole_tiles(n, k);
#endif
    return ceil_div(padded_columns(n) * words_along_k(kind, k) * bytes_of_word(kind), 64) * 64;
}
constexpr int64_t kGroup = 32;
static_assert(kChunk % kGroup == 0, "a step along K starts with a group");
RK_INLINE int64_t groups_of(int64_t k) {
    return ceil_div(k, kGroup);
}
RK_INLINE bool is_int8(WeightKind kind) {
    return kind == WeightKind::int8 || kind == WeightKind::int8_dynamic;
}
RK_INLINE int64_t bytes_of_weight(WeightKind kind, int64_t n, int64_t k) {
    const int64_t scales = kind == WeightKind::int8           ? 4 * padded_columns(n) * groups_of(k)
                           : kind == WeightKind::int8_dynamic ? 8 * padded_columns(n)
                                                              : 0;
    return bytes_of_panels(kind, n, k) + scales;
}
RK_INLINE float* scales_of(char* panels, WeightKind kind, int64_t n, int64_t k) {
    return reinterpret_cast<float*>(panels + bytes_of_panels(kind, n, k));
}
RK_INLINE int32_t* sums_of(char* panels, int64_t n, int64_t k) {
    return reinterpret_cast<int32_t*>(scales_of(panels, WeightKind::int8_dynamic, n, k) + padded_columns(n));
}

// Rounds `count` elements, the largest of which becomes 127 or -127; returns the scale, NaN where an element
// is infinite or NaN. place(i): where q of element i goes.
template <class Place>
RK_INLINE float round_to_int8(const float* in, int64_t count, const Place& place) {
    float largest = 0.0f, nonfinite = 0.0f;
    for (int64_t k = 0; k < count; ++k) {
        const float size = in[k] < 0.0f ? -in[k] : in[k];
        largest = size > largest ? size : largest;
        nonfinite += in[k] - in[k];
    }
    const float inverse = largest > 0.0f && nonfinite == 0.0f ? 127.0f / largest : 0.0f;
    for (int64_t k = 0; k < count; ++k) {
        const float scaled = inverse > 0.0f ? in[k] * inverse : 0.0f;
        *place(k) = int8_t(scaled + (scaled < 0.0f ? -0.5f : 0.5f));
    }
    return largest / 127.0f + nonfinite;
}

// One row of a weight, at its column of a panel.
inline void pack_int8_row(const PackWeightArgs& a, int64_t row) {
    const float* in = a.weight + row * a.columns;
    const int64_t panel = row / kColumns, column = row % kColumns;
    float* scales = scales_of(a.panels, a.kind, a.rows, a.columns);
    int8_t* numbers = reinterpret_cast<int8_t*>(a.panels);
    if (a.kind == WeightKind::int8) {
        numbers += panel * kColumns * a.columns + column;
        for (int64_t group = 0; group < groups_of(a.columns); ++group) {
            const int64_t k = group * kGroup;
            scales[(panel * groups_of(a.columns) + group) * kColumns + column] =
                round_to_int8(in + k, min64(kGroup, a.columns - k),
                              [&](int64_t i) { return numbers + (k + i) * kColumns; });
        }
        return;
    }
#if defined(RK_CPU_ISA_AMX)
    const int64_t steps = whole_steps(a.columns), padded = steps * kWholeStep;
    const auto place = [&](int64_t k) { return numbers + place_in_strips(row, k, steps); };
#else
    const int64_t words = words_along_k(a.kind, a.columns), padded = words * kWholePerWord;
    numbers += (panel * words * kColumns + column) * kWholePerWord;
    const auto place = [&](int64_t k) {
        return numbers + k / kWholePerWord * kColumns * kWholePerWord + k % kWholePerWord;
    };
#endif
    scales[row] = round_to_int8(in, a.columns, place);
    int32_t* sum = sums_of(a.panels, a.rows, a.columns) + row;
    *sum = 0;
    for (int64_t k = 0; k < a.columns; ++k) *sum += *place(k);
    for (int64_t k = a.columns; k < padded; ++k) *place(k) = 0;
}

inline void pack_panels(const PackWeightArgs& a) {
    const int64_t words = words_along_k(a.kind, a.columns);
    char* const panels = a.panels;
    // Columns beyond the last row are zero, and so are their scales.
    if (is_int8(a.kind) && a.rows != padded_columns(a.rows))
        __builtin_memset(panels, 0, size_t(bytes_of_weight(a.kind, a.rows, a.columns)));
    parallel_for(0, ceil_div(a.rows, kColumns), 1, [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel) {
            const int64_t first = panel * kColumns;
            if (is_int8(a.kind)) {
                const int64_t real = min64(kColumns, a.rows - first);
                for (int64_t i = 0; i < real; ++i) pack_int8_row(a, first + i);
                continue;
            }
            const Matrix<float> weight = row_major(a.weight, a.rows, a.columns);
            if (a.kind == WeightKind::float32) {
                pack_b_panel(weight, first, 0, words, reinterpret_cast<float*>(panels) + first * words);
                continue;
            }
            bf16* out = reinterpret_cast<bf16*>(panels) + first * words;
            float* chunk = thread_scratch(Use::column_block).words(kChunk * kColumns);
            for (int64_t k = 0; k < words; k += kChunk) {
                const int64_t here = min64(kChunk, words - k);
                pack_b_panel(weight, first, k, here, chunk);
                for (int64_t i = 0; i < here * kColumns; i += kLanes)
                    store(out + k * kColumns + i, load(chunk + i));
            }
        }
    });
}

// ---- right operands ----

// Panels read where they are.
template <class Form>
struct InPlace {
    static constexpr bool kCopies = false;
    const Form* panels;
    int64_t columns, k_words;
    RK_INLINE Reader<Form> reader(int64_t panel, int64_t k) const {
        return {panels + (panel * k_words + k) * kColumns};
    }
};

// The same for numbers with a scale for every group.
struct ScaledReader {
    static constexpr int kBytes = kColumns;
    const int8_t* at;
    const float* scales;  // of the panel
    int64_t k;
    RK_INLINE vf32 vector(int v) const {
        return load(at + v * kLanes) * load(scales + k / kGroup * kColumns + v * kLanes);
    }
    RK_INLINE void step() { at += kColumns, ++k; }
    RK_INLINE ScaledReader from(int64_t steps) const { return {at + steps * kColumns, scales, k + steps}; }
};
struct InPlaceScaled {
    static constexpr bool kCopies = false;
    const int8_t* panels;
    const float* scales;
    int64_t columns, k_words;
    RK_INLINE ScaledReader reader(int64_t panel, int64_t k) const {
        return {panels + (panel * k_words + k) * kColumns, scales + panel * groups_of(k_words) * kColumns, k};
    }
};

// Panels widened to words by the task that needs them.
template <class Narrow>
struct Widened {
    static constexpr bool kCopies = true;
    Narrow narrow;
    int64_t columns;
    RK_INLINE void copy(int64_t panel, int64_t k, int64_t k_words, float* out) const {
        auto reader = narrow.reader(panel, k);
        for (int64_t i = 0; i < k_words; ++i, reader.step(), out += kColumns)
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) store(out + v * kLanes, reader.vector(v));
    }
};

// ---- left operands ----

// Rows of a left operand, packed for a weight of some kind.
struct LeftOperand {
    RowPanels panels;
    const float* words;   // where there are tiles and numbers are whole: those of WholeRows
    const float* scale;   // [rows]; for int8_dynamic, as is
    const int32_t* zero;  // [rows]
    int64_t rows;
};

// Rounds one row to integers: x ~ scale (u - zero), u from 0 to 255. Zero is an integer of it, so
// that what is exactly zero stays so. A row with an infinity or a NaN has the scale NaN. numbers: [K],
// rounded up to whole words.
inline void round_row(const float* x, int64_t k_size, float* scale, int32_t* zero_at, float* numbers) {
    vf32 low = zero(), high = zero(), nonfinite = zero();
    int64_t k = 0;
    const auto look = [&](vf32 v) __attribute__((always_inline)) {
        low = vmin(v, low);
        high = vmax(v, high);
        nonfinite += v - v;
    };
    for (; k + kLanes <= k_size; k += kLanes) look(load(x + k));
    if (k < k_size) look(load_partial(x + k, int(k_size - k)));
    const float top = hmax(high), bottom = -hmax(-low), wrong = hsum(nonfinite);
    const float step = (top - bottom) / 255.0f;
    const bool flat = !(step > 1e-30f) || wrong != 0.0f;  // also where the inverse would overflow
    const float inverse = flat ? 0.0f : 1.0f / step;
    const float shift = flat ? 0.0f : -bottom * inverse;
    const int32_t whole_shift = int32_t(shift + 0.5f);
    *scale = (flat ? 0.0f : step) + wrong;
    *zero_at = whole_shift;
    const vf32 half = set1(float(whole_shift) + 0.5f), most = set1(255.0f);
    const auto rounded = [&](vf32 v) __attribute__((always_inline)) {
        const vf32 u = vmin(most, vmax(zero(), fma(v, set1(inverse), half)));
        return __builtin_convertvector(u, vi32);
    };
    int32_t* out = reinterpret_cast<int32_t*>(numbers);
    for (k = 0; k + kLanes <= k_size; k += kLanes) {
        const vi32 u = rounded(flat ? zero() : load(x + k));
        __builtin_memcpy(out + k, &u, sizeof u);
    }
    for (; k < k_size; k += kLanes) {
        const vi32 u = rounded(flat ? zero() : load_partial(x + k, int(k_size - k)));
        __builtin_memcpy(out + k, &u, sizeof u);
    }
}

// The words of a row of integers, each `height` words from the last.
inline void pack_whole_row(const int32_t* numbers, int64_t words, uint32_t* out, int height) {
    constexpr int kBits = 32 / kWholePerWord;
    for (int64_t w = 0; w < words; ++w) {
        uint32_t word = 0;
        for (int i = 0; i < kWholePerWord; ++i)
            word |= uint32_t(numbers[w * kWholePerWord + i]) << (kBits * i);
        out[w * height] = word;
    }
}

#if defined(RK_CPU_ISA_AMX)
// The rows of pack_left as tiles.
inline LeftOperand pack_whole_left(const RowPanels& panels, const float* x, int64_t count, int64_t k_size,
                                   int64_t stride) {
    const int64_t steps = whole_steps(k_size), groups = ceil_div(count, 2 * kTileSide) * 2;
    const int64_t bytes = groups * steps * kTileBytes;
    float* const packed = thread_scratch(Use::left_operand).words(bytes / 4 + 2 * count);
    float* const scale = packed + bytes / 4;
    int32_t* const zero_at = reinterpret_cast<int32_t*>(scale + count);
    parallel_for(0, groups, 1 + 8192 / (kTileSide * k_size + 1), [&](int64_t begin, int64_t end) {
        float* const numbers = thread_scratch(Use::column_block).words(k_size + kLanes);
        for (int64_t group = begin; group < end; ++group) {
            uint8_t* const tiles = reinterpret_cast<uint8_t*>(packed) + group * steps * kTileBytes;
            const int64_t first = group * kTileSide, here = max64(0, min64(kTileSide, count - first));
            if (here < kTileSide || k_size % kWholeStep != 0)
                __builtin_memset(tiles, 0, size_t(steps * kTileBytes));
            for (int64_t r = 0; r < here; ++r) {
                round_row(x + (first + r) * stride, k_size, scale + first + r, zero_at + first + r, numbers);
                put_whole_row(reinterpret_cast<const int32_t*>(numbers), k_size, tiles + r * kTileRowBytes);
            }
        }
    });
    return {panels, packed, scale, zero_at, count};
}
#endif

// Packs rows [count, K] at x (rows `stride` apart) for a weight of this kind, into the calling thread's
// memory, where they stay until the next call.
inline LeftOperand pack_left(WeightKind kind, const float* x, int64_t count, int64_t k_size, int64_t stride) {
    const RowPanels panels(count, words_along_k(kind, k_size));
    if (kind != WeightKind::int8_dynamic) {
        float* packed = thread_scratch(Use::left_operand).words(count * panels.k_words);
        pack_a(Matrix<float>{x, count, k_size, stride, 1}, panels, packed);
        return {panels, packed, nullptr, nullptr, count};
    }
#if defined(RK_CPU_ISA_AMX)
    return pack_whole_left(panels, x, count, k_size, stride);
#else
    float* packed = thread_scratch(Use::left_operand).words(count * (panels.k_words + 2));
    float* scale = packed + count * panels.k_words;
    int32_t* zero_at = reinterpret_cast<int32_t*>(scale + count);
    parallel_for(0, panels.count, 1 + 8192 / (panels.base * k_size + 1), [&](int64_t begin, int64_t end) {
        float* numbers = thread_scratch(Use::column_block).words(k_size + kLanes + kWholePerWord);
        for (int64_t i = begin; i < end; ++i)
            for (int r = 0; r < panels.height(i); ++r) {
                const int64_t row = panels.first(i) + r;
                round_row(x + row * stride, k_size, scale + row, zero_at + row, numbers);
                pack_whole_row(reinterpret_cast<const int32_t*>(numbers), panels.k_words,
                               reinterpret_cast<uint32_t*>(packed + panels.offset(i)) + r, panels.height(i));
            }
    });
    return {panels, packed, scale, zero_at, count};
#endif
}

// ---- products ----

// Rows above which a narrow weight is widened once a task, not once for each panel of rows.
constexpr int64_t kWidenAbove = 4 * kRows;

template <class Form>
RK_INLINE InPlace<Form> in_place(const PackedWeight& w, const LeftOperand& left) {
    return {reinterpret_cast<const Form*>(w.panels), w.rows, left.panels.k_words};
}

template <class Narrow, class Epilogue>
RK_INLINE void multiply_narrow(const Narrow& narrow, const LeftOperand& left, const Epilogue& epilogue) {
    if (left.panels.base * left.panels.count + left.panels.extra <= kWidenAbove)
        multiply_panels<float>(left.panels, left.words, narrow, epilogue);
    else
        multiply_panels<float>(left.panels, left.words, Widened<Narrow>{narrow, narrow.columns}, epilogue);
}

// C = A W^T; the epilogue is gemm.h's.
template <class Epilogue>
inline void multiply_weight(const PackedWeight& w, const LeftOperand& left, const Epilogue& epilogue) {
    switch (w.kind) {
        case WeightKind::float32:
            return multiply_panels<float>(left.panels, left.words, in_place<float>(w, left), epilogue);
        case WeightKind::bfloat16:
            return multiply_narrow(in_place<bf16>(w, left), left, epilogue);
        case WeightKind::int8:
            return multiply_narrow(
                InPlaceScaled{reinterpret_cast<const int8_t*>(w.panels),
                              scales_of(const_cast<char*>(w.panels), w.kind, w.rows, w.columns), w.rows,
                              w.columns},
                left, epilogue);
        case WeightKind::int8_dynamic:
            break;
    }
    const float* scales = scales_of(const_cast<char*>(w.panels), w.kind, w.rows, w.columns);
    const int32_t* sums = sums_of(const_cast<char*>(w.panels), w.rows, w.columns);
#if defined(RK_CPU_ISA_AMX)
    multiply_whole_tiles(
        WholeWeight{w.panels, scales, sums, w.rows, w.columns},
        WholeRows{reinterpret_cast<const uint8_t*>(left.words), left.scale, left.zero, left.rows}, epilogue);
#else
    multiply_panels<Whole>(
        left.panels, left.words, in_place<WholeWord>(w, left),
        [&](int64_t row, int64_t column, int rows, int width, const float* tile) {
            alignas(64) float scaled[kRows * kColumns];
            for (int v = 0; v < kColumns; v += kLanes) {
                const vf32 scale = load(scales + column + v);
                const vi32 sum = (vi32)load(reinterpret_cast<const float*>(sums) + column + v);
                for (int i = 0; i < rows; ++i) {
                    const vi32 whole = (vi32)load(tile + i * kColumns + v);
                    store(scaled + i * kColumns + v,
                          scale_whole(whole, sum, left.zero[row + i], scale, left.scale[row + i]));
                }
            }
            epilogue(row, column, rows, width, static_cast<const float*>(scaled));
        });
#endif
}

}  // namespace rk::cpu::RK_CPU_ISA
