// What every kernel uses: dtypes, vectors of them in memory, reductions over a warp.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "csrc/cuda/dtype.h"

namespace rk::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline float to_float(float x) {
    return x;
}
__device__ inline float to_float(__nv_bfloat16 x) {
    return __bfloat162float(x);
}
__device__ inline float to_float(__half x) {
    return __half2float(x);
}

// Rounds to nearest even.
template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
    return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
    return __float2half_rn(x);
}

// N neighbours in memory, moved by one access when N * sizeof(T) is 4, 8 or 16; the address must be a
// multiple of that.
template <typename T, int N>
struct alignas(N * sizeof(T)) Vector {
    T values[N];
};

// Neighbours in registers as they lie in memory. 16 bytes stay four registers, where a compiler gives each
// 16-bit value of a Vector one of its own.
template <typename T, int N>
using Packed = std::conditional_t<N * sizeof(T) == 16, uint4, Vector<T, N>>;

template <int N, typename T>
__device__ inline Packed<T, N> load_packed(const T* from) {
    return *reinterpret_cast<const Packed<T, N>*>(from);
}

template <typename T>
__device__ inline float2 unpack_pair(uint32_t pair) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
    } else {
        __half2_raw halves;
        memcpy(&halves, &pair, sizeof(pair));
        return __half22float2(halves);
    }
}

template <typename T>
__device__ inline uint32_t pack_pair(float low, float high) {
    std::conditional_t<std::is_same_v<T, __nv_bfloat16>, __nv_bfloat162, __half2> pair;
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
        pair = __floats2bfloat162_rn(low, high);
    else
        pair = __floats2half2_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof(bits));
    return bits;
}

template <typename T, int N>
__device__ inline void unpack(float (&to)[N], const Packed<T, N>& from) {
    if constexpr (N * sizeof(T) == 16) {
        const uint32_t words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (sizeof(T) == 4) {
                to[i] = __uint_as_float(words[i]);
            } else {
                const float2 pair = unpack_pair<T>(words[i]);
                to[2 * i] = pair.x;
                to[2 * i + 1] = pair.y;
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) to[i] = to_float(from.values[i]);
    }
}

template <typename T, int N>
__device__ inline void load(float (&to)[N], const T* from) {
    unpack<T>(to, load_packed<N>(from));
}

template <typename T, int N>
__device__ inline void store(T* to, const float (&from)[N]) {
    if constexpr (sizeof(T) == 2 && N % 2 == 0) {
        Vector<uint32_t, N / 2> pairs;
#pragma unroll
        for (int i = 0; i < N / 2; ++i) pairs.values[i] = pack_pair<T>(from[2 * i], from[2 * i + 1]);
        *reinterpret_cast<Vector<uint32_t, N / 2>*>(to) = pairs;
    } else {
        Vector<T, N> v;
#pragma unroll
        for (int i = 0; i < N; ++i) v.values[i] = from_float<T>(from[i]);
        *reinterpret_cast<Vector<T, N>*>(to) = v;
    }
}

// Sum over the `Lanes` neighbouring lanes (a power of two) that this one is among; every lane gets it, always
// in the same order of additions.
template <int Lanes = kWarp>
__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int distance = Lanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
    return x;
}

template <int Lanes = kWarp>
__device__ inline float warp_max(float x) {
#pragma unroll
    for (int distance = Lanes / 2; distance > 0; distance /= 2)
        x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, distance));
    return x;
}

}  // namespace rk::cuda
