// Sums over the rows of a matrix in two steps: blocks of rows, then over the blocks. No atomics: the order of
// the additions depends on the shape alone, and the longest chain of them is rows / 256 + 20 long, so that
// the rounding error stays that of short sums.
//
// Bytes: the matrix is read once, its partial sums (1/32 of its elements, float32) are written and read once.
// The second step is small and all latency: a block of 8 warps takes 32 columns, so that 3072 columns keep 96
// blocks busy, and each warp reads 128 neighbouring bytes of every eighth partial row.
#include <launch.cuh>

#include "csrc/cuda/column_sum.cuh"
#include "csrc/cuda/column_sum.h"
#include "csrc/cuda/common.cuh"

namespace rk::cuda {
namespace {

template <class T, int N>
__global__ void __launch_bounds__(kSumWarps* kWarp)
    sum_row_blocks_kernel(const T* matrix, int64_t rows, Partials partials) {
    sum_rows_of_block<N>(rows, partials, [&](int64_t row, int64_t column, float (&values)[N]) {
        load(values, matrix + row * partials.columns + column);
    });
}

template <class T>
__global__ void __launch_bounds__(kSumWarps* kWarp) add_partials_kernel(Partials partials, T* sums) {
    __shared__ float shared[kSumWarps][kWarp];
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
    float sum = 0.0f;
    if (column < partials.columns)
        for (int64_t row = warp; row < partials.rows; row += kSumWarps)
            sum += partials.data[row * partials.pitch + column];
    shared[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && column < partials.columns) {
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < kSumWarps; ++w) total += shared[w][lane];
        sums[column] = from_float<T>(total);
    }
}

}  // namespace

void add_partials(const Partials& partials, void* sums, Dtype dtype, cudaStream_t stream) {
    const Launch how{dim3(static_cast<unsigned>((partials.columns + kWarp - 1) / kWarp)),
                     dim3(kSumWarps * kWarp), 0, stream};
    RK_FOR_DTYPE(dtype, T, launch(add_partials_kernel<T>, how, partials, static_cast<T*>(sums)));
}

void sum_row_blocks(const void* matrix, int64_t rows, const Partials& partials, Dtype dtype,
                    cudaStream_t stream) {
    RK_FOR_DTYPE(dtype, T, {
        constexpr int kWide = 16 / sizeof(T);
        if (partials.columns % kWide == 0 && reinterpret_cast<uintptr_t>(matrix) % 16 == 0)
            launch(sum_row_blocks_kernel<T, kWide>, sum_launch<kWide>(rows, partials.columns, stream),
                   static_cast<const T*>(matrix), rows, partials);
        else
            launch(sum_row_blocks_kernel<T, 1>, sum_launch<1>(rows, partials.columns, stream),
                   static_cast<const T*>(matrix), rows, partials);
    });
}

}  // namespace rk::cuda
