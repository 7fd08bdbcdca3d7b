// Kernels with one mistake each, and their right twins: what test_emulation.py checks the emulation itself
// with.
#include <exception>
#include <launch.cuh>

#include "csrc/cuda/common.cuh"

namespace rk::cuda {
namespace {

constexpr int kThreads = 96;

// Every thread reads what its neighbour wrote to shared memory.
template <bool Barrier>
__global__ void neighbour(float* out) {
    float* shared = reinterpret_cast<float*>(shared_memory());
    shared[threadIdx.x] = static_cast<float>(threadIdx.x);
    if (Barrier) __syncthreads();
    out[threadIdx.x] = shared[(threadIdx.x + 1) % kThreads];
}

// A barrier that a third of the threads never reach: they wait at another.
__global__ void two_barriers(float* out) {
    emulation::block_barrier(threadIdx.x < kThreads / 3 ? 1 : 2, kThreads, 0);
    out[threadIdx.x] = 1.0f;
}

// Lanes of one warp in two different collectives.
__global__ void diverged(float* out) {
    float x = 1.0f;
    if (threadIdx.x % 2 == 0)
        x += __shfl_xor_sync(kAllLanes, x, 2);
    else
        __syncwarp();
    out[threadIdx.x] = x;
}

// A lane that its warp waits for has ended.
__global__ void ended(float* out) {
    if (threadIdx.x == 5) return;
    out[threadIdx.x] = warp_sum(1.0f);
}

__global__ void past_shared(float* out) {
    float* shared = reinterpret_cast<float*>(shared_memory());
    shared[threadIdx.x + 1] = 1.0f;
    out[threadIdx.x] = 1.0f;
}

__global__ void past_global(float* out) {
    out[threadIdx.x + 1] = 1.0f;
}

__global__ void unwaited_copy(float* out) {
    float* to = out + threadIdx.x;
    emulation::defer([to] { *to = 1.0f; });
    emulation::commit_group();
}

__global__ void waited_copy(float* out) {
    float* to = out + threadIdx.x;
    emulation::defer([to] { *to = 1.0f; });
    emulation::commit_group();
    emulation::defer([to] { *to += 1.0f; });
    emulation::commit_group();
    emulation::wait_group(1);
    *to *= 10.0f;
    emulation::wait_group(0);
}

// Sum over the block, exact in any order.
__global__ void block_sum(float* out) {
    __shared__ float sums[kThreads / kWarp];
    const float sum = warp_sum(static_cast<float>(threadIdx.x));
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;
    __syncthreads();
    float total = 0.0f;
    for (int i = 0; i < kThreads / kWarp; ++i) total += sums[i];
    out[threadIdx.x] = total;
}

}  // namespace

// Runs a kernel on one block of kThreads threads with kThreads floats of shared memory; the message of what
// it throws goes to `message` (room for 512 characters).
extern "C" __attribute__((visibility("default"))) void rk_fault(const char* name, float* out, char* message) {
    const Launch how{dim3(1), dim3(kThreads), kThreads * sizeof(float), nullptr};
    struct {
        const char* name;
        void (*kernel)(float*);
    } const kernels[] = {
        {"neighbour", neighbour<true>},
        {"no barrier", neighbour<false>},
        {"two barriers", two_barriers},
        {"diverged", diverged},
        {"ended", ended},
        {"past shared", past_shared},
        {"past global", past_global},
        {"unwaited copy", unwaited_copy},
        {"waited copy", waited_copy},
        {"block sum", block_sum},
    };
    message[0] = '\0';
    try {
        for (const auto& one : kernels)
            if (std::strcmp(one.name, name) == 0) return launch(one.kernel, how, out);
        throw std::runtime_error("no such kernel");
    } catch (const std::exception& error) {
        std::snprintf(message, 512, "%s", error.what());
    }
}

}  // namespace rk::cuda
