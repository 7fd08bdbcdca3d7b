// Every PTX instruction that the kernels use, each as one function. The emulation in tests/cuda_emulation has
// a header of the same name that does the same in software: include it as <ptx.cuh>, so that the include path
// decides. (Warp shuffles, votes, barriers and atomics are CUDA C++ functions, and used as such.)
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace rk::cuda::ptx {

// 16 bytes from global memory that will not be read again: first to leave L1 and L2.
__device__ inline uint4 load_streaming(const void* global) {
    uint4 v;
    asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(global));
    return v;
}

// 2 to the power of x, approximately: relative error 2^-22, denormal results flushed to zero; 2^-inf is 0.
__device__ inline float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace rk::cuda::ptx
