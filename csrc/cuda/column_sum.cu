// Sums over the rows of a matrix in two steps: blocks of rows, then over the blocks. No atomics: the order of
// the additions depends on the shape alone, and the longest chain of them is rows / 256 + 20 long, so that
// the rounding error stays that of short sums.
//
// Bytes: the matrix is read once, its partial sums (1/32 of its elements, float32) are written and read once.
// The second step is small and all latency: a block of 32 warps takes 32 columns, and each warp reads 128
// neighbouring bytes of every 32nd partial row.
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
struct Sums {
    T* to[kMostSums];
};

// 32 columns of one matrix a block. A warp reads whole lines of every 32nd row, and then has one column's 32
// subtotals in its lanes.
template <class T>
__global__ void __launch_bounds__(1024) add_partials_kernel(Partials partials, Sums<T> sums) {
    __shared__ float subtotals[kWarp][kWarp + 1];
    T* const to = blockIdx.y == 0 ? sums.to[0] : blockIdx.y == 1 ? sums.to[1] : sums.to[2];
    if (to == nullptr) return;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarp;
    const float* const data = partials.data + blockIdx.y * partials.rows * partials.pitch;
    float total = 0.0f;
    if (first + lane < partials.columns) {
#pragma unroll 4
        for (int64_t row = warp; row < partials.rows; row += kWarp)
            total += data[row * partials.pitch + first + lane];
    }
    subtotals[lane][warp] = total;
    __syncthreads();
    total = warp_sum(subtotals[warp][lane]);
    if (lane == 0 && first + warp < partials.columns) to[first + warp] = from_float<T>(total);
}

}  // namespace

void add_partials(const Partials& partials, void* const (&sums)[kMostSums], Dtype dtype,
                  cudaStream_t stream) {
    unsigned matrices = kMostSums;
    while (matrices > 1 && sums[matrices - 1] == nullptr) --matrices;
    const Launch how{dim3(static_cast<unsigned>((partials.columns + kWarp - 1) / kWarp), matrices),
                     dim3(1024), 0, stream};
    RK_FOR_DTYPE(dtype, T, {
        const Sums<T> to{{static_cast<T*>(sums[0]), static_cast<T*>(sums[1]), static_cast<T*>(sums[2])}};
        launch(add_partials_kernel<T>, how, partials, to);
    });
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
