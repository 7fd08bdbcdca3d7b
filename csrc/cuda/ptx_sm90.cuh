// The instructions that only Hopper has (sm_90a), each as one function: wgmma, mbarrier, bulk tensor copies,
// and what orders them. The emulation in tests/cuda_emulation has a header of the same name that does the
// same in software: include it as <ptx_sm90.cuh>. Chapters of the PTX ISA: 9.7.15 (wgmma), 9.7.13.15
// (mbarrier), 9.7.9.27 (cp.async.bulk.tensor).
//
// Shared memory is named by 32-bit addresses in the shared window, as these instructions want them.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include <ptx.cuh>
#include <type_traits>

namespace rk::cuda::ptx {

// ------------------------------------------------------------------------------------------------ mbarrier

// A phase of the barrier is over when `arrivals` threads have arrived and all bytes that it expects have
// come.
__device__ inline void mbarrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers known to the copy engine; a barrier of the block must follow.
__device__ inline void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void mbarrier_arrive(uint32_t barrier, int count = 1) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Arrives once, and has the phase wait for that many bytes of bulk copies.
__device__ inline void mbarrier_arrive_expect_bytes(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

// Waits until a phase of the barrier is over, numbered from 0 (-1: does not wait). The instruction knows its
// parity alone, so the phase must be the one under way or the one before it: a waiter that is further ahead
// would go on too early. The emulation checks that.
__device__ inline void mbarrier_wait(uint32_t barrier, int phase) {
    uint32_t over;
    do {
        asm volatile(
            "{\n"
            ".reg .pred over;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
            "selp.u32 %0, 1, 0, over;\n"
            "}"
            : "=r"(over)
            : "r"(barrier), "r"(phase & 1)
            : "memory");
    } while (over == 0);
}

// ------------------------------------------------------------------------------------------------ copies

__device__ inline void prefetch_tensor_map(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Has the copy engine bring the box of a 3-dimensional tensor that starts at (x, y, z), innermost first, to
// shared memory, and tell the barrier how many bytes came. What lies outside of the tensor comes as zeros,
// and counts.
__device__ inline void copy_box(uint32_t to, const CUtensorMap* map, int x, int y, int z, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
        "%4, %5}], [%2];" ::"r"(to),
        "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
        : "memory");
}

// Between this thread's ordinary accesses to shared memory and those of the tensor cores and the copy engine.
__device__ inline void fence_shared_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ------------------------------------------------------------------------------------------------ threads

// A barrier of `threads` threads of the block; id 0 is that of __syncthreads.
__device__ inline void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Registers of each thread of a warpgroup from here on; waits until the block has so many to give.
template <int Registers>
__device__ inline void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ inline void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

// ------------------------------------------------------------------------------------------------ wgmma

// wgmma reads and writes its registers later than the compiler thinks. What changes them comes before hold(),
// in program order, and what uses them after.
__device__ __forceinline__ void hold(float& x) {
    asm volatile("" : "+f"(x)::"memory");
}
__device__ __forceinline__ void hold(uint32_t& x) {
    asm volatile("" : "+r"(x)::"memory");
}
template <typename T, int N>
__device__ __forceinline__ void hold(T (&registers)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) hold(registers[i]);
}

// Before the first wgmma, and whenever registers that the next one reads or adds to have been written:
// `registers`, arrays.
template <typename... Registers>
__device__ __forceinline__ void wgmma_fence(Registers&... registers) {
    (hold(registers), ...);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ inline void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until no more than Pending of the committed groups are under way. `results`: the accumulators that are
// complete then.
template <int Pending, typename... Results>
__device__ __forceinline__ void wgmma_wait(Results&... results) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
    (hold(results), ...);
}

#define RK_F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define RK_F16(d, i) RK_F4(d, i), RK_F4(d, i + 4), RK_F4(d, i + 8), RK_F4(d, i + 12)
#define RK_WGMMA_N64(type)                                                                                  \
    asm volatile(                                                                                           \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                                        \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                         \
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
        "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, p, 1, 1, "      \
        "%38;\n}"                                                                                           \
        : RK_F16(d, 0), RK_F16(d, 16)                                                                       \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(ColumnsInner))
#define RK_WGMMA_N32(type)                                                                                \
    asm volatile(                                                                                         \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"                                                      \
        "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type                                       \
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19}, " \
        "%20, p, 1, 1, %22;\n}"                                                                           \
        : RK_F16(d, 0)                                                                                    \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(ColumnsInner))

// d [64, N] = a [64, 16] @ b [16, N] (+ d): a from the registers of a warpgroup, laid out as for mma.sync
// m16n8k16 (warp w has the rows 16 w ... 16 w + 15), b from shared memory by its matrix descriptor.
// ColumnsInner: the N columns of a row of b are neighbours in memory (N-major), not the 16 rows of a column
// (K-major). N is 32 or 64: d has N / 2 registers. d[i] is row 16 w + lane / 4 + 8 (i / 2 % 2), column 8 (i /
// 4) + 2 (lane % 4) + i % 2.
template <typename T, bool ColumnsInner>
__device__ inline void wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    if constexpr (std::is_same<T, __nv_bfloat16>::value)
        RK_WGMMA_N64("bf16");
    else
        RK_WGMMA_N64("f16");
}
template <typename T, bool ColumnsInner>
__device__ inline void wgmma(float (&d)[16], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    if constexpr (std::is_same<T, __nv_bfloat16>::value)
        RK_WGMMA_N32("bf16");
    else
        RK_WGMMA_N32("f16");
}

#undef RK_WGMMA_N32
#undef RK_WGMMA_N64
#undef RK_F16
#undef RK_F4

}  // namespace rk::cuda::ptx
