// In place of CUTLASS's: ldmatrix, PTX ISA "Warp-level matrix load instruction".
#pragma once
#include <cstring>

#include "cute/arch/copy_sm75.hpp"
#include "cute/arch/util.hpp"
#include "cutlass/array.h"
#include "cutlass/layout/matrix.h"

namespace cutlass::arch {

inline unsigned cutlass_get_smem_pointer(const void*) {
    ::emulation::fail("a 32-bit address of shared memory is not emulated");
}

template <typename Layout, int MatrixCount>
inline void ldsm(Array<unsigned, MatrixCount>& to, const void* row) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
        ::emulation::fail("ldmatrix from %p: not a multiple of 16", row);
    constexpr bool kTransposed = !platform::is_same<Layout, layout::RowMajor>::value;
    ::emulation::warp_collective(
        kTransposed ? "ldmatrix.trans" : "ldmatrix", 0xffffffffu, &row, to.data(),
        [](const void* const in[32], void* const out[32], uint32_t) {
            for (int matrix = 0; matrix < MatrixCount; ++matrix) {
                uint16_t rows[8][8];
                for (int i = 0; i < 8; ++i)
                    std::memcpy(rows[i], *static_cast<const void* const*>(in[matrix * 8 + i]), 16);
                for (int lane = 0; lane < 32; ++lane) {
                    const int g = lane / 4, t = lane % 4 * 2;
                    const uint32_t low = kTransposed ? rows[t][g] : rows[g][t];
                    const uint32_t high = kTransposed ? rows[t + 1][g] : rows[g][t + 1];
                    static_cast<uint32_t*>(out[lane])[matrix] = low | high << 16;
                }
            }
        });
}

}  // namespace cutlass::arch
