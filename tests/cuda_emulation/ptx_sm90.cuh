// The emulation's csrc/cuda/ptx_sm90.cuh: the same functions in software, written from the PTX ISA (9.7.15
// wgmma, 9.7.13.15 mbarrier, 9.7.9.27 cp.async.bulk.tensor, 9.7.19.5 setmaxnreg) and from what CuTe's
// mma_traits_sm90_gmma.hpp says of canonical layouts. What they do is in emulator_sm90.cpp, which is compiled
// without what follows a kernel's own loads and stores.
//
// Addresses in the shared window are offsets from the start of the block's dynamic shared memory.
//
// Asynchrony shows. A copy fills its destination with NaN at once and writes it at some later time, in any
// order among copies. The accumulators of a wgmma hold a pattern from its issue to the wait, where it is
// computed; a kernel that writes them, the registers of a, or the shared memory of b in between is told so,
// and so is one without the fence or with warps that disagree.
//
// What hardware takes silently is an error here: a wait that another phase of the same parity ends; bytes
// that meet the copy engine or the tensor cores without fence_shared_async; barriers that the copy engine was
// not told of; registers that the block does not have; a matrix that begins within its swizzle's pattern; a
// tensor map that is no argument of the kernel.
#pragma once
#include <cuda.h>

#include <tensor_map.cuh>

namespace emulation {

// Phases are numbered from 0. Parity is all that the instruction knows.
void mbarrier_init(uint32_t barrier, int arrivals);
void fence_mbarrier_init();
void change_mbarrier(uint32_t barrier, int arrivals, int64_t more_bytes);
void mbarrier_wait(uint32_t barrier, int phase);

void prefetch_map(const CUtensorMap* map);
void copy_box(uint32_t to, const CUtensorMap* map, int x, int y, int z, uint32_t barrier);

void set_registers(int registers, bool more);  // of each thread of the warp

struct WgmmaCall {  // of one lane
    float* d;
    const uint32_t* a;
    uint64_t b;
    int columns;
    bool accumulate, inner, bf16;
};
void wgmma_fence();
void wgmma(const WgmmaCall& call);
void wgmma_commit();
void wgmma_wait(int pending);

constexpr uint32_t kInFlight = 0x7fc0f117;  // what accumulators hold meanwhile: a NaN
inline void demand_complete(const float& result) {
    if (emulation_bits<uint32_t>(result) == kInFlight)
        fail("wgmma_wait: a result that it names is still under way");
}
template <typename T, size_t N>
void demand_complete(const T (&results)[N]) {
    for (const T& result : results) demand_complete(result);
}

}  // namespace emulation

namespace rk::cuda::ptx {

inline uint32_t shared_address(const void* shared) {
    return static_cast<uint32_t>(static_cast<const unsigned char*>(shared) - ::emulation::shared_memory());
}

inline void mbarrier_init(uint32_t barrier, int arrivals) {
    ::emulation::mbarrier_init(barrier, arrivals);
}
inline void fence_mbarrier_init() {
    ::emulation::fence_mbarrier_init();
}
inline void mbarrier_arrive(uint32_t barrier, int count = 1) {
    if (count < 1) ::emulation::fail("mbarrier_arrive: count %d", count);
    ::emulation::count(::emulation::Count::mbarrier_arrivals);
    ::emulation::change_mbarrier(barrier, count, 0);
}
inline void mbarrier_arrive_expect_bytes(uint32_t barrier, int bytes) {
    ::emulation::count(::emulation::Count::mbarrier_arrivals);
    ::emulation::change_mbarrier(barrier, 0, bytes);  // expect-tx comes before the arrival
    ::emulation::change_mbarrier(barrier, 1, 0);
}
inline void mbarrier_wait(uint32_t barrier, int phase) {
    ::emulation::mbarrier_wait(barrier, phase);
}

inline void prefetch_tensor_map(const CUtensorMap* map) {
    ::emulation::prefetch_map(map);
}
inline void copy_box(uint32_t to, const CUtensorMap* map, int x, int y, int z, uint32_t barrier) {
    ::emulation::copy_box(to, map, x, y, z, barrier);
}
inline void fence_shared_async() {
    ::emulation::fence_shared_async();
}

inline void named_barrier(int id, int threads) {
    ::emulation::block_barrier(id, threads, 0);
}

template <int Registers>
inline void take_registers() {
    static_assert(Registers % 8 == 0 && Registers >= 24 && Registers <= 256, "setmaxnreg");
    ::emulation::set_registers(Registers, true);
}
template <int Registers>
inline void give_registers() {
    static_assert(Registers % 8 == 0 && Registers >= 24 && Registers <= 256, "setmaxnreg");
    ::emulation::set_registers(Registers, false);
}

template <typename... Registers>
inline void wgmma_fence(Registers&...) {
    ::emulation::wgmma_fence();
}
inline void wgmma_commit() {
    ::emulation::wgmma_commit();
}
template <int Pending, typename... Results>
inline void wgmma_wait(Results&... results) {
    ::emulation::wgmma_wait(Pending);
    (::emulation::demand_complete(results), ...);
}

template <typename T, bool ColumnsInner, size_t Registers>
inline void wgmma(float (&d)[Registers], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    constexpr bool kBf16 = std::is_same<T, __nv_bfloat16>::value;
    static_assert(kBf16 || std::is_same<T, __half>::value, "bfloat16 or float16");
    ::emulation::wgmma({d, a, b, static_cast<int>(2 * Registers), accumulate != 0, ColumnsInner, kBf16});
}

}  // namespace rk::cuda::ptx
