// Integers as operands of gemm.h: a left one of 0 to 255 and a right one of -127 to 127, several to a
// word, with sums of 32 bits; and the loads that widen a narrow right one. No step saturates.
#pragma once
#include "csrc/cpu/gemm.h"

namespace rk::cpu::RK_CPU_ISA {

// The words of a left operand: what multiply_panels takes for T.
struct Whole {};
#if defined(RK_CPU_ISA_AVX512_BF16)
constexpr int kWholePerWord = 4;  // bytes: vpdpbusd, which every processor with AVX512-BF16 has
#else
constexpr int kWholePerWord = 2;  // 16 bits each: pmaddwd
#endif
// A word of the right operand as a packed weight keeps it: half the bytes, or all of them.
struct WholeWord {
    int8_t numbers[kWholePerWord];
};

RK_INLINE vf32 load(const int8_t* p) {
#if defined(RK_AVX512)
    return (vf32)_mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(RK_AVX2)
    return (vf32)_mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    vf32 x;
    for (int i = 0; i < kLanes; ++i) x[i] = float(p[i]);
    return x;
#endif
}
RK_INLINE vf32 load(const WholeWord* p) {
#if defined(RK_CPU_ISA_AVX512_BF16)
    return load(reinterpret_cast<const float*>(p));
#elif defined(RK_AVX512)
    return (vf32)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(RK_AVX2)
    return (vf32)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    vu32 x;
    for (int i = 0; i < kLanes; ++i)
        x[i] = uint32_t(uint16_t(p[i].numbers[0])) | uint32_t(uint16_t(p[i].numbers[1])) << 16;
    return as_float(x);
#endif
}

template <>
struct Arithmetic<Whole> {
    using Sum = vi32;
    static RK_INLINE vi32 multiply_add(vf32 a, vf32 b, vi32 c) {
#if defined(RK_CPU_ISA_AVX512_BF16)
        return (vi32)_mm512_dpbusd_epi32((__m512i)c, (__m512i)a, (__m512i)b);
#elif defined(RK_AVX512)
        return c + (vi32)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(RK_AVX2)
        return c + (vi32)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
        const vi32 x = (vi32)a, y = (vi32)b;
        return c + (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
    }
};

// sum x w of x = scale_x (u - zero_x) and w = scale_w q, from sum u q and sum q.
RK_INLINE vf32 scale_whole(vi32 sum_uq, vi32 sum_q, int32_t zero_x, vf32 scale_w, float scale_x) {
    return __builtin_convertvector(sum_uq - sum_q * set1(zero_x), vf32) * (scale_w * set1(scale_x));
}

}  // namespace rk::cpu::RK_CPU_ISA
