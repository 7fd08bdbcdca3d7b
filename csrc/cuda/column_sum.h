// Sums over the rows of a matrix, in an order that the shape alone decides. Plain C++.
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

#include "csrc/cuda/dtype.h"

namespace rk::cuda {

// What a kernel with blocks of rows leaves behind: one row of column sums for each of them; of several
// matrices, up to kMostSums, those of one after those of the other.
constexpr int kMostSums = 3;
struct Partials {
    float* data;      // [matrices, rows, columns], the rows `pitch` elements apart
    int64_t rows;     // 0 is allowed: the sums are 0
    int64_t columns;  // the rest of a row, if pitch is larger, is not read
    int64_t pitch;
};

// sums[i][column] = the sum of the partial rows of matrix i; each is [columns] of the dtype, or null: not
// wanted.
void add_partials(const Partials& partials, void* const (&sums)[kMostSums], Dtype dtype, cudaStream_t stream);

// Partial sums over blocks of kSumRows rows of a contiguous matrix [rows, columns] of the dtype. `partials`
// has sum_blocks(rows) rows.
constexpr int64_t kSumRows = 32;
constexpr int64_t sum_blocks(int64_t rows) {
    return (rows + kSumRows - 1) / kSumRows;
}
void sum_row_blocks(const void* matrix, int64_t rows, const Partials& partials, Dtype dtype,
                    cudaStream_t stream);

}  // namespace rk::cuda
