// Layer normalisation (Ba, Kiros and Hinton 2016), forward and backward, of rows that are made as they are
// read: shared by add_layer_norm and embedding_layer_norm, which differ in how a row comes to be and where
// its gradient goes. That difference is the kernels' template parameter `Op`:
//
//     Element, kDropout, dropout        the dtype; whether and how elements are dropped
//     Row row(row)                      what is found out once a row (addresses)
//     kRows, source(Row, i)             the rows of memory that a row is made of, and where each lies (null:
//                                       nothing is read, zeros will do)
//     Loaded<N> load<N>(Row, column)    N neighbouring columns of all inputs, as they lie in memory
//     Loaded<N> loaded<N>(rows, column) the same of columns of the kRows rows that are at hand
//     sum<N>(z, Row, Loaded, kept)      z = what is normalised
//     drop_normalised<N>(out, kept)     dropout after the norm, where there is one; likewise its gradient
//     store_gradient<N>(row, column, z, kept)
//                                       takes the gradient of z away; leaves in z what the third sum adds up
//
// `kept` has a bit for each of the N columns: whether dropout keeps it.
//
// Forward: a row is loaded once, all loads before the first use, and stays in registers as float32: mean,
// centred squares (two passes, so nothing cancels), result. weight and bias come from L1 and are asked for
// together with the row.
//
// Backward, with g = grad_out * weight and n = (z - mean) * rstd:
//
//     grad_z = rstd * (g - mean(g) - n * mean(g * n))
//
// Blocks stay and stride over the rows. While a row's sums are reduced and its gradient is stored, the next row
// comes to shared memory (cp.async): each thread copies the vectors that it will read itself, so that only it
// waits for them, and no register holds them meanwhile. With dropout, the next row's bits are drawn then, too.
//
// A thread always has the same columns, so the sums over rows (of grad_out * n, grad_out and Op's third) grow in
// its registers; at the end the rows of a block are added through shared memory, and each block writes one row of
// partial sums, which add_partials adds: every addition in a fixed order. (docs/kernels.md has what the last block
// would take for that in place of a second kernel: more.) Rows go to blocks in turn, so that all multiprocessors
// have equally many to within one.
#pragma once
#include <stdint.h>

#include <algorithm>
#include <launch.cuh>
#include <ptx.cuh>

#include "csrc/cuda/column_sum.h"
#include "csrc/cuda/common.cuh"
#include "csrc/cuda/dropout.cuh"
#include "csrc/cuda/layer_norm_plan.h"

namespace rk::cuda {

constexpr int kColumnSums = 3;  // weight, bias, Op's third
static_assert(kColumnSums <= kMostSums);

template <typename T>
constexpr int kVector = 16 / sizeof(T);

// What both directions have.
template <typename T>
struct LayerNormRows {
    const T* weight;  // [columns]
    float* mean;      // [rows]
    float* rstd;      // [rows]
    int64_t rows, columns;
};

template <typename T>
struct LayerNormForward : LayerNormRows<T> {
    const T* bias;  // [columns]
    T* out;         // [rows, columns]
    float eps;
};

template <typename T>
struct LayerNormBackward : LayerNormRows<T> {
    const T* grad_out;  // [rows, columns]
    float* partials;    // [kColumnSums, blocks, columns]
};

// ------------------------------------------------------------------------------------------- pieces of a row

// N neighbours that will not be read again.
template <int N, typename T>
__device__ inline Packed<T, N> load_once(const T* from) {
    if constexpr (N * sizeof(T) == 16)
        return ptx::load_streaming(from);
    else
        return load_packed<N>(from);
}

// Bit i: whether dropout keeps column + i of a row, for the four columns that share a Philox counter.
__device__ inline uint32_t kept_of_four(const Dropout& dropout, const PhiloxKey& key, int64_t row,
                                        int64_t column) {
    const uint4 words = philox(key, static_cast<uint32_t>(column / 4), static_cast<uint32_t>(row), 0);
    return uint32_t{words.x >= dropout.threshold} | uint32_t{words.y >= dropout.threshold} << 1 |
           uint32_t{words.z >= dropout.threshold} << 2 | uint32_t{words.w >= dropout.threshold} << 3;
}

// A product, not a choice: what is dropped stays nan where it was, as in the other backends.
template <int N>
__device__ inline void drop(float (&x)[N], uint32_t kept, float scale) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] *= kept >> i & 1 ? scale : 0.0f;
}

// Each of x summed over the kWarps warps that share a row, in every thread of them. exchange: shared memory
// that nothing else uses until a later barrier.
template <int kWarps, int N>
__device__ inline void row_sums(float (&x)[N], float (&exchange)[kWarps][N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = warp_sum(x[i]);
    if constexpr (kWarps > 1) {
        if (threadIdx.x % kWarp == 0)
#pragma unroll
            for (int i = 0; i < N; ++i) exchange[threadIdx.x / kWarp][i] = x[i];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < N; ++i) {
            x[i] = 0.0f;
#pragma unroll
            for (int warp = 0; warp < kWarps; ++warp) x[i] += exchange[warp][i];
        }
    }
}

template <int kWarps>
__device__ inline float row_sum(float x, float (&exchange)[kWarps][1]) {
    float sums[1] = {x};
    row_sums<kWarps>(sums, exchange);
    return sums[0];
}

// ----------------------------------------------------------------------------------------- rows in registers

// kWarps warps have a row. A thread has kChunks vectors of it, 16 bytes each in memory; the warps' lanes lie
// side by side within a chunk.
template <typename T, int kWarps_, int kElements>
struct InRegisters {
    static constexpr int kWarps = kWarps_;
    static constexpr int kThreads = kWarps * kWarp;
    static constexpr int kWidth = kVector<T>;
    static constexpr int kChunks = kElements / kWidth;
    static constexpr RowLayout kLayout = {kWarps, kElements};
    static_assert(kChunks * kWidth == kElements);

    __device__ static int column(int chunk) {
        return (chunk * kThreads + static_cast<int>(threadIdx.x) % kThreads) * kWidth;
    }
};

// A bit for each column that the thread has of a row. Not unrolled: interleaved, the generators would take
// the registers that the row needs.
template <bool kDropout, typename Rows>
__device__ inline uint32_t kept_columns(const Dropout& dropout, const PhiloxKey& key, int64_t row) {
    uint32_t kept = 0;
    if constexpr (kDropout)
#pragma unroll 1
        for (int i = 0; i < Rows::kChunks * Rows::kWidth; i += 4)
            kept |= kept_of_four(dropout, key, row, Rows::column(i / Rows::kWidth) + i % Rows::kWidth) << i;
    return kept;
}

template <typename Op, typename Rows>
__global__ void __launch_bounds__(Rows::kThreads* most_rows_forward(Rows::kLayout))
    layer_norm_forward_kernel(Op op, LayerNormForward<typename Op::Element> a) {
    using T = typename Op::Element;
    constexpr int kWarps = Rows::kWarps, kChunks = Rows::kChunks, kWidth = Rows::kWidth;
    __shared__ float exchange[2][kWarps][1];
    const PhiloxKey key = Op::kDropout ? philox_key(op.dropout) : PhiloxKey{};
    const int columns = static_cast<int>(a.columns);
    const int rows_here = blockDim.x / Rows::kThreads, mine = threadIdx.x / Rows::kThreads;
    for (int64_t row = blockIdx.x * static_cast<int64_t>(rows_here) + mine; row < a.rows;
         row += gridDim.x * static_cast<int64_t>(rows_here)) {
        const typename Op::Row at = op.row(row);
        typename Op::template Loaded<kWidth> loaded[kChunks];
        Packed<T, kWidth> weight[kChunks], bias[kChunks];
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            const int column = Rows::column(i);
            loaded[i] = {};
            if (column < columns) loaded[i] = op.template load<kWidth>(at, column);
        }
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            const int column = Rows::column(i);
            weight[i] = bias[i] = {};
            if (column < columns) {
                weight[i] = load_packed<kWidth>(a.weight + column);
                bias[i] = load_packed<kWidth>(a.bias + column);
            }
        }
        float z[kChunks][kWidth];
        const uint32_t kept = kept_columns<Op::kDropout, Rows>(op.dropout, key, row);
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            op.sum(z[i], at, loaded[i], kept >> i * kWidth);
#pragma unroll
            for (int j = 0; j < kWidth; ++j) total += z[i][j];
        }
        const float mean = row_sum<kWarps>(total, exchange[0]) / static_cast<float>(columns);
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            const bool inside = Rows::column(i) < columns;
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
                z[i][j] = inside ? z[i][j] - mean : 0.0f;
                squares += z[i][j] * z[i][j];
            }
        }
        const float rstd =
            rsqrtf(row_sum<kWarps>(squares, exchange[1]) / static_cast<float>(columns) + a.eps);
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            const int column = Rows::column(i);
            float w[kWidth], b[kWidth];
            unpack<T>(w, weight[i]);
            unpack<T>(b, bias[i]);
#pragma unroll
            for (int j = 0; j < kWidth; ++j) z[i][j] = z[i][j] * rstd * w[j] + b[j];
            op.drop_normalised(z[i], kept >> i * kWidth);
            if (column < columns) store(a.out + row * columns + column, z[i]);
        }
        if (threadIdx.x % Rows::kThreads == 0) {
            a.mean[row] = mean;
            a.rstd[row] = rstd;
        }
    }
}

template <int N>
__device__ inline float4 four_of(const float (&x)[N], int first) {
    return make_float4(x[first], x[first + 1], x[first + 2], x[first + 3]);
}

// The column sums of a block's rows, added row after row through shared memory; one row of partials.
template <typename Rows>
__device__ inline void store_column_sums(const float (&sums)[kColumnSums][Rows::kChunks][Rows::kWidth],
                                         float* partials, int columns) {
    constexpr int kChunks = Rows::kChunks, kWidth = Rows::kWidth;
    const int rows_here = blockDim.x / Rows::kThreads, mine = threadIdx.x / Rows::kThreads;
    float* const shared = reinterpret_cast<float*>(shared_memory());  // [rows_here, columns]
    // Lanes that are 128 bytes apart would meet in the same banks: of eight, four store their halves the other way
    // round.
    const bool swaps = kWidth == 8 && threadIdx.x / 4 % 2 == 1;
#pragma unroll
    for (int s = 0; s < kColumnSums; ++s) {
        float* const to = partials + (s * static_cast<int64_t>(gridDim.x) + blockIdx.x) * columns;
        float* const mine_to = rows_here == 1 ? to : shared + mine * columns;
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            const int column = Rows::column(i);
            if (column < columns)
#pragma unroll
                for (int j = 0; j < kWidth; j += 4) {
                    const int other = kWidth - 4 - j;
                    const float4 here = four_of(sums[s][i], j), there = four_of(sums[s][i], other);
                    *reinterpret_cast<float4*>(mine_to + column + (swaps ? other : j)) = swaps ? there : here;
                }
        }
        if (rows_here == 1) continue;
        __syncthreads();
        for (int column = threadIdx.x; column < columns; column += blockDim.x) {
            float total = 0.0f;
            for (int r = 0; r < rows_here; ++r) total += shared[r * columns + column];
            to[column] = total;
        }
        __syncthreads();
    }
}

// Where the next row waits: 16 bytes for each vector of a thread, of each of the rows that it is made of and of
// grad_out. A thread's slots are its own: nobody else reads or writes them.
template <typename Op, typename Rows>
struct NextRow {
    static constexpr int kSources = Op::kRows + 1;  // grad_out comes last
    static constexpr size_t kBytes = size_t{16} * kSources * Rows::kChunks * Rows::kThreads;

    __device__ static uint4* slot(int source, int chunk) {
        const int row = threadIdx.x / Rows::kThreads, thread = threadIdx.x % Rows::kThreads;
        return reinterpret_cast<uint4*>(shared_memory()) +
               ((row * kSources + source) * Rows::kChunks + chunk) * Rows::kThreads + thread;
    }

    // Starts copying. What was in the slots has been read: by this thread, before in its program.
    __device__ static void fetch(const Op& op, const typename Op::Row& at,
                                 const typename Op::Element* grad_out, int columns) {
#pragma unroll
        for (int source = 0; source < kSources; ++source) {
            const auto* const row = source < Op::kRows ? op.source(at, source) : grad_out;
#pragma unroll
            for (int i = 0; i < Rows::kChunks; ++i) {
                const int column = Rows::column(i);
                const bool there = row != nullptr;
                if (column < columns)
                    ptx::copy_async_16(slot(source, i), there ? row + column : grad_out, there);
            }
        }
        ptx::copy_async_commit();
    }
};

template <typename Op, typename Rows>
__global__ void __launch_bounds__(Rows::kThreads* most_rows_backward(Rows::kLayout, Rows::kWidth,
                                                                     Op::kDropout),
                                  blocks_backward(Rows::kLayout))
    layer_norm_backward_kernel(Op op, LayerNormBackward<typename Op::Element> a) {
    using T = typename Op::Element;
    using Next = NextRow<Op, Rows>;
    constexpr int kWarps = Rows::kWarps, kChunks = Rows::kChunks, kWidth = Rows::kWidth;
    __shared__ float exchange[2][kWarps][2];
    const PhiloxKey key = Op::kDropout ? philox_key(op.dropout) : PhiloxKey{};
    const int columns = static_cast<int>(a.columns);
    const int rows_here = blockDim.x / Rows::kThreads, mine = threadIdx.x / Rows::kThreads;
    const int64_t stride = gridDim.x * static_cast<int64_t>(rows_here);
    float sums[kColumnSums][kChunks][kWidth] = {};
    int turn = 0;  // so that a barrier a row is enough
    int64_t row = blockIdx.x + mine * static_cast<int64_t>(gridDim.x);
    typename Op::Row at{};
    float mean = 0.0f, rstd = 0.0f;
    uint32_t kept = 0;
    if (row < a.rows) {
        at = op.row(row);
        Next::fetch(op, at, a.grad_out + row * columns, columns);
        mean = a.mean[row], rstd = a.rstd[row];
        kept = kept_columns<Op::kDropout, Rows>(op.dropout, key, row);
    }
    while (row < a.rows) {
        const int64_t next = row + stride;
        const bool goes_on = next < a.rows;
        typename Op::Row next_at{};
        float next_mean = 0.0f, next_rstd = 0.0f;
        if (goes_on) {
            next_at = op.row(next);
            next_mean = a.mean[next], next_rstd = a.rstd[next];
        }
        ptx::copy_async_wait<0>();
        float n[kChunks][kWidth], g[kChunks][kWidth];
        float both[2] = {0.0f, 0.0f};  // sums of g and of g * n
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            const int column = Rows::column(i);
            Packed<T, kWidth> rows[Op::kRows] = {}, grad_out = {};
            float w[kWidth] = {};
            if (column < columns) {
#pragma unroll
                for (int source = 0; source < Op::kRows; ++source) rows[source] = *Next::slot(source, i);
                grad_out = *Next::slot(Op::kRows, i);
                load(w, a.weight + column);
            }
            typename Op::template Loaded<kWidth> loaded = {};
            if (column < columns) loaded = op.template loaded<kWidth>(rows, column);
            op.sum(n[i], at, loaded, kept >> i * kWidth);
            unpack<T>(g[i], grad_out);
            op.drop_normalised(g[i], kept >> i * kWidth);
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
                n[i][j] = (n[i][j] - mean) * rstd;
                sums[0][i][j] += g[i][j] * n[i][j];
                sums[1][i][j] += g[i][j];
                g[i][j] *= w[j];
                both[0] += g[i][j];
                both[1] += g[i][j] * n[i][j];
            }
        }
        if (goes_on) Next::fetch(op, next_at, a.grad_out + next * columns, columns);
        row_sums<kWarps>(both, exchange[turn]);
        turn ^= 1;
        const float mean_g = both[0] / static_cast<float>(columns),
                    mean_gn = both[1] / static_cast<float>(columns);
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            const int column = Rows::column(i);
#pragma unroll
            for (int j = 0; j < kWidth; ++j) g[i][j] = rstd * (g[i][j] - mean_g - n[i][j] * mean_gn);
            if (column < columns) op.store_gradient(row, column, g[i], kept >> i * kWidth);
#pragma unroll
            for (int j = 0; j < kWidth; ++j) sums[2][i][j] += g[i][j];
        }
        if (goes_on) kept = kept_columns<Op::kDropout, Rows>(op.dropout, key, next);
        row = next, at = next_at, mean = next_mean, rstd = next_rstd;
    }
    if (rows_here > 1) __syncthreads();  // the sums go where other warps' rows may still lie
    store_column_sums<Rows>(sums, a.partials, columns);
}

// --------------------------------------------------------------------------------------------- any other row

template <typename Op>
__device__ inline float loop_sum(const Op& op, const typename Op::Row& at, const PhiloxKey& key, int64_t row,
                                 int64_t column, uint32_t& kept) {
    float z[1];
    kept = Op::kDropout ? kept_of_four(op.dropout, key, row, column) >> column % 4 : 0;
    op.sum(z, at, op.template load<1>(at, column), kept);
    return z[0];
}

template <typename Op>
__global__ void __launch_bounds__(kLoopWarps* kWarp)
    layer_norm_forward_loop_kernel(Op op, LayerNormForward<typename Op::Element> a) {
    __shared__ float exchange[2][kLoopWarps][1];
    const PhiloxKey key = Op::kDropout ? philox_key(op.dropout) : PhiloxKey{};
    uint32_t kept;
    for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
        const typename Op::Row at = op.row(row);
        float total = 0.0f;
        for (int64_t column = threadIdx.x; column < a.columns; column += blockDim.x)
            total += loop_sum(op, at, key, row, column, kept);
        const float mean = row_sum<kLoopWarps>(total, exchange[0]) / static_cast<float>(a.columns);
        float squares = 0.0f;
        for (int64_t column = threadIdx.x; column < a.columns; column += blockDim.x) {
            const float centred = loop_sum(op, at, key, row, column, kept) - mean;
            squares += centred * centred;
        }
        const float rstd =
            rsqrtf(row_sum<kLoopWarps>(squares, exchange[1]) / static_cast<float>(a.columns) + a.eps);
        for (int64_t column = threadIdx.x; column < a.columns; column += blockDim.x) {
            const float z = loop_sum(op, at, key, row, column, kept);
            float out[1] = {(z - mean) * rstd * to_float(a.weight[column]) + to_float(a.bias[column])};
            op.drop_normalised(out, kept);
            store(a.out + row * a.columns + column, out);
        }
        if (threadIdx.x == 0) {
            a.mean[row] = mean;
            a.rstd[row] = rstd;
        }
    }
}

// The column sums grow in the block's row of partials, in memory: a column is always the same thread's.
template <typename Op>
__global__ void __launch_bounds__(kLoopWarps* kWarp)
    layer_norm_backward_loop_kernel(Op op, LayerNormBackward<typename Op::Element> a) {
    __shared__ float exchange[2][kLoopWarps][2];
    const PhiloxKey key = Op::kDropout ? philox_key(op.dropout) : PhiloxKey{};
    uint32_t kept;
    int turn = 0;
    for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
        const typename Op::Row at = op.row(row);
        const float mean = a.mean[row], rstd = a.rstd[row];
        const auto* const grad_out = a.grad_out + row * a.columns;
        float both[2] = {0.0f, 0.0f};
        for (int64_t column = threadIdx.x; column < a.columns; column += blockDim.x) {
            const float n = (loop_sum(op, at, key, row, column, kept) - mean) * rstd;
            float grad[1] = {to_float(grad_out[column])};
            op.drop_normalised(grad, kept);
            const float g = grad[0] * to_float(a.weight[column]);
            both[0] += g;
            both[1] += g * n;
        }
        row_sums<kLoopWarps>(both, exchange[turn]);
        turn ^= 1;
        const float mean_g = both[0] / static_cast<float>(a.columns),
                    mean_gn = both[1] / static_cast<float>(a.columns);
        for (int64_t column = threadIdx.x; column < a.columns; column += blockDim.x) {
            const float n = (loop_sum(op, at, key, row, column, kept) - mean) * rstd;
            float grad[1] = {to_float(grad_out[column])};
            op.drop_normalised(grad, kept);
            float z[1] = {rstd * (grad[0] * to_float(a.weight[column]) - mean_g - n * mean_gn)};
            op.store_gradient(row, column, z, kept);
            const float terms[kColumnSums] = {grad[0] * n, grad[0], z[0]};
#pragma unroll
            for (int s = 0; s < kColumnSums; ++s) {
                float* const to =
                    a.partials + (s * static_cast<int64_t>(gridDim.x) + blockIdx.x) * a.columns + column;
                *to = row < gridDim.x ? terms[s] : *to + terms[s];
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------ launching

// f(InRegisters<...>{}) with the type of the layout.
template <typename T, int kIndex = 0, typename F>
void with_layout(RowLayout layout, const F& f) {
    constexpr RowLayout mine = row_layouts(kVector<T>)[kIndex];
    if constexpr (kIndex + 1 < kLayouts)
        if (layout.warps != mine.warps || layout.elements != mine.elements)
            return with_layout<T, kIndex + 1>(layout, f);
    f(InRegisters<T, mine.warps, mine.elements>{});
}

template <typename Op>
void layer_norm_forward(const Op& op, const LayerNormForward<typename Op::Element>& a, cudaStream_t stream) {
    using T = typename Op::Element;
    const RowLayout layout = row_layout(a.columns, kVector<T>);
    const RowGrid grid = forward_grid(a.rows, layout, current_device().multiprocessors);
    const Launch how{dim3(static_cast<unsigned>(grid.blocks)), dim3(static_cast<unsigned>(grid.threads)), 0,
                     stream};
    if (layout.warps == 0) return launch(layer_norm_forward_loop_kernel<Op>, how, op, a);
    with_layout<T>(layout,
                   [&](auto rows) { launch(layer_norm_forward_kernel<Op, decltype(rows)>, how, op, a); });
}

// Blocks, and so rows of partials, of layer_norm_backward.
template <typename T>
int64_t partial_rows(int64_t rows, int64_t columns, const Dropout& dropout) {
    return backward_grid(rows, row_layout(columns, kVector<T>), kVector<T>, dropout.seed != nullptr,
                         current_device().multiprocessors)
        .blocks;
}

template <typename Op>
void layer_norm_backward(const Op& op, const LayerNormBackward<typename Op::Element>& a,
                         cudaStream_t stream) {
    using T = typename Op::Element;
    const RowLayout layout = row_layout(a.columns, kVector<T>);
    const RowGrid grid =
        backward_grid(a.rows, layout, kVector<T>, Op::kDropout, current_device().multiprocessors);
    Launch how{dim3(static_cast<unsigned>(grid.blocks)), dim3(static_cast<unsigned>(grid.threads)), 0,
               stream};
    if (layout.warps == 0) return launch(layer_norm_backward_loop_kernel<Op>, how, op, a);
    with_layout<T>(layout, [&](auto rows) {
        using Rows = decltype(rows);
        const size_t at_once = static_cast<size_t>(grid.rows_per_block);
        const size_t sums = at_once > 1 ? at_once * static_cast<size_t>(a.columns) * sizeof(float) : 0;
        how.shared_bytes = std::max(at_once * NextRow<Op, Rows>::kBytes, sums);
        launch(layer_norm_backward_kernel<Op, Rows>, how, op, a);
    });
}

}  // namespace rk::cuda
