// Weights that are packed once, and products with them: the panels of gemm.h, [columns / kColumns][K words]
// [kColumns], with the numbers in one of four forms.
//
//   float32       as they are; the micro-kernel reads the panels in place
//   bfloat16      rounded, half the bytes; a product with float32 rows, in float32
//   int8          w = scale[row] q, q from -127 to 127; a quarter of the bytes; likewise in float32
//   int8_dynamic  the same q; the left operand is rounded too, each row by itself, to x = scale (u - zero), u
//   from 0
//                 to 255, and the sums are of whole numbers, exact: sum x w = scale_x scale_w (sum u q - zero
//                 sum q)
//
// A narrow form is widened in the micro-kernel as it is read where few rows are multiplied (reading it is
// then what takes the time); with more rows a task widens a block of columns once, into its own memory, and
// reads that.
//
// After the panels stand, for the int8 forms, scale [N] (float32) and sum q [N] (int32), both padded to whole
// panels.
#pragma once
#include "csrc/cpu/gemm.h"
#include "csrc/cpu/packed_encoder.h"

namespace rk::cpu::RK_CPU_ISA {

// ---- layout ----

RK_INLINE int64_t padded_columns(int64_t n) {
    return ceil_div(n, kColumns) * kColumns;
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
    return ceil_div(padded_columns(n) * words_along_k(kind, k) * bytes_of_word(kind), 64) * 64;
}
RK_INLINE bool is_int8(WeightKind kind) {
    return kind == WeightKind::int8 || kind == WeightKind::int8_dynamic;
}
RK_INLINE int64_t bytes_of_weight(WeightKind kind, int64_t n, int64_t k) {
    return bytes_of_panels(kind, n, k) + (is_int8(kind) ? 8 * padded_columns(n) : 0);
}
RK_INLINE float* scales_of(char* panels, WeightKind kind, int64_t n, int64_t k) {
    return reinterpret_cast<float*>(panels + bytes_of_panels(kind, n, k));
}

// One row of a weight, at its column of a panel: q and what it is multiplied by. The largest element becomes
// 127. A row with an infinity or a NaN has the scale NaN.
inline void pack_int8_row(const PackWeight& p, int64_t row) {
    const float* in = p.weight + row * p.columns;
    float largest = 0.0f, nonfinite = 0.0f;
    for (int64_t k = 0; k < p.columns; ++k) {
        const float size = in[k] < 0.0f ? -in[k] : in[k];
        largest = size > largest ? size : largest;
        nonfinite += in[k] - in[k];
    }
    float* scales = scales_of(p.panels, p.kind, p.rows, p.columns);
    int32_t* sums = reinterpret_cast<int32_t*>(scales + padded_columns(p.rows));
    scales[row] = largest / 127.0f + nonfinite;
    const float inverse = largest > 0.0f && nonfinite == 0.0f ? 127.0f / largest : 0.0f;
    const int64_t per_word = p.kind == WeightKind::int8_dynamic ? kWholePerWord : 1;
    const int64_t words = words_along_k(p.kind, p.columns);
    int8_t* out = reinterpret_cast<int8_t*>(p.panels) + row / kColumns * kColumns * words * per_word +
                  row % kColumns * per_word;
    sums[row] = 0;
    for (int64_t k = 0; k < words * per_word; ++k) {
        const float scaled = k < p.columns && inverse > 0.0f ? in[k] * inverse : 0.0f;
        const int q = int(scaled + (scaled < 0.0f ? -0.5f : 0.5f));
        sums[row] += q;
        out[k / per_word * kColumns * per_word + k % per_word] = int8_t(q);
    }
}

inline void pack_panels(const PackWeight& p) {
    const int64_t words = words_along_k(p.kind, p.columns);
    char* const panels = p.panels;
    parallel_for(0, ceil_div(p.rows, kColumns), 1, [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel) {
            const int64_t first = panel * kColumns;
            if (is_int8(p.kind)) {
                const int64_t real = min64(kColumns, p.rows - first);
                const int64_t bytes = words * kColumns * bytes_of_word(p.kind);
                if (real < kColumns) {
                    float* scales = scales_of(panels, p.kind, p.rows, p.columns);
                    int32_t* sums = reinterpret_cast<int32_t*>(scales + padded_columns(p.rows));
                    __builtin_memset(panels + panel * bytes, 0, size_t(bytes));
                    for (int64_t i = first + real; i < first + kColumns; ++i) scales[i] = 0.0f, sums[i] = 0;
                }
                for (int64_t i = 0; i < real; ++i) pack_int8_row(p, first + i);
                continue;
            }
            const Matrix<float> weight = row_major(p.weight, p.rows, p.columns);
            if (p.kind == WeightKind::float32) {
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
    using Stored = Form;
    static constexpr bool kCopies = false;
    const Form* panels;
    int64_t columns, k_words;
    RK_INLINE const Form* at(int64_t panel, int64_t k) const {
        return panels + (panel * k_words + k) * kColumns;
    }
};

// Panels widened to words by the task that needs them.
template <class Form>
struct Widened {
    using Stored = float;
    static constexpr bool kCopies = true;
    InPlace<Form> narrow;
    int64_t columns;
    RK_INLINE void copy(int64_t panel, int64_t k, int64_t k_words, float* out) const {
        const Form* from = narrow.at(panel, k);
        for (int64_t i = 0; i < k_words * kColumns; i += kLanes) store(out + i, load(from + i));
    }
};

// ---- left operands ----

// Rows of a left operand, packed for a weight of some kind.
struct LeftOperand {
    RowPanels panels;
    const float* words;
    const float* scale;   // [rows]; for int8_dynamic, as is
    const int32_t* zero;  // [rows]
};

// Rounds one row to whole numbers: x ~ scale (u - zero), u from 0 to 255. Zero is a whole number of it, so
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

// The words of a row of whole numbers, each `height` words from the last.
inline void pack_whole_row(const int32_t* numbers, int64_t words, uint32_t* out, int height) {
    constexpr int kBits = 32 / kWholePerWord;
    for (int64_t w = 0; w < words; ++w) {
        uint32_t word = 0;
        for (int i = 0; i < kWholePerWord; ++i)
            word |= uint32_t(numbers[w * kWholePerWord + i]) << (kBits * i);
        out[w * height] = word;
    }
}

// Packs rows [count, K] at x (rows `stride` apart) for a weight of this kind, into the calling thread's
// memory, where they stay until the next call.
inline LeftOperand pack_left(WeightKind kind, const float* x, int64_t count, int64_t k_size, int64_t stride) {
    const RowPanels panels(count, words_along_k(kind, k_size));
    if (kind != WeightKind::int8_dynamic) {
        float* packed = thread_scratch(Use::left_operand).words(count * panels.k_words);
        pack_a(Matrix<float>{x, count, k_size, stride, 1}, panels, packed);
        return {panels, packed, nullptr, nullptr};
    }
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
    return {panels, packed, scale, zero_at};
}

// ---- products ----

// Rows above which a narrow weight is widened once a task, not once for each panel of rows.
constexpr int64_t kWidenAbove = 4 * kRows;

template <class T, class Form, class Epilogue>
RK_INLINE void multiply_form(const PackedWeight& w, const LeftOperand& left, const Epilogue& epilogue) {
    const InPlace<Form> in_place{reinterpret_cast<const Form*>(w.panels), w.rows, left.panels.k_words};
    if (sizeof(Form) == 4 || left.panels.base * left.panels.count + left.panels.extra <= kWidenAbove)
        multiply_panels<T>(left.panels, left.words, in_place, epilogue);
    else if constexpr (sizeof(Form) < 4)
        multiply_panels<T>(left.panels, left.words, Widened<Form>{in_place, w.rows}, epilogue);
}

// C = A W^T; the epilogue is gemm.h's.
template <class Epilogue>
inline void multiply_weight(const PackedWeight& w, const LeftOperand& left, const Epilogue& epilogue) {
    if (w.kind == WeightKind::float32) return multiply_form<float, float>(w, left, epilogue);
    if (w.kind == WeightKind::bfloat16) return multiply_form<float, bf16>(w, left, epilogue);
    const float* scales = scales_of(const_cast<char*>(w.panels), w.kind, w.rows, w.columns);
    if (w.kind == WeightKind::int8)
        return multiply_form<float, int8_t>(
            w, left, [&](int64_t row, int64_t column, int rows, int width, const float* tile) {
                alignas(64) float scaled[kRows * kColumns];
                for (int v = 0; v < kColumns; v += kLanes) {
                    const vf32 scale = load(scales + column + v);
                    for (int i = 0; i < rows; ++i)
                        store(scaled + i * kColumns + v, load(tile + i * kColumns + v) * scale);
                }
                epilogue(row, column, rows, width, static_cast<const float*>(scaled));
            });
    const int32_t* sums = reinterpret_cast<const int32_t*>(scales + padded_columns(w.rows));
    multiply_form<Whole, WholeWord>(
        w, left, [&](int64_t row, int64_t column, int rows, int width, const float* tile) {
            alignas(64) float scaled[kRows * kColumns];
            for (int v = 0; v < kColumns; v += kLanes) {
                const vf32 scale = load(scales + column + v);
                const vi32 sum = (vi32)load(reinterpret_cast<const float*>(sums) + column + v);
                for (int i = 0; i < rows; ++i) {
                    const vi32 whole = (vi32)load(tile + i * kColumns + v) - sum * set1(left.zero[row + i]);
                    store(scaled + i * kColumns + v,
                          __builtin_convertvector(whole, vf32) * (scale * set1(left.scale[row + i])));
                }
            }
            epilogue(row, column, rows, width, static_cast<const float*>(scaled));
        });
}

}  // namespace rk::cpu::RK_CPU_ISA
