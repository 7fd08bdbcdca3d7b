// In place of CUTLASS's: mma.m16n8k16, PTX ISA "Matrix fragments for mma.m16n8k16 with floating point type".
#pragma once
#include "cutlass/arch/mma.h"
#include "cutlass/layout/matrix.h"
#include "cutlass/numeric_types.h"

namespace cutlass::arch {

template <typename Element>
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
        struct Lane {
            FragmentA a;
            FragmentB b;
            FragmentC c;
        };
        const Lane mine{a, b, c};
        ::emulation::warp_collective(
            "mma", 0xffffffffu, &mine, &d, [](const void* const in[32], void* const out[32], uint32_t) {
                float left[16][16], right[8][16];  // [row][k], [column][k]
                for (int lane = 0; lane < 32; ++lane) {
                    const Lane& from = *static_cast<const Lane*>(in[lane]);
                    const int g = lane / 4, t = lane % 4 * 2;
                    for (int i = 0; i < 8; ++i)
                        left[g + i / 2 % 2 * 8][t + i % 2 + i / 4 * 8] = float(Element(from.a[i]));
                    for (int i = 0; i < 4; ++i) right[g][t + i % 2 + i / 2 * 8] = float(Element(from.b[i]));
                }
                for (int lane = 0; lane < 32; ++lane) {
                    const Lane& from = *static_cast<const Lane*>(in[lane]);
                    FragmentC& to = *static_cast<FragmentC*>(out[lane]);
                    for (int i = 0; i < 4; ++i) {
                        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
                        float sum = from.c[i];
                        for (int k = 0; k < 16; ++k) sum += left[row][k] * right[column][k];
                        to[i] = sum;
                    }
                }
            });
    }
};

template <>
struct Mma<gemm::GemmShape<16, 8, 16>, 32, bfloat16_t, layout::RowMajor, bfloat16_t, layout::ColumnMajor,
           float, layout::RowMajor, OpMultiplyAdd> : EmulatedMma16816<bfloat16_t> {};
template <>
struct Mma<gemm::GemmShape<16, 8, 16>, 32, half_t, layout::RowMajor, half_t, layout::ColumnMajor, float,
           layout::RowMajor, OpMultiplyAdd> : EmulatedMma16816<half_t> {};

}  // namespace cutlass::arch
