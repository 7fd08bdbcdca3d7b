// Kernels with one mistake each, and their right twins: what test_emulation.py checks the emulation itself
// with.
#include <exception>
#include <launch.cuh>
#include <ptx_sm90.cuh>
#include <tensor_map.cuh>

#include "csrc/cuda/common.cuh"
#include "csrc/cuda/matrix_descriptor.cuh"

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

// ------------------------------------------------------------------------------------------------ Hopper

// One mistake each, of those that hardware says nothing of.
enum class Mistake {
    none,
    wait_two_ahead,
    wait_one_behind,
    unfenced_loads,
    unfenced_stores,
    fenced_by_another,
    unannounced_barrier,
    registers_that_are_not_there,
    registers_of_one_warp,
    more_registers_by_dec,
    matrix_within_the_swizzle,
    map_on_the_stack,
};

struct HopperShared {
    unsigned char tile[64 * 128];
    uint64_t full, free;
};
struct HopperProblem {
    CUtensorMap map;  // of a [64, 1, 64] tensor of ones
    float* out;
};

// The producer of the first warpgroup brings a tile twice; the second warpgroup reads it by ordinary loads,
// the second time by wgmma too, half of it overwritten with zeros: out is 8.
template <Mistake mistake>
__global__ void __launch_bounds__(384, 1) hopper(const __grid_constant__ HopperProblem problem) {
    HopperShared& shared = *reinterpret_cast<HopperShared*>(shared_memory());
    const int thread = static_cast<int>(threadIdx.x), mine = thread - 128;
    const uint32_t full = ptx::shared_address(&shared.full), free = ptx::shared_address(&shared.free);
    const uint32_t tile = ptx::shared_address(shared.tile);
    if (thread == 0) {
        ptx::mbarrier_init(full, 1);
        ptx::mbarrier_init(free, 128);
        if (mistake != Mistake::unannounced_barrier) ptx::fence_mbarrier_init();
    }
    __syncthreads();
    if (mine < 0) {
        ptx::give_registers<40>();
        if (thread != 0) return;
        const HopperProblem copy = problem;
        const CUtensorMap& map = mistake == Mistake::map_on_the_stack ? copy.map : problem.map;
        for (int n = 0; n < 2; ++n) {
            ptx::mbarrier_wait(free, n - 1);
            ptx::mbarrier_arrive_expect_bytes(full, sizeof(shared.tile));
            ptx::copy_box(tile, &map, 0, 0, 0, full);
        }
        return;
    }
    if (mistake == Mistake::more_registers_by_dec)
        ptx::give_registers<232>();
    else if (mistake == Mistake::registers_that_are_not_there)
        ptx::take_registers<240>();
    else if (mistake != Mistake::registers_of_one_warp || mine < 32)
        ptx::take_registers<232>();
    if (mine >= 128) return;

    float sum = 0.0f;
    for (int n = 0; n < 2; ++n) {
        ptx::mbarrier_wait(full, mistake == Mistake::wait_two_ahead ? n + 1 : n);
        sum += to_float(*reinterpret_cast<const __nv_bfloat16*>(shared.tile + 64 * mine));
        if (n == 1) break;
        if (mistake != Mistake::unfenced_loads) ptx::fence_shared_async();
        ptx::mbarrier_arrive(free);
    }
    if (mistake == Mistake::wait_one_behind) ptx::mbarrier_wait(full, 0);
    ptx::named_barrier(1, 128);  // all have read
    // Rows 0 to 7 of each 16: of rows of 128 bytes, 8 are 1024.
    uint4* const row = reinterpret_cast<uint4*>(shared.tile + mine / 32 * 2048 + mine % 32 * 32);
    row[0] = row[1] = make_uint4(0, 0, 0, 0);
    if (mistake == Mistake::fenced_by_another) {
        ptx::named_barrier(1, 128);
        if (mine == 0) ptx::fence_shared_async();
    } else if (mistake != Mistake::unfenced_stores) {
        ptx::fence_shared_async();
    }
    ptx::named_barrier(1, 128);
    const uint32_t ones = 0x3f803f80;
    uint32_t a[4] = {ones, ones, ones, ones};
    float d[32] = {};
    ptx::wgmma_fence(a, d);
    const uint32_t at = tile + (mistake == Mistake::matrix_within_the_swizzle ? 4 * 128 : 0);
    ptx::wgmma<__nv_bfloat16, true>(d, a, matrix_descriptor<128>(at), 0);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>(d);
    if (mine < kThreads) problem.out[mine] = sum == 2.0f ? d[mine % 32] : sum;
}

template <Mistake mistake>
void run_hopper(float* out) {
    alignas(16) static __nv_bfloat16 ones[64 * 64];
    for (__nv_bfloat16& one : ones) one = __float2bfloat16(1.0f);
    TensorMap3d map{};
    map.data = ones;
    for (int i = 0; i < 3; ++i) map.sizes[i] = map.box[i] = i == 1 ? 1 : 64;
    map.strides[0] = map.strides[1] = 128;
    map.bfloat16 = true;
    launch(hopper<mistake>, {dim3(1), dim3(384), sizeof(HopperShared), nullptr},
           HopperProblem{encode(map), out});
}

// Lanes of a warp read words that lie Stride apart: of one bank, where Stride is a power of two.
template <int Stride>
__global__ void strided(float* out) {
    float* const words = reinterpret_cast<float*>(shared_memory());
    words[threadIdx.x] = static_cast<float>(threadIdx.x);
    __syncthreads();
    out[threadIdx.x] = words[threadIdx.x % 32 * Stride];
}

template <void (*kernel)(float*)>
void run_plain(float* out) {
    launch(kernel, {dim3(1), dim3(kThreads), kThreads * sizeof(float), nullptr}, out);
}

}  // namespace

// Runs a kernel on one block, which writes kThreads floats; the message of what it throws goes to `message` (room for 512 characters).
extern "C" __attribute__((visibility("default"))) void rk_fault(const char* name, float* out, char* message) {
    struct {
        const char* name;
        void (*run)(float*);
    } const kernels[] = {
        {"neighbour", run_plain<neighbour<true>>},
        {"no barrier", run_plain<neighbour<false>>},
        {"two barriers", run_plain<two_barriers>},
        {"diverged", run_plain<diverged>},
        {"ended", run_plain<ended>},
        {"past shared", run_plain<past_shared>},
        {"past global", run_plain<past_global>},
        {"unwaited copy", run_plain<unwaited_copy>},
        {"waited copy", run_plain<waited_copy>},
        {"block sum", run_plain<block_sum>},
        {"stride 2", run_plain<strided<2>>},
        {"stride 3", run_plain<strided<3>>},
        {"hopper", run_hopper<Mistake::none>},
        {"wait two ahead", run_hopper<Mistake::wait_two_ahead>},
        {"wait one behind", run_hopper<Mistake::wait_one_behind>},
        {"unfenced loads", run_hopper<Mistake::unfenced_loads>},
        {"unfenced stores", run_hopper<Mistake::unfenced_stores>},
        {"fenced by another", run_hopper<Mistake::fenced_by_another>},
        {"unannounced barrier", run_hopper<Mistake::unannounced_barrier>},
        {"registers that are not there", run_hopper<Mistake::registers_that_are_not_there>},
        {"registers of one warp", run_hopper<Mistake::registers_of_one_warp>},
        {"more registers by dec", run_hopper<Mistake::more_registers_by_dec>},
        {"matrix within the swizzle", run_hopper<Mistake::matrix_within_the_swizzle>},
        {"map on the stack", run_hopper<Mistake::map_on_the_stack>},
    };
    message[0] = '\0';
    try {
        for (const auto& one : kernels)
            if (std::strcmp(one.name, name) == 0) return one.run(out);
        throw std::runtime_error("no such kernel");
    } catch (const std::exception& error) {
        std::snprintf(message, 512, "%s", error.what());
    }
}

}  // namespace rk::cuda
