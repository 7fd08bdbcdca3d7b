// Matrices in shared memory as wgmma reads them: the 64-bit matrix descriptor (PTX ISA 9.7.15.5.1.2.2,
// "Matrix Descriptor Format"), for the layouts that bulk tensor copies of boxes write, whose rows are as long
// as the swizzle is wide.
#pragma once
#include <stdint.h>

namespace rk::cuda {

// Rows of 128 bytes are swizzled in groups of 8 x 128 bytes, rows of 64 bytes in groups of 8 x 64: the
// 16-byte chunk c of row r lies at chunk c ^ r % 8, or c ^ r / 2 % 4. `address` is that of the box, a
// multiple of 1024 (512) bytes, plus, to start within it:
// - K-major (rows of the box are the columns of B): 32 bytes for 16 elements further along the row;
// - N-major (rows of the box are the rows of B): the bytes of a multiple of 8 rows.
// The stride between groups of 8 rows is 8 rows; the "leading" one plays no part: a row is no longer than the
// swizzle.
template <int RowBytes>
__device__ inline uint64_t matrix_descriptor(uint32_t address) {
    static_assert(RowBytes == 128 || RowBytes == 64, "row of the swizzled layouts");
    constexpr uint64_t kLeading = 1, kStride = 8 * RowBytes / 16, kSwizzle = RowBytes == 128 ? 1 : 2;
    return static_cast<uint64_t>((address & 0x3ffffu) >> 4) | kLeading << 16 | kStride << 32 | kSwizzle << 62;
}

// Where byte `byte` of row `row` of a box with such rows lies from its start.
template <int RowBytes>
__device__ inline int swizzled(int row, int byte) {
    return row * RowBytes + (byte ^ (RowBytes == 128 ? (row & 7) << 4 : (row >> 1 & 3) << 4));
}

}  // namespace rk::cuda
