// Vectors of kLanes float32 and what the kernels need of them, in one source for every instruction set:
// GCC/Clang vector extensions (so + - * / < & | and ?: work on vectors), and intrinsics only where those
// cannot say it. Compiled once per instruction set, into the namespace of that set, so that no two versions
// of an inline function ever share a symbol. No torch header and no std template may be included by files
// that include this one.
//
//   lanes and types     kLanes, vf32, vi32, vu32, set1, zero, bits/as_float, select, any
//   memory              load, load_partial, load_some, store, store_partial, store_some, for float and
//                       bfloat16 (as float32 vectors)
//   arithmetic          fma, vmin, vmax, sqrt, hsum, hmax, exp, tanh, gelu<kTanh>, gelu_grad<kTanh>
//   dropout             Philox4x32-10: dropout_keep, dropout_multiplier (docs/design.md, section 4)
//   layout              interleave, transpose
#pragma once
#include <stdint.h>
#if defined(__x86_64__)
#    pragma GCC diagnostic push
#    pragma GCC diagnostic ignored "-Wuninitialized"  // _mm512_undefined_ps: GCC bug 105593
#    pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#    include <immintrin.h>
#    pragma GCC diagnostic pop
#endif

#ifndef RK_CPU_ISA
#    error "kernel sources are compiled once per instruction set with -DRK_CPU_ISA=<name> (setup.py)"
#endif

#if defined(RK_CPU_ISA_AVX512) || defined(RK_CPU_ISA_AVX512_BF16)
#    define RK_AVX512 1
#elif defined(RK_CPU_ISA_AVX2)
#    define RK_AVX2 1
#endif

#define RK_INLINE inline __attribute__((always_inline))

namespace rk::cpu::RK_CPU_ISA {

#if defined(RK_AVX512)
constexpr int kLanes = 16;
#elif defined(RK_AVX2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf32 __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi32 __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu32 __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vu16 __attribute__((vector_size(kLanes * 2)));

// bfloat16 in memory: the upper half of a float32.
struct bf16 {
    uint16_t bits;
};

template <class To, class From>
RK_INLINE To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
    To to;
    __builtin_memcpy(&to, &from, sizeof(To));
    return to;
}

RK_INLINE vf32 set1(float x) {
    return x - vf32{};
}
RK_INLINE vi32 set1(int32_t x) {
    return x - vi32{};
}
RK_INLINE vu32 set1(uint32_t x) {
    return x - vu32{};
}
RK_INLINE vf32 zero() {
    return vf32{};
}
RK_INLINE vu32 bits(vf32 x) {
    return (vu32)x;
}
RK_INLINE vf32 as_float(vu32 x) {
    return (vf32)x;
}
// 0, 1, ..., kLanes - 1
RK_INLINE vi32 lane_index() {
#if defined(RK_AVX512)
    return vi32{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(RK_AVX2)
    return vi32{0, 1, 2, 3, 4, 5, 6, 7};
#else
    return vi32{0, 1, 2, 3};
#endif
}
// mask lanes are all ones or all zeros, as vector comparisons give them
RK_INLINE vf32 select(vi32 mask, vf32 yes, vf32 no) {
    return mask ? yes : no;
}
RK_INLINE bool any(vi32 mask) {
#if defined(RK_AVX512)
    return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(RK_AVX2)
    return _mm256_movemask_ps((__m256)mask) != 0;
#else
    int32_t found = 0;
    for (int i = 0; i < kLanes; ++i) found |= mask[i];
    return found != 0;
#endif
}

// ---- memory ----

RK_INLINE vf32 load(const float* p) {
    vf32 x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}
RK_INLINE void store(float* p, vf32 x) {
    __builtin_memcpy(p, &x, sizeof x);
}

RK_INLINE vf32 load(const bf16* p) {
    vu16 half;
    __builtin_memcpy(&half, p, sizeof half);
    return (vf32)(__builtin_convertvector(half, vu32) << 16);
}
// Rounded to nearest even in the upper half of each word, what is left of it in the lower; a NaN stays a NaN (made quiet,
// sign and payload's upper part kept).
RK_INLINE vu32 rounded_bits(vf32 x) {
    const vu32 u = bits(x);
    return (x != x) ? u | 0x400000u : u + 0x7fffu + ((u >> 16) & 1u);
}
RK_INLINE vu16 to_bf16(vf32 x) {
    return __builtin_convertvector(rounded_bits(x) >> 16, vu16);
}
RK_INLINE void store(bf16* p, vf32 x) {
    const vu16 half = to_bf16(x);
    __builtin_memcpy(p, &half, sizeof half);
}
// Two numbers, each rounded to bfloat16, as a word, `even` in its lower half.
RK_INLINE vu32 pair_of_bf16(vf32 even, vf32 odd) {
    return (rounded_bits(even) >> 16) | (rounded_bits(odd) & 0xffff0000u);
}

RK_INLINE float load1(const float* p) {
    return *p;
}
RK_INLINE float load1(const bf16* p) {
    return bit_cast<float>(uint32_t(p->bits) << 16);
}
RK_INLINE void store1(float* p, float x) {
    *p = x;
}
RK_INLINE void store1(bf16* p, float x) {
    const uint32_t u = bit_cast<uint32_t>(x);
    p->bits = uint16_t(x != x ? (u >> 16) | 0x40u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// The first `count` (0 to kLanes) elements; the other lanes are zero on loading and untouched on storing.
RK_INLINE vf32 load_partial(const float* p, int count) {
#if defined(RK_AVX512)
    return (vf32)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
#elif defined(RK_AVX2)
    return (vf32)_mm256_maskload_ps(p, (__m256i)(lane_index() < count));
#else
    float x[kLanes] = {};
    for (int i = 0; i < count; ++i) x[i] = p[i];
    return load(x);
#endif
}
RK_INLINE void store_partial(float* p, vf32 x, int count) {
#if defined(RK_AVX512)
    _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)x);
#elif defined(RK_AVX2)
    _mm256_maskstore_ps(p, (__m256i)(lane_index() < count), (__m256)x);
#else
    for (int i = 0; i < count; ++i) p[i] = x[i];
#endif
}
RK_INLINE vf32 load_partial(const bf16* p, int count) {
#if defined(RK_AVX512)
    const __m256i half = _mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p);
    return (vf32)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#else
    bf16 x[kLanes] = {};
    for (int i = 0; i < count; ++i) x[i] = p[i];
    return load(x);
#endif
}
RK_INLINE void store_partial(bf16* p, vf32 x, int count) {
#if defined(RK_AVX512)
    _mm256_mask_storeu_epi16(p, __mmask16((1u << count) - 1), (__m256i)to_bf16(x));
#else
    bf16 half[kLanes];
    store(half, x);
    for (int i = 0; i < count; ++i) p[i] = half[i];
#endif
}

// The same at the end of a row of which `left` elements are left, kLanes or more of them or fewer.
template <class T>
RK_INLINE vf32 load_some(const T* p, int left) {
    return left >= kLanes ? load(p) : load_partial(p, left);
}
template <class T>
RK_INLINE void store_some(T* p, vf32 x, int left) {
    if (left >= kLanes)
        store(p, x);
    else
        store_partial(p, x, left);
}

// ---- arithmetic ----

RK_INLINE vf32 fma(vf32 a, vf32 b, vf32 c) {
#if defined(RK_AVX512)
    return (vf32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(RK_AVX2)
    return (vf32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}
RK_INLINE vf32 fma(vf32 a, float b, float c) {
    return fma(a, set1(b), set1(c));
}
RK_INLINE vf32 fma(vf32 a, vf32 b, float c) {
    return fma(a, b, set1(c));
}
// A NaN in either operand gives b (so put the operand whose NaN must survive second).
RK_INLINE vf32 vmax(vf32 a, vf32 b) {
#if defined(RK_AVX512)
    return (vf32)_mm512_max_ps((__m512)a, (__m512)b);  // GCC makes two instructions of the line below
#else
    return a > b ? a : b;
#endif
}
RK_INLINE vf32 vmin(vf32 a, vf32 b) {
#if defined(RK_AVX512)
    return (vf32)_mm512_min_ps((__m512)a, (__m512)b);
#else
    return a < b ? a : b;
#endif
}
RK_INLINE vf32 vabs(vf32 x) {
    return (vf32)(bits(x) & 0x7fffffffu);
}
RK_INLINE vf32 sqrt(vf32 x) {
#if defined(RK_AVX512)
    return (vf32)_mm512_sqrt_ps((__m512)x);
#elif defined(RK_AVX2)
    return (vf32)_mm256_sqrt_ps((__m256)x);
#else
    for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

RK_INLINE float hsum(vf32 x) {
#if defined(RK_AVX512) || defined(RK_AVX2)
#    if defined(RK_AVX512)
    const __m256 y = _mm256_add_ps(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
#    else
    const __m256 y = (__m256)x;
#    endif
    __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_add_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
#else
    return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}
// Largest lane (no promise about NaN lanes).
RK_INLINE float hmax(vf32 x) {
#if defined(RK_AVX512) || defined(RK_AVX2)
#    if defined(RK_AVX512)
    const __m256 y = _mm256_max_ps(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
#    else
    const __m256 y = (__m256)x;
#    endif
    __m128 z = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_max_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
#else
    const float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
    return a > b ? a : b;
#endif
}

// e^x within about 1 ulp over the whole range: -inf -> 0, overflow -> inf, NaN -> NaN, subnormal results
// kept. x = n ln2 + r with |r| <= ln2/2 (Cody-Waite), e^r by the polynomial of Cephes' expf, then 2^n.
RK_INLINE vf32 exp(vf32 x) {
    x = vmin(set1(89.0f), vmax(set1(-104.0f), x));
    const vf32 magic =
        set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
    const vf32 shifted = fma(x, set1(1.44269504088896341f), magic);
    const vf32 n = shifted - magic;
    vf32 r = fma(n, set1(-0.693359375f), x);
    r = fma(n, set1(2.12194440e-4f), r);
    vf32 p = fma(r, 1.9875691500e-4f, 1.3981999507e-3f);
    p = fma(p, r, 8.3334519073e-3f);
    p = fma(p, r, 4.1665795894e-2f);
    p = fma(p, r, 1.6666665459e-1f);
    p = fma(p, r, 5.0000001201e-1f);
    p = fma(p, r * r, r) + 1.0f;
#if defined(RK_AVX512)
    return (vf32)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    // 2^n in two factors, so that n = 128 and subnormal results come out right.
    const vi32 whole = (vi32)bits(shifted) - (vi32)bits(magic);
    const vi32 half = whole >> 1;
    return p * (vf32)((half + 127) << 23) * (vf32)((whole - half + 127) << 23);
#endif
}

RK_INLINE vf32 tanh(vf32 x) {
    const vf32 t = vabs(x);
    // Near zero the odd polynomial keeps the relative accuracy that 1 - 2 / (e^2t + 1) loses.
    const vf32 s = x * x;
    vf32 p = fma(s, -5.70498872745e-3f, 2.06390887954e-2f);
    p = fma(p, s, -5.37397155531e-2f);
    p = fma(p, s, 1.33314422036e-1f);
    p = fma(p, s, -3.33332819422e-1f);
    const vf32 near = fma(p * s, x, x);
    const vf32 far = 1.0f - 2.0f / (exp(t + t) + 1.0f);
    const vf32 signed_far = (vf32)(bits(far) | (bits(x) & 0x80000000u));
    return t < 0.625f ? near : signed_far;
}

// Phi(x), the normal distribution function, and e^(-x^2/2). The upper tail is Q(t) = e^(-t^2/2) R(t), t =
// |x|, with R a polynomial in 1 / (1 + 0.3 t): relative error 6e-8 for 0 <= t <= 14, so that the negative
// side of GELU keeps its relative accuracy (an erf-based form loses it) and the one exp is used for the derivative
// too.
RK_INLINE vf32 normal_cdf(vf32 x, vf32* gauss) {
    const vf32 t = vabs(x);
    const vf32 e = exp(t * t * -0.5f);
    const vf32 u = 1.0f / fma(t, 0.3f, 1.0f);
    vf32 r = fma(u, 0.038378289555429004f, -0.16916611154530042f);
    r = fma(r, u, 0.22866008093385579f);
    r = fma(r, u, -0.07650647742104147f);
    r = fma(r, u, 0.14253552441096623f);
    r = fma(r, u, 0.09468352294794578f);
    r = fma(r, u, 0.12192034221002439f);
    r = fma(r, u, 0.11948768894872813f);
    r = fma(r, u, 7.168876004639591e-06f);
    const vf32 q = e * r;
    *gauss = e;
    return x > 0.0f ? 1.0f - q : q;
}

// The logistic function of 2 sqrt(2/pi) (x + 0.044715 x^3), which is (1 + tanh) / 2 of the tanh form, and its
// complement, both with full relative accuracy.
RK_INLINE vf32 tanh_gate(vf32 x, vf32* complement) {
    const vf32 y = x * fma(x * x, 2.0f * 0.7978845608028654f * 0.044715f, 2.0f * 0.7978845608028654f);
    const vf32 e = exp((vf32)(bits(y) | 0x80000000u));
    const vf32 large = 1.0f / (1.0f + e);
    const vf32 small = e * large;
    const vi32 positive = y > 0.0f;
    *complement = positive ? small : large;
    return positive ? large : small;
}

// GELU: x Phi(x), or with kTanh x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2. At infinities as torch in
// float64: gelu(inf) = inf, gelu(-inf) = NaN.
template <bool kTanh>
RK_INLINE vf32 gelu(vf32 x) {
    vf32 unused;
    return x * (kTanh ? tanh_gate(x, &unused) : normal_cdf(x, &unused));
}

// d gelu / dx, and gelu itself in *value.
template <bool kTanh>
RK_INLINE vf32 gelu_grad(vf32 x, vf32* value) {
    if (kTanh) {
        vf32 complement;
        const vf32 gate = tanh_gate(x, &complement);
        *value = x * gate;
        const vf32 dy = fma(x * x, 6.0f * 0.7978845608028654f * 0.044715f, 2.0f * 0.7978845608028654f);
        return fma(x * gate, complement * dy, gate);
    }
    vf32 gauss;
    const vf32 cdf = normal_cdf(x, &gauss);
    *value = x * cdf;
    return fma(x * 0.3989422804014327f, gauss, cdf);
}

// ---- layout ----

#if defined(__has_builtin)
#    if __has_builtin(__builtin_shufflevector)
#        define RK_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#    endif
#endif
#if !defined(RK_SHUFFLE)
#    define RK_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vi32{__VA_ARGS__})
#endif

// a0 b0 a1 b1 ... : the lower, then the upper half of that sequence of 2 kLanes. V is vf32, vi32 or vu32.
template <class V>
RK_INLINE V interleave_lower(V a, V b) {
#if defined(RK_AVX512)
    return RK_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif defined(RK_AVX2)
    return RK_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
    return RK_SHUFFLE(a, b, 0, 4, 1, 5);
#endif
}
template <class V>
RK_INLINE V interleave_upper(V a, V b) {
#if defined(RK_AVX512)
    return RK_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(RK_AVX2)
    return RK_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
    return RK_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}

// rows[i][j] <-> rows[j][i], a square of kLanes x kLanes 32-bit lanes: log2(kLanes) perfect shuffles.
template <class V>
RK_INLINE void transpose(V (&rows)[kLanes]) {
#pragma GCC unroll 4
    for (int stage = 1; stage < kLanes; stage *= 2) {
        V next[kLanes];
#pragma GCC unroll 8
        for (int i = 0; i < kLanes / 2; ++i) {
            next[2 * i] = interleave_lower(rows[i], rows[i + kLanes / 2]);
            next[2 * i + 1] = interleave_upper(rows[i], rows[i + kLanes / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
    }
}

// ---- dropout ----

// Both halves of the 64-bit products of each lane of a with m.
RK_INLINE void multiply_wide(vu32 a, uint32_t m, vu32* high, vu32* low) {
#if defined(RK_AVX512)
    const __m512i mv = _mm512_set1_epi32(int(m));
    const __m512i even = _mm512_mul_epu32((__m512i)a, mv);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), mv);
    *high = (vu32)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
    *low = (vu32)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
#elif defined(RK_AVX2)
    const __m256i mv = _mm256_set1_epi32(int(m));
    const __m256i even = _mm256_mul_epu32((__m256i)a, mv);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), mv);
    *high = (vu32)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    *low = (vu32)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
#elif defined(__x86_64__)
    const __m128i mv = _mm_set1_epi32(int(m));
    const __m128i even = _mm_mul_epu32((__m128i)a, mv);
    const __m128i odd = _mm_mul_epu32(_mm_srli_epi64((__m128i)a, 32), mv);
    const __m128i upper = _mm_set1_epi64x(int64_t(0xffffffff00000000u));
    *high = (vu32)_mm_or_si128(_mm_srli_epi64(even, 32), _mm_and_si128(odd, upper));
    *low = (vu32)_mm_or_si128(_mm_andnot_si128(upper, even), _mm_slli_epi64(odd, 32));
#else
    typedef uint64_t wide __attribute__((vector_size(kLanes * 8)));
    const wide product = __builtin_convertvector(a, wide) * uint64_t(m);
    *high = __builtin_convertvector(product >> 32, vu32);
    *low = a * m;
#endif
}

// Philox4x32-10 (Salmon et al., SC 2011) of counters (c0, c1, c2, 0), one counter a lane; word w in words[w].
RK_INLINE void philox(vu32 c0, vu32 c1, vu32 c2, uint32_t key0, uint32_t key1, vu32 (&words)[4]) {
    vu32 c3 = vu32{};
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
        vu32 high0, low0, high1, low1;
        multiply_wide(c0, 0xd2511f53u, &high0, &low0);
        multiply_wide(c2, 0xcd9e8d57u, &high1, &low1);
        c0 = high1 ^ c1 ^ key0;
        c1 = low1;
        c2 = high0 ^ c3 ^ key1;
        c3 = low0;
        key0 += 0x9e3779b9u;
        key1 += 0xbb67ae85u;
    }
    words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// Is element `column + j * kLanes + lane` of (row, plane) kept? All ones in keep[j] where so. Covers 4 *
// kLanes adjacent columns; `column` is a multiple of 4. Dropout holds key0, key1 (low and high half of the
// seed), threshold (an element is kept when its word reaches it) and scale (1 / (1 - p)).
template <class Dropout>
RK_INLINE void dropout_keep(const Dropout& d, uint32_t column, uint32_t row, uint32_t plane,
                            vi32 (&keep)[4]) {
    vu32 w[4];
    philox((vu32)lane_index() + column / 4, set1(row), set1(plane), d.key0, d.key1, w);
    const vu32 threshold = set1(d.threshold);
    vi32 k[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) k[i] = w[i] >= threshold;
    const vi32 a0 = interleave_lower(k[0], k[2]), a1 = interleave_upper(k[0], k[2]);
    const vi32 b0 = interleave_lower(k[1], k[3]), b1 = interleave_upper(k[1], k[3]);
    keep[0] = interleave_lower(a0, b0), keep[1] = interleave_upper(a0, b0);
    keep[2] = interleave_lower(a1, b1), keep[3] = interleave_upper(a1, b1);
}
// The same as factors: `scale` where kept, 0 elsewhere.
template <class Dropout>
RK_INLINE void dropout_multiplier(const Dropout& d, uint32_t column, uint32_t row, uint32_t plane,
                                  vf32 (&multiplier)[4]) {
    vi32 keep[4];
    dropout_keep(d, column, row, plane, keep);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) multiplier[i] = (vf32)(keep[i] & (vi32)set1(d.scale));
}

}  // namespace rk::cpu::RK_CPU_ISA
