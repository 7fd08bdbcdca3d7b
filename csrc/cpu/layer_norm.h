// Layer normalisation (Ba et al. 2016) of one row that is in L1 as float32, and the fixed-order reduction of
// what its backward sums over rows: shared by add_layer_norm and embedding_layer_norm, which differ in how a
// row comes to be.
#pragma once
#include "csrc/cpu/scratch.h"
#include "csrc/cpu/simd.h"
#include "csrc/cpu/util.h"

namespace rk::cpu::RK_CPU_ISA {

// f(column, count): whole vectors first (count is then the constant kLanes), the ragged end last.
template <class F>
RK_INLINE void for_vectors(int64_t columns, const F& f) {
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) f(c, kLanes);
    if (c < columns) f(c, static_cast<int>(columns - c));
}

// f(column, count, multiplier, chain): the same with the dropout factors of a row, in turn for four chains of
// sums.
template <class Dropout, class F>
RK_INLINE void for_vectors_dropout(int64_t columns, const Dropout& dropout, int64_t row, const F& f) {
    for (int64_t c = 0; c < columns; c += 4 * kLanes) {
        vf32 multiplier[4];
        dropout_multiplier(dropout, static_cast<uint32_t>(c), static_cast<uint32_t>(row), 0, multiplier);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const int64_t left = columns - c - i * kLanes;
            if (left > 0)
                f(c + i * kLanes, left < kLanes ? static_cast<int>(left) : kLanes, multiplier[i], i);
        }
    }
}

// f(column, count, chain): vectors in turn for four independent chains of sums. A sum of H values in one
// chain would wait for every addition, and round H / kLanes times.
template <class F>
RK_INLINE void for_vectors_chained(int64_t columns, const F& f) {
    int64_t c = 0;
    for (; c + 4 * kLanes <= columns; c += 4 * kLanes)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) f(c + i * kLanes, kLanes, i);
    for (; c + kLanes <= columns; c += kLanes) f(c, kLanes, 0);
    if (c < columns) f(c, static_cast<int>(columns - c), 1);
}
RK_INLINE float chain_sum(const vf32* chains) {
    return hsum((chains[0] + chains[1]) + (chains[2] + chains[3]));
}

// Sums f(column, count) over a row; f gives zero in lanes beyond count.
template <class F>
RK_INLINE float sum_vectors(int64_t columns, const F& f) {
    vf32 sum[4] = {};
    for_vectors_chained(columns, [&](int64_t c, int count, int chain) { sum[chain] += f(c, count); });
    return chain_sum(sum);
}

struct RowStatistics {
    float mean, rstd;
};

// Two passes over the cached row: no cancellation, whatever the mean. total: the row's sum.
RK_INLINE RowStatistics row_statistics(const float* row, int64_t columns, float total, float eps) {
    const float mean = total / static_cast<float>(columns);
    const float squares = sum_vectors(columns, [&](int64_t c, int count) {
        vf32 d = load_some(row + c, count) - mean;
        if (count < kLanes) d = select(lane_index() < set1(int32_t(count)), d, vf32{});
        return d * d;
    });
    return {mean, 1.0f / __builtin_sqrtf(squares / static_cast<float>(columns) + eps)};
}

template <class T>
RK_INLINE vf32 normalised(const float* row, RowStatistics s, const T* weight, const T* bias, int64_t c,
                          int count) {
    const vf32 unit = (load_some(row + c, count) - s.mean) * s.rstd;
    return fma(unit, load_some(weight + c, count), load_some(bias + c, count));
}

// row(column, count) and grad(column, count) give the normalised row's input and its output's gradient, each
// once; sink(column, count, value) takes the input's gradient. unit and g: scratch rows. Adds to grad_weight
// and grad_bias.
template <class T, class Row, class Grad, class Sink>
RK_INLINE void layer_norm_row_backward(int64_t columns, RowStatistics s, const T* weight, const Row& row,
                                       const Grad& grad, float* unit, float* g, float* grad_weight,
                                       float* grad_bias, const Sink& sink) {
    vf32 sum_g[4] = {}, sum_gx[4] = {};
    for_vectors_chained(columns, [&](int64_t c, int count, int chain) {
        const vf32 x = (row(c, count) - s.mean) * s.rstd, dy = grad(c, count);
        const vf32 dx = dy * load_some(weight + c, count);
        store_some(grad_weight + c, fma(dy, x, load_some(grad_weight + c, count)), count);
        store_some(grad_bias + c, dy + load_some(grad_bias + c, count), count);
        sum_g[chain] += dx;  // zero beyond count, as the weight is there
        sum_gx[chain] = fma(dx, x, sum_gx[chain]);
        store_some(unit + c, x, count);
        store_some(g + c, dx, count);
    });
    const float n = static_cast<float>(columns);
    const vf32 mean_g = set1(chain_sum(sum_g) / n), mean_gx = set1(chain_sum(sum_gx) / n);
    for_vectors(columns, [&](int64_t c, int count) {
        const vf32 centred = load_some(g + c, count) - mean_g;
        sink(c, count, (centred - load_some(unit + c, count) * mean_gx) * s.rstd);
    });
}

// Rows are summed in chunks that depend on their number alone, then chunk by chunk: the same bits for any
// number of threads.
struct RowChunks {
    int64_t rows, chunk_rows, count;

    explicit RowChunks(int64_t n) : rows(n) {
        chunk_rows = max64(16, ceil_div(n, 128));
        count = ceil_div(n, chunk_rows);
    }
    int64_t begin(int64_t chunk) const { return chunk * chunk_rows; }
    int64_t end(int64_t chunk) const { return min64(rows, (chunk + 1) * chunk_rows); }
};

// to[i][column] = sum over chunks of partial[chunk][i][column], i < sums.
template <class T>
void reduce_chunks(const float* partial, int64_t chunks, int sums, int64_t columns, void* const* to) {
    constexpr int64_t kBlock = 64;
    const int64_t blocks = ceil_div(columns, kBlock);
    parallel_for(0, sums * blocks, 1 + (1 << 16) / (kBlock * (chunks + 1)), [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t i = task / blocks, first = task % blocks * kBlock;
            const int64_t width = min64(kBlock, columns - first);
            vf32 sum[kBlock / kLanes] = {};
            for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                const float* p = partial + (chunk * sums + i) * columns + first;
                for (int64_t c = 0; c < width; c += kLanes)
                    sum[c / kLanes] +=
                        load_some(p + c, width - c < kLanes ? static_cast<int>(width - c) : kLanes);
            }
            for (int64_t c = 0; c < width; c += kLanes)
                store_some(static_cast<T*>(to[i]) + first + c, sum[c / kLanes],
                           width - c < kLanes ? static_cast<int>(width - c) : kLanes);
        }
    });
}

// Rows below which a second thread does not pay.
RK_INLINE int64_t row_grain(int64_t columns) {
    return 1 + 24576 / (columns + 1);
}

}  // namespace rk::cpu::RK_CPU_ISA
