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

__device__ inline uint32_t shared_address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Starts copying 16 bytes to shared memory, past L1; zeros where !valid (nothing is read then).
__device__ inline void copy_async_16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

// The same for 8 bytes, through L1.
__device__ inline void copy_async_8(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 8 : 0)
                 : "memory");
}

// Makes a group of the copies that this thread has started since the last group.
__device__ inline void copy_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most Pending of this thread's groups, the youngest, are under way. What other threads copied
// takes a barrier besides.
template <int Pending>
__device__ inline void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane i passes the address of row i % 8 of matrix
// i / 8, 16 bytes, and gets the elements 2 * (i % 4) and the next of row i / 4 of each.
__device__ inline void load_matrices(uint32_t (&to)[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
}

// The same, each matrix transposed: lane i gets the elements i / 4 of the rows 2 * (i % 4) and the next.
__device__ inline void load_matrices_transposed(uint32_t (&to)[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
}

// d += a * b on the tensor cores: a is 16 x 16, b 16 x 8, d 16 x 8 in float32. With g = lane / 4 and
// t = lane % 4 a lane holds of a the pairs (row g, columns 2t and 2t + 1), (g + 8, 2t), (g, 2t + 8),
// (g + 8, 2t + 8); of b the pairs (rows 2t and 2t + 1, column g), (2t + 8, g); of d (g, 2t), (g, 2t + 1),
// (g + 8, 2t), (g + 8, 2t + 1).
template <typename T>
__device__ inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void multiply_add<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                   uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void multiply_add<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace rk::cuda::ptx
