// What every kernel uses: dtypes, vectors of them in memory, reductions over a warp.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

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

template <typename T, int N>
__device__ inline void load(float (&to)[N], const T* from) {
    const Vector<T, N> v = *reinterpret_cast<const Vector<T, N>*>(from);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = to_float(v.values[i]);
}

template <typename T, int N>
__device__ inline void store(T* to, const float (&from)[N]) {
    Vector<T, N> v;
#pragma unroll
    for (int i = 0; i < N; ++i) v.values[i] = from_float<T>(from[i]);
    *reinterpret_cast<Vector<T, N>*>(to) = v;
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
