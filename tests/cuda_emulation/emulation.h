// CUDA C++ for g++: included before every source that the emulation compiles (g++ -include). It takes
// NVIDIA's own headers in host mode, then gives the words of CUDA C++ that only nvcc knows a meaning on the
// CPU. README.md tells how it works.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>

#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#undef __constant__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__
#define threadIdx (::emulation::thread_index())
#define blockIdx (::emulation::block_index())
#define blockDim (::emulation::block_size())
#define gridDim (::emulation::grid_size())
#define warpSize 32

// What runs for a whole warp at once is no access of the kernel's.
#define RK_UNSEEN __attribute__((no_sanitize("thread")))

namespace emulation {

uint3 thread_index();
uint3 block_index();
dim3 block_size();
dim3 grid_size();
int lane();  // of the running thread, in its warp

// Ends the launch that is running; launch() throws std::runtime_error with the message, the block and the
// thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// The block's dynamic shared memory, and how much of it the launch asked for.
unsigned char* shared_memory();
size_t shared_bytes();

// Lets other threads run before this one goes on: what a loop that waits for another thread must call.
void yield();

// All lanes of `mask` meet; the last to arrive runs compute(in, out) for all of them, where in[lane] and
// out[lane] are what the lanes passed, null for lanes outside the mask. `what` names the operation: lanes
// that meet must agree on it.
using WarpFunction = void (*)(const void* const in[32], void* const out[32], uint32_t mask);
void warp_collective(const char* what, uint32_t mask, const void* in, void* out, WarpFunction compute);

// Waits until `count` threads (0: all that live) are at barrier `id` of the block. Returns how many of them
// had a predicate other than zero.
int block_barrier(int id, int count, int predicate);
void block_barrier_arrive(int id, int count);  // arrives without waiting

// Launches are recorded, and nothing runs.
bool is_dry_run();

// Ends one wait of this thread for a change that others make: it goes on when one of them calls unpark(), to
// look again.
void park(const char* what);
void unpark();

// Something that happens at a time of its own, between the threads: what the copy engine does. One at a time,
// drawn at random, is held back until nothing else can happen.
void later(std::function<void()> action);

// Tells the blocks that ever ran apart.
uint64_t block_number();

// The thread of the block that runs now, -1: none.
int running_thread();

// Parameter space: where the arguments lie that the running thread's kernel was called with.
void note_parameter(const void* address, size_t bytes);
bool is_parameter(const void* address, size_t bytes);

// emulator_proxies.cpp: what the copy engine and the tensor cores see of shared memory (offsets in it).
void begin_proxies(int threads);  // of a block
void fence_shared_async();        // by the running thread
void write_async(uint32_t at, const void* from, uint32_t count);
void demand_fenced_stores(const char* what, uint32_t at, uint32_t count);  // fails if there are unfenced ones
void demand_fenced_loads(const char* what, uint32_t at, uint32_t count);

// emulator_sm90.cpp: fails if the block has left something amiss.
void check_end_of_block();

// emulator_counts.cpp. Of a launch; a request is what one instruction of a warp asks for. What is only counted
// where a build counts accesses: all up to shared_conflicts.
enum class Count {
    load_requests,          // of global memory
    vector_load_requests,   // of those, 16 bytes a lane
    load_sectors,           // of 32 bytes, asked for by requests and by bulk copies
    distinct_load_sectors,  // each once
    store_requests,
    store_sectors,
    distinct_store_sectors,
    shared_requests,
    shared_wavefronts,  // of 128 bytes
    shared_conflicts,   // of those, beyond what the same bytes would take without bank conflicts
    bulk_wavefronts,    // of 128 bytes that the copy engine writes, or wgmma reads, in shared memory
    barrier_arrivals,   // of threads
    mbarrier_arrivals,  // of threads
    mbarrier_waits,     // of threads
    exponentials,       // ptx::exp2, of threads
    tensor_flops,
    shuffles,  // and votes, of warps
    kinds
};
bool counting();
void count(Count what, int64_t more = 1);
void begin_counts(const void* code);  // of a launch of that kernel
void begin_counts_of_block(int threads);
void end_counts_of_block();
void count_meeting(int warp);    // all of its lanes have come to the same point
void count_barrier(int thread);  // arrives
void count_access(const void* address, size_t bytes, bool store, uint64_t place);  // by the running thread
void count_matrices(const void* const in[32]);                                     // ldmatrix of a warp: rows
void count_copy(const void* global, size_t bytes, bool store);  // of neighbours, by the copy engine
bool in_a_stack(const void* address);                           // of a thread, or of the host
bool in_running_stack(const void* address, size_t bytes);       // of the running thread

// cp.async: counts it, and defers the copy (of zeros, where it is not valid).
void copy_async(void* shared, const void* global, size_t bytes, bool valid);

// The call stack of the running thread from the caller on, as a number. For instrumented code, which keeps
// frame pointers.
uint64_t place_of_caller(void* const* frame);

// Runs kernel() for every thread of every block; launch.cuh calls it. code: of the kernel, to name it.
void run(dim3 grid, dim3 block, size_t shared_bytes, const void* code, const std::function<void()>& kernel);

// Per-thread state of the instructions in ptx.cuh that complete later (cp.async): one list of pending
// actions, in groups.
void defer(std::function<void()> action);
void commit_group();
void wait_group(int pending);

}  // namespace emulation

// ------------------------------------------------------------------------------------------- barriers and
// warps

inline void __syncthreads() {
    emulation::block_barrier(0, 0, 0);
}
inline int __syncthreads_count(int predicate) {
    return emulation::block_barrier(0, 0, predicate);
}
inline int __syncthreads_or(int predicate) {
    return emulation::block_barrier(0, 0, predicate) > 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    emulation::warp_collective("__syncwarp", mask, nullptr, nullptr,
                               [](const void* const*, void* const*, uint32_t) {});
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) {
    emulation::yield();
}
[[noreturn]] inline void __trap() {
    emulation::fail("__trap()");
}

namespace emulation {

template <typename T>
struct Shuffled {
    T value;
    int source;  // lane
};

template <typename T>
inline T shuffle(const char* what, unsigned mask, T value, int source) {
    if (counting() && lane() == __builtin_ctz(mask)) count(Count::shuffles);
    static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 8, "what a shuffle can move");
    const Shuffled<T> in{value, source};
    T out = value;
    warp_collective(what, mask, &in, &out,
                    [](const void* const ins[32], void* const outs[32], uint32_t lanes) RK_UNSEEN {
                        for (int i = 0; i < 32; ++i) {
                            if (!(lanes >> i & 1)) continue;
                            const int from = static_cast<const Shuffled<T>*>(ins[i])->source;
                            if (!(lanes >> from & 1))
                                fail("lane %d shuffles from lane %d, which its mask leaves out", i, from);
                            *static_cast<T*>(outs[i]) = static_cast<const Shuffled<T>*>(ins[from])->value;
                        }
                    });
    return out;
}

inline uint32_t ballot(const char* what, unsigned mask, int predicate) {
    uint32_t out = 0;
    if (counting() && lane() == __builtin_ctz(mask)) count(Count::shuffles);
    warp_collective(what, mask, &predicate, &out,
                    [](const void* const ins[32], void* const outs[32], uint32_t lanes) RK_UNSEEN {
                        uint32_t votes = 0;
                        for (int i = 0; i < 32; ++i)
                            if (lanes >> i & 1)
                                votes |= static_cast<uint32_t>(*static_cast<const int*>(ins[i]) != 0) << i;
                        for (int i = 0; i < 32; ++i)
                            if (lanes >> i & 1) *static_cast<uint32_t*>(outs[i]) = votes;
                    });
    return out;
}

}  // namespace emulation

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    const int base = emulation::lane() & ~(width - 1);
    return emulation::shuffle("__shfl_sync", mask, value, base + (source & (width - 1)));
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32) {
    const int lane = emulation::lane(), source = lane ^ distance;
    const bool inside = (source & ~(width - 1)) <= (lane & ~(width - 1));
    return emulation::shuffle("__shfl_xor_sync", mask, value, inside ? source : lane);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
    const int lane = emulation::lane();
    const bool inside = (lane & (width - 1)) + static_cast<int>(distance) < width;
    return emulation::shuffle("__shfl_down_sync", mask, value,
                              inside ? lane + static_cast<int>(distance) : lane);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
    const int lane = emulation::lane();
    const bool inside = (lane & (width - 1)) >= static_cast<int>(distance);
    return emulation::shuffle("__shfl_up_sync", mask, value,
                              inside ? lane - static_cast<int>(distance) : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    return emulation::ballot("__ballot_sync", mask, predicate);
}
inline int __any_sync(unsigned mask, int predicate) {
    return emulation::ballot("__any_sync", mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
    return emulation::ballot("__all_sync", mask, predicate) == mask;
}

// ------------------------------------------------------------------------------------------- memory

template <typename T>
inline T __ldg(const T* address) {
    return *address;
}
template <typename T>
inline T __ldcg(const T* address) {
    return *address;
}
template <typename T>
inline T __ldcs(const T* address) {
    return *address;
}
template <typename T>
inline void __stcs(T* address, T value) {
    *address = value;
}
template <typename T>
inline void __stcg(T* address, T value) {
    *address = value;
}
// One thread runs at a time, and only gives way inside the functions of this file: plain memory is atomic.
template <typename T>
inline T atomicAdd(T* address, T value) {
    static_assert(std::is_integral<T>::value, "sums of floats by atomics have no fixed order");
    const T before = *address;
    *address = before + value;
    return before;
}
template <typename T>
inline T atomicMax(T* address, T value) {
    const T before = *address;
    *address = std::max(before, value);
    return before;
}
template <typename T>
inline T atomicMin(T* address, T value) {
    const T before = *address;
    *address = std::min(before, value);
    return before;
}
template <typename T>
inline T atomicExch(T* address, T value) {
    const T before = *address;
    *address = value;
    return before;
}
template <typename T>
inline T atomicCAS(T* address, T compare, T value) {
    const T before = *address;
    if (before == compare) *address = value;
    return before;
}

// ------------------------------------------------------------------------------------------- arithmetic

inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline float rsqrtf(float x) {
    return 1.0f / std::sqrt(x);
}
inline float __expf(float x) {
    return std::exp(x);
}
inline float __logf(float x) {
    return std::log(x);
}
inline float __fdividef(float a, float b) {
    return a / b;
}
inline float __frcp_rn(float x) {
    return 1.0f / x;
}
inline float __fmaf_rn(float a, float b, float c) {
    return std::fma(a, b, c);
}
inline float __fadd_rn(float a, float b) {
    return a + b;
}
inline float __fmul_rn(float a, float b) {
    return a * b;
}
inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}
inline int __clz(int x) {
    return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x));
}
inline int __ffs(int x) {
    return __builtin_ffs(x);
}
template <typename To, typename From>
inline To emulation_bits(From from) {
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}
inline float __uint_as_float(unsigned x) {
    return emulation_bits<float>(x);
}
inline float __int_as_float(int x) {
    return emulation_bits<float>(x);
}
inline unsigned __float_as_uint(float x) {
    return emulation_bits<unsigned>(x);
}
inline int __float_as_int(float x) {
    return emulation_bits<int>(x);
}
using std::max;
using std::min;
