// loss = cross_entropy(x weight^T + bias, labels), and its gradients, without the logits [T, V].
//
// Forward goes over the vocabulary in chunks. The epilogue of x weight^T has a tile of a few rows by kColumns words in the
// first-level cache: it adds the bias, and keeps of each row the largest logit and the sum of exponentials above it. These
// two numbers for every kColumns logits are all that reaches memory; after each chunk they are put together, in the order
// of the words. (The logit of the label is written by whichever tile has it.)
//
// Backward multiplies a chunk again; now the epilogue knows the row's largest logit and log-sum, and writes the gradient of
// the logits, (softmax - onehot) * grad_loss, which never exists for more than a chunk. From it come, by the same GEMM, the
// chunk's rows of weight's gradient, written once, and the chunk's share of x's, added in float32 in the order of the words.
//
// Work: 2 T H V flops forward and 6 T H V backward. An exponential costs some 15 vector operations for kLanes logits, each of
// which is H multiply-adds: 2% at H = 768.
#include "csrc/cpu/linear_cross_entropy.h"

#include "csrc/cpu/gemm.h"
#include "csrc/cpu/sum_rows.h"

namespace rk::cpu::RK_CPU_ISA {
namespace {

constexpr float kMinusInfinity = -__builtin_inff();

// f(first, count) for chunks of the vocabulary.
template <class F>
void for_chunks(const LinearCrossEntropyArgs& a, const F& f) {
    for (int64_t first = 0; first < a.words; first += a.words_at_once)
        f(first, min64(a.words_at_once, a.words - first));
}

template <class T>
Matrix<T> some_words(const LinearCrossEntropyArgs& a, int64_t first, int64_t count) {
    return row_major(static_cast<const T*>(a.weight) + first * a.hidden, count, a.hidden);
}

// The logits of up to kLanes words of the tile, from its column j on, of which `left` are there.
template <class T>
RK_INLINE vf32 logits_of(const float* tile, const T* bias, int64_t word, int i, int j, int left) {
    const vf32 product = load(tile + i * kColumns + j);
    return bias == nullptr ? product : product + load_some(bias + word + j, left);
}

// What is subtracted before exp: the largest logit, unless it is minus infinity (then every exponential is zero).
RK_INLINE vf32 finite(vf32 largest) {
    return select(largest > set1(kMinusInfinity), largest, zero());
}

// Puts the tiles' largest logits and sums of a chunk together with those before it. partials: [2, tiles, rows].
void merge(const LinearCrossEntropyArgs& a, int64_t tiles) {
    parallel_for(0, ceil_div(a.rows, kLanes), 1, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            const int64_t row = block * kLanes;
            const int left = int(min64(kLanes, a.rows - row));
            const float *tops = a.partials + row, *sums = tops + tiles * a.rows;
            const vf32 before = load_some(a.largest + row, left);
            vf32 largest = before;
            for (int64_t t = 0; t < tiles; ++t) largest = vmax(largest, load_some(tops + t * a.rows, left));
            const vf32 shift = finite(largest);
            vf32 sum = load_some(a.log_sum + row, left) * exp(before - shift);
            for (int64_t t = 0; t < tiles; ++t)
                sum = fma(load_some(sums + t * a.rows, left), exp(load_some(tops + t * a.rows, left) - shift),
                          sum);
            store_some(a.largest + row, largest, left);
            store_some(a.log_sum + row, sum, left);  // its logarithm at the end
        }
    });
}

template <class T>
void forward(const LinearCrossEntropyArgs& a) {
    const T* const bias = static_cast<const T*>(a.bias);
    for (int64_t row = 0; row < a.rows; ++row) a.largest[row] = kMinusInfinity, a.log_sum[row] = 0.0f;
    for_chunks(a, [&](int64_t first, int64_t count) {
        const int64_t tiles = ceil_div(count, kColumns);
        multiply(row_major(static_cast<const T*>(a.x), a.rows, a.hidden), some_words<T>(a, first, count),
                 [&](int64_t row, int64_t column, int rows, int width, const float* tile) {
                     const int64_t word = first + column;
                     float *tops = a.partials + column / kColumns * a.rows + row,
                           *sums = tops + tiles * a.rows;
                     for (int i = 0; i < rows; ++i) {
                         vf32 logits[kVectors], top = set1(kMinusInfinity), sum = zero();
#pragma GCC unroll 4
                         for (int v = 0; v < kVectors; ++v) {
                             const int left = width - v * kLanes;
                             logits[v] = set1(kMinusInfinity);
                             if (left > 0) {
                                 logits[v] = logits_of(tile, bias, word, i, v * kLanes, left);
                                 if (left < kLanes)
                                     logits[v] = select(lane_index() < set1(int32_t(left)), logits[v],
                                                        set1(kMinusInfinity));
                             }
                             top = vmax(top, logits[v]);
                         }
                         const float largest = hmax(top);
                         const vf32 shift = finite(set1(largest));
#pragma GCC unroll 4
                         for (int v = 0; v < kVectors; ++v) sum += exp(logits[v] - shift);
                         tops[i] = largest;
                         sums[i] = hsum(sum);
                         const int64_t label = a.labels[row + i] - word;
                         if (label >= 0 && label < width)
                             a.loss[row + i] = tile[i * kColumns + label] +
                                               (bias == nullptr ? 0.0f : load1(bias + word + label));
                     }
                 });
        merge(a, tiles);
    });
    for (int64_t row = 0; row < a.rows; ++row) {
        const float log_sum = __builtin_logf(a.log_sum[row]);
        a.log_sum[row] = log_sum;
        a.loss[row] = a.labels[row] == a.ignore_index ? 0.0f : (a.largest[row] - a.loss[row]) + log_sum;
    }
}

// Adds tiles to a float32 matrix [rows, columns].
struct AddTile {
    float* sums;
    int64_t columns;
    RK_INLINE void operator()(int64_t row, int64_t column, int rows, int width, const float* tile) const {
        for (int j = 0; j < width; j += kLanes)
            for (int i = 0; i < rows; ++i) {
                float* const to = sums + (row + i) * columns + column + j;
                store_some(to, load_some(to, width - j) + load(tile + i * kColumns + j), width - j);
            }
    }
};

// The gradient of the logits of a chunk: grad_logits, [rows, count].
template <class T>
void differentiate(const LinearCrossEntropyArgs& a, int64_t first, int64_t count) {
    const T* const bias = static_cast<const T*>(a.bias);
    multiply(row_major(static_cast<const T*>(a.x), a.rows, a.hidden), some_words<T>(a, first, count),
             [&](int64_t row, int64_t column, int rows, int width, const float* tile) {
                 const int64_t word = first + column;
                 for (int i = 0; i < rows; ++i) {
                     T* const to = static_cast<T*>(a.grad_logits) + (row + i) * count + column;
                     const int64_t label = a.labels[row + i];
                     const bool ignored = label == a.ignore_index;
                     const int64_t ahead = label - word;
                     const int32_t lane = ahead >= 0 && ahead < width ? int32_t(ahead) : -1;
                     const float largest = a.largest[row + i], log_sum = a.log_sum[row + i];
                     const float grad = a.grad_loss[row + i];
                     for (int j = 0; j < width; j += kLanes) {
                         const int left = width - j;
                         const vf32 logits = logits_of(tile, bias, word, i, j, left);
                         vf32 p = exp((logits - largest) - log_sum);
                         p = select(lane_index() == set1(lane - j), p - 1.0f, p);
                         store_some(to + j, ignored ? zero() : p * grad, left);
                     }
                 }
             });
}

template <class T>
void backward(const LinearCrossEntropyArgs& a) {
    const Matrix<T> x = row_major(static_cast<const T*>(a.x), a.rows, a.hidden);
    T* const grad_logits = static_cast<T*>(a.grad_logits);
    for (int64_t i = 0; i < a.rows * a.hidden; ++i) a.grad_sum[i] = 0.0f;
    for_chunks(a, [&](int64_t first, int64_t count) {
        differentiate<T>(a, first, count);
        const Matrix<T> grad = row_major<T>(grad_logits, a.rows, count);
        multiply(grad, some_words<T>(a, first, count).transposed(), AddTile{a.grad_sum, a.hidden});
        if (a.grad_weight != nullptr)
            multiply(grad.transposed(), x.transposed(),
                     StoreTile<T>{static_cast<T*>(a.grad_weight) + first * a.hidden, a.hidden, nullptr});
        if (a.grad_bias != nullptr)
            sum_rows(grad_logits, a.rows, count, static_cast<T*>(a.grad_bias) + first);
    });
    T* const grad_x = static_cast<T*>(a.grad_x);
    for (int64_t i = 0; i < a.rows * a.hidden; i += kLanes) {
        const int left = int(min64(kLanes, a.rows * a.hidden - i));
        store_some(grad_x + i, load_some(a.grad_sum + i, left), left);
    }
}

}  // namespace

void linear_cross_entropy_forward(const LinearCrossEntropyArgs& a) {
    a.bf16 ? forward<bf16>(a) : forward<float>(a);
}

void linear_cross_entropy_backward(const LinearCrossEntropyArgs& a) {
    a.bf16 ? backward<bf16>(a) : backward<float>(a);
}

}  // namespace rk::cpu::RK_CPU_ISA
