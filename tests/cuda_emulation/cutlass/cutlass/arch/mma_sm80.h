// In place of CUTLASS's: mma.m16n8k16 by its twin in the emulation's ptx.cuh.
#pragma once
#include <cstring>
#include <ptx.cuh>

#include "cutlass/arch/mma.h"
#include "cutlass/layout/matrix.h"
#include "cutlass/numeric_types.h"

namespace cutlass::arch {

// CudaType: the type of CUDA's headers with the same bits.
template <typename Element, typename CudaType>
struct EmulatedMma16816 {
    using Shape = gemm::GemmShape<16, 8, 16>;
    using ElementA = Element;
    using LayoutA = layout::RowMajor;
    using FragmentA = Array<Element, 8>;
    using ElementB = Element;
    using LayoutB = layout::ColumnMajor;
    using FragmentB = Array<Element, 4>;
    using ElementC = float;
    using LayoutC = layout::RowMajor;
    using FragmentC = Array<float, 4>;
    using Operator = OpMultiplyAdd;
    using ArchTag = arch::Sm80;

    void operator()(FragmentC& d, const FragmentA& a, const FragmentB& b, const FragmentC& c) const {
        uint32_t left[4], right[2];
        float sums[4];
        std::memcpy(left, &a, sizeof left);
        std::memcpy(right, &b, sizeof right);
        std::memcpy(sums, &c, sizeof sums);
        rk::cuda::ptx::multiply_add<CudaType>(sums, left, right[0], right[1]);
        std::memcpy(static_cast<void*>(&d), sums, sizeof sums);
    }
};

template <>
struct Mma<gemm::GemmShape<16, 8, 16>, 32, bfloat16_t, layout::RowMajor, bfloat16_t, layout::ColumnMajor,
           float, layout::RowMajor, OpMultiplyAdd> : EmulatedMma16816<bfloat16_t, __nv_bfloat16> {};
template <>
struct Mma<gemm::GemmShape<16, 8, 16>, 32, half_t, layout::RowMajor, half_t, layout::ColumnMajor, float,
           layout::RowMajor, OpMultiplyAdd> : EmulatedMma16816<half_t, __half> {};

}  // namespace cutlass::arch
