// In place of CUTLASS's: ldmatrix by its twin in the emulation's ptx.cuh.
#pragma once
#include <ptx.cuh>

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
    if (MatrixCount != 4) ::emulation::fail("ldmatrix of %d matrices is not emulated", MatrixCount);
    uint32_t registers[4];
    rk::cuda::ptx::load_matrices_as<!platform::is_same<Layout, layout::RowMajor>::value>(registers, row);
    for (int i = 0; i < MatrixCount; ++i) to[i] = registers[i];
}

}  // namespace cutlass::arch
