// out[sequence] = max over its rows of log1p(relu(x weight^T + bias)), and its gradients, without the logits [T, V].
//
// log1p and relu never fall: so what is kept of a sequence is its largest logit and the row that has it, and the two are
// applied to [B, V] numbers at the end.
//
// Forward: a group of rows is packed once and meets the vocabulary in chunks. A block of logits (some megabytes, which stay
// in the caches) is then walked down its columns, which adds the bias and updates out and top_rows. Groups need not end with a
// sequence: what was found before is compared with what comes. On tiles (tile_products.h) where these are.
//
// Backward: of T logits of a sequence and word one has a gradient. So a row of weight's gradient is the sum over the sequences
// of that logit's row of x, and a row of x's gradient the sum over the words that it is the largest of: B V H multiply-adds
// each, where products would take T V H. Words without a gradient (relu's zeros, most of them) take no time. A sum's order
// is that of the sequences, or of the words: never that of the threads.
//
// Work: 2 T H V flops forward; up to 4 B H V backward, at the speed of the second-level cache.
#include "csrc/cpu/linear_log1p_max.h"

#include "csrc/cpu/gemm.h"
#if defined(RK_CPU_ISA_AMX)
#    include "csrc/cpu/tile_layers.h"
#endif

namespace rk::cpu::RK_CPU_ISA {
namespace {

constexpr float kMinusInfinity = -__builtin_inff();

template <class T>
Matrix<T> some_words(const LinearLog1pMaxArgs& a, int64_t first, int64_t count) {
    return row_major(static_cast<const T*>(a.weight) + first * a.hidden, count, a.hidden);
}

// The largest of a column of logits so far, of kLanes words, and its row. As torch's max: of equal ones the first, and a
// NaN is larger than any number.
struct Top {
    vf32 value;
    vi32 row;
    RK_INLINE void meet(vf32 logit, int32_t from) {
        const vi32 larger = (logit > value) | ((logit != logit) & (value == value));
        value = select(larger, logit, value);
        row = larger ? set1(from) : row;
    }
};

// Compares the logits of rows [top, bottom), all of one sequence, of `width` words from `word` on, with what was found.
template <class T>
RK_INLINE void meet_rows(const LinearLog1pMaxArgs& a, int64_t sequence, int64_t word, int width,
                         const float* logits, int64_t stride, int64_t first_row, int64_t count) {
    constexpr int kAtOnce = 4;
    const T* const bias = static_cast<const T*>(a.bias);
    float* const out = a.out + sequence * a.words + word;
    int32_t* const rows = a.top_rows + sequence * a.words + word;
    for (int from = 0; from < width; from += kAtOnce * kLanes) {
        Top top[kAtOnce];
        vf32 added[kAtOnce];
        for (int v = 0; v < kAtOnce; ++v) {
            const int at = from + v * kLanes, left = width - at;
            if (left <= 0) {
                top[v] = {zero(), lane_index()}, added[v] = zero();
                continue;
            }
            top[v] = {load_some(out + at, left),
                      bit_cast<vi32>(load_some(reinterpret_cast<const float*>(rows + at), left))};
            added[v] = bias == nullptr ? zero() : load_some(bias + word + at, left);
        }
        // Rows of logits are as long as blocks of words, so what is read past the last word is there.
        for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < kAtOnce; ++v)
                if (from + v * kLanes < width)
                    top[v].meet(load(logits + i * stride + from + v * kLanes) + added[v],
                                int32_t(first_row + i));
        for (int v = 0; v < kAtOnce; ++v) {
            const int at = from + v * kLanes, left = width - at;
            if (left <= 0) break;
            store_some(out + at, top[v].value, left);
            store_some(reinterpret_cast<float*>(rows + at), bit_cast<vf32>(top[v].row), left);
        }
    }
}

// A block of logits: of rows [first_row, + rows) and words [first, + count).
template <class T>
void meet_block(const LinearLog1pMaxArgs& a, int64_t first_row, int64_t rows, int64_t first, int64_t count) {
    constexpr int64_t kWide = 128;
    const int64_t stride = logits_stride(a.words_at_once), last_row = first_row + rows;
    parallel_for(0, ceil_div(count, kWide), 1, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            const int64_t column = block * kWide;
            const int width = int(min64(kWide, count - column));
            for (int64_t s = 0; s < a.sequences; ++s) {
                const int64_t top = max64(a.cu_seqlens[s], first_row);
                const int64_t bottom = min64(a.cu_seqlens[s + 1], last_row);
                if (top < bottom)
                    meet_rows<T>(a, s, first + column, width, a.logits + (top - first_row) * stride + column,
                                 stride, top, bottom - top);
            }
        }
    });
}

// f(first_row, rows) for groups of rows, as equal as can be.
template <class F>
void for_groups(const LinearLog1pMaxArgs& a, const F& f) {
    const int64_t groups = ceil_div(a.rows, a.rows_at_once);
    for (int64_t i = 0; i < groups; ++i) {
        const int64_t first = a.rows * i / groups;
        f(first, a.rows * (i + 1) / groups - first);
    }
}

template <class F>
void for_chunks(const LinearLog1pMaxArgs& a, const F& f) {
    for (int64_t first = 0; first < a.words; first += a.words_at_once)
        f(first, min64(a.words_at_once, a.words - first));
}

template <class T>
void multiply_and_meet(const LinearLog1pMaxArgs& a) {
    const int64_t stride = logits_stride(a.words_at_once);
    const Matrix<T> x = row_major(static_cast<const T*>(a.x), a.rows, a.hidden);
#if defined(RK_CPU_ISA_AMX)
    on_parts(a.bf16, [&](auto parts, auto element) {
        using Element = decltype(element);
        if constexpr (sizeof(Element) == sizeof(T))
            for_groups(a, [&](int64_t first_row, int64_t rows) {
                const auto tiles = token_tiles<parts()>(Use::right_operand, rows, a.hidden);
                pack_token_tiles(tiles, x.some_rows(first_row, rows));
                for_chunks(a, [&](int64_t first, int64_t count) {
                    const Matrix<T> words = some_words<T>(a, first, count);
                    multiply_tiles<T, parts()>(&words, 1, tiles,
                                               StoreBlocks<float>{a.logits, stride, {0}, {nullptr}});
                    meet_block<T>(a, first_row, rows, first, count);
                });
            });
    });
#else
    if (a.rows <= kFewRows<T>) {
        for_chunks(a, [&](int64_t first, int64_t count) {
            multiply_few_rows(x, some_words<T>(a, first, count), StoreTile<float>{a.logits, stride, nullptr});
            meet_block<T>(a, 0, a.rows, first, count);
        });
        return;
    }
    for_groups(a, [&](int64_t first_row, int64_t rows) {
        const RowPanels panels(rows, words_of<T>(a.hidden));
        float* const packed = thread_scratch(Use::left_operand).words(rows * panels.k_words);
        pack_a(x.some_rows(first_row, rows), panels, packed);
        for_chunks(a, [&](int64_t first, int64_t count) {
            multiply_packed(panels, packed, some_words<T>(a, first, count),
                            StoreTile<float>{a.logits, stride, nullptr});
            meet_block<T>(a, first_row, rows, first, count);
        });
    });
#endif
}

// f(at, width) for blocks of [B, V], by all threads.
template <class F>
void for_blocks(const LinearLog1pMaxArgs& a, const F& f) {
    constexpr int64_t kWide = 4096;
    const int64_t wide = ceil_div(a.words, kWide);
    parallel_for(0, a.sequences * wide, 1, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            const int64_t word = block % wide * kWide;
            f(block / wide * a.words + word, min64(kWide, a.words - word));
        }
    });
}

template <class T>
void forward(const LinearLog1pMaxArgs& a) {
    for_blocks(a, [&](int64_t at, int64_t width) {
        for (int64_t i = at; i < at + width; ++i) a.out[i] = kMinusInfinity, a.top_rows[i] = -1;
    });
    multiply_and_meet<T>(a);
    for_blocks(a, [&](int64_t at, int64_t width) {
        for (int64_t i = at; i < at + width; ++i)
            a.out[i] = a.out[i] <= 0.0f ? 0.0f : __builtin_log1pf(a.out[i]);  // of a NaN, a NaN
    });
}

// The gradient of each sequence's and word's largest logit z: grad_out / (1 + z), which is grad_out exp(-out); zero where
// relu's is.
void slopes(const LinearLog1pMaxArgs& a) {
    for_blocks(a, [&](int64_t at, int64_t width) {
        for (int64_t i = 0; i < width; i += kLanes) {
            const int left = int(min64(kLanes, width - i));
            const vf32 out = load_some(a.out + at + i, left);
            const vi32 row =
                bit_cast<vi32>(load_some(reinterpret_cast<const float*>(a.top_rows + at + i), left));
            const vf32 slope = load_some(a.grad_out + at + i, left) * exp(zero() - out);
            store_some(a.slopes + at + i, select((out == zero()) | (row < 0), zero(), slope), left);
        }
    });
}

// sum += factor * row
template <class T>
RK_INLINE void add_row(float* sum, float factor, const T* row, int64_t size) {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(sum + i, fma(set1(factor), load(row + i), load(sum + i)));
    if (i < size) {
        const int left = int(size - i);
        store_some(sum + i, fma(set1(factor), load_some(row + i, left), load_some(sum + i, left)), left);
    }
}

template <class T>
void store_row(const float* sum, T* row, int64_t size) {
    for (int64_t i = 0; i < size; i += kLanes) {
        const int left = int(min64(kLanes, size - i));
        store_some(row + i, load_some(sum + i, left), left);
    }
}

// A sum of rows, of which every kTerms are summed by themselves: the error grows as that of a blocked sum.
constexpr int32_t kTerms = 64;
RK_INLINE void move_sum(float* some, float* total, int64_t size) {
    add_row(total, 1.0f, some, size);
    for (int64_t i = 0; i < size; ++i) some[i] = 0.0f;
}

template <class T>
void of_weight_and_bias(const LinearLog1pMaxArgs& a) {
    const T* const x = static_cast<const T*>(a.x);
    parallel_for(0, a.words, 64, [&](int64_t begin, int64_t end) {
        float* const some = thread_scratch(Use::sums).words(2 * a.hidden);
        float* const total = some + a.hidden;
        for (int64_t i = 0; i < a.hidden; ++i) some[i] = 0.0f;
        for (int64_t word = begin; word < end; ++word) {
            float of_bias = 0.0f;
            for (int64_t i = 0; i < a.hidden; ++i) total[i] = 0.0f;
            for (int64_t first = 0; first < a.sequences; first += kTerms) {
                float some_bias = 0.0f;
                for (int64_t s = first; s < min64(a.sequences, first + kTerms); ++s) {
                    const float slope = a.slopes[s * a.words + word];
                    if (slope == 0.0f) continue;
                    some_bias += slope;
                    if (a.grad_weight != nullptr)
                        add_row(some, slope, x + a.top_rows[s * a.words + word] * a.hidden, a.hidden);
                }
                of_bias += some_bias;
                if (a.grad_weight != nullptr) move_sum(some, total, a.hidden);
            }
            if (a.grad_weight != nullptr)
                store_row(total, static_cast<T*>(a.grad_weight) + word * a.hidden, a.hidden);
            if (a.grad_bias != nullptr) store1(static_cast<T*>(a.grad_bias) + word, of_bias);
        }
    });
}

template <class T>
void of_x(const LinearLog1pMaxArgs& a) {
    const T* const weight = static_cast<const T*>(a.weight);
    // A task: a sequence, and a part of the columns where there are more threads than sequences. All of them walk the same
    // few words, which then come from the second-level cache.
    const int64_t parts = max64(1, min64(a.hidden / 64, ceil_div(2 * num_threads(), max64(1, a.sequences))));
    constexpr int64_t kWords = 256;
    float *const some = a.grad_sum, *const total = a.grad_sum + a.rows * a.hidden;
    float* const terms = thread_scratch(Use::sums).words(parts * a.rows);  // in `some`, of each part and row
    for (int64_t i = 0; i < 2 * a.rows * a.hidden; ++i) some[i] = 0.0f;
    for (int64_t i = 0; i < parts * a.rows; ++i) terms[i] = 0.0f;
    for (int64_t first = 0; first < a.words; first += kWords) {
        const int64_t last = min64(a.words, first + kWords);
        parallel_tasks(a.sequences * parts, num_threads(), [&](int64_t task) {
            const int64_t sequence = task / parts, part = task % parts;
            const int64_t left = a.hidden * part / parts, size = a.hidden * (part + 1) / parts - left;
            for (int64_t word = first; word < last; ++word) {
                const float slope = a.slopes[sequence * a.words + word];
                if (slope == 0.0f) continue;
                const int64_t row = a.top_rows[sequence * a.words + word], at = row * a.hidden + left;
                add_row(some + at, slope, weight + word * a.hidden + left, size);
                float& count = terms[part * a.rows + row];
                if (++count == float(kTerms)) move_sum(some + at, total + at, size), count = 0.0f;
            }
        });
    }
    move_sum(some, total, a.rows * a.hidden);
    store_row(total, static_cast<T*>(a.grad_x), a.rows * a.hidden);
}

template <class T>
void backward(const LinearLog1pMaxArgs& a) {
    slopes(a);
    if (a.grad_weight != nullptr || a.grad_bias != nullptr) of_weight_and_bias<T>(a);
    of_x<T>(a);
}

}  // namespace

void linear_log1p_max_forward(const LinearLog1pMaxArgs& a) {
    a.bf16 ? forward<bf16>(a) : forward<float>(a);
}

void linear_log1p_max_backward(const LinearLog1pMaxArgs& a) {
    a.bf16 ? backward<bf16>(a) : backward<float>(a);
}

}  // namespace rk::cpu::RK_CPU_ISA
