// The body of a kernel that goes over a matrix once, whatever else it does there, and leaves the column sums
// of each block of kSumRows rows.
//
// A block of kSumWarps warps owns kSumRows rows and 32 * N columns; each warp takes every kSumWarps-th row,
// each lane N neighbouring columns of it, so that a warp reads 32 * N neighbours. The warps' sums meet in
// shared memory and are added in the order of the warps.
#pragma once
#include <launch.cuh>

#include "csrc/cuda/column_sum.h"
#include "csrc/cuda/common.cuh"

namespace rk::cuda {

constexpr int kSumWarps = 8;

// Blocks of rows along x, which may have 2^31 of them; columns along y.
template <int N>
inline Launch sum_launch(int64_t rows, int64_t columns, cudaStream_t stream) {
    const int64_t blocks = sum_blocks(rows), stripes = (columns + kWarp * N - 1) / (kWarp * N);
    if (blocks > INT_MAX || stripes > 65535)
        throw std::runtime_error("roberta_kernels: column sums of a matrix of " + std::to_string(rows) +
                                 " x " + std::to_string(columns) + " are larger than a grid can be");
    return {dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(stripes)), dim3(kSumWarps * kWarp), 0,
            stream};
}

// A word more every eight: lanes that are eight words apart then meet in no bank of shared memory.
__host__ __device__ constexpr int padded(int column) {
    return column + column / 8;
}

// visit(row, column, values): what to add for `values[N]` at this place. Columns are a multiple of N.
template <int N, class Visit>
__device__ inline void sum_rows_of_block(int64_t rows, const Partials& partials, const Visit& visit) {
    __shared__ float sums[kSumWarps][padded(kWarp * N)];
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int64_t column = static_cast<int64_t>(blockIdx.y) * (kWarp * N) + lane * N;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kSumRows;
    float sum[N];
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] = 0.0f;
    if (column < partials.columns) {
#pragma unroll
        for (int step = 0; step < kSumRows / kSumWarps; ++step) {
            const int64_t row = first + warp + step * kSumWarps;
            if (row < rows) {
                float values[N];
                visit(row, column, values);
#pragma unroll
                for (int i = 0; i < N; ++i) sum[i] += values[i];
            }
        }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) sums[warp][padded(lane * N + i)] = sum[i];
    __syncthreads();
    for (int i = threadIdx.x; i < kWarp * N; i += kSumWarps * kWarp) {
        const int64_t to = static_cast<int64_t>(blockIdx.y) * (kWarp * N) + i;
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < kSumWarps; ++w) total += sums[w][padded(i)];
        if (to < partials.columns) partials.data[blockIdx.x * partials.pitch + to] = total;
    }
}

}  // namespace rk::cuda
