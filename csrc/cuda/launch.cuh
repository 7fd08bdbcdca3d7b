// How the host side of a .cu file finds out what it runs on and starts a kernel. The emulation in
// tests/cuda_emulation has a header of the same name: include it as <launch.cuh>, so that the include path
// decides.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace rk::cuda {

inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess)
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// What a launch is planned from.
struct Device {
    int arch;  // 10 * major + minor: 80, 86, 89, 90, 100, ...
    int multiprocessors;
    size_t shared_bytes_per_block;  // with the opt-in above 48 KiB
};

// The current device's. All are read once, by whoever comes first, and others wait for it: these are driver
// calls of some microseconds.
inline const Device& current_device() {
    static const std::vector<Device> devices = [] {
        int count = 0;
        check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
        std::vector<Device> all;
        for (int index = 0; index < count; ++index) {
            const auto attribute = [&](cudaDeviceAttr which, const char* what) {
                int value = 0;
                check(cudaDeviceGetAttribute(&value, which, index), what);
                return value;
            };
            all.push_back({10 * attribute(cudaDevAttrComputeCapabilityMajor, "compute capability") +
                               attribute(cudaDevAttrComputeCapabilityMinor, "compute capability"),
                           attribute(cudaDevAttrMultiProcessorCount, "multiprocessor count"),
                           static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                                         "shared memory per block"))});
        }
        return all;
    }();
    int index = 0;
    check(cudaGetDevice(&index), "cudaGetDevice");
    return devices.at(static_cast<size_t>(index));
}

struct Launch {
    dim3 grid;
    dim3 block;
    size_t shared_bytes;  // dynamic
    cudaStream_t stream;
};

// Dynamic shared memory that a launch need not ask for. Without asking, a kernel has 48 KiB for that and its
// __shared__ variables together; no kernel that has both has more than 4 KiB of these, the gap up to the
// alignment of shared_memory() included.
constexpr size_t kSharedUnasked = 44 * 1024;

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...), checked. A grid without blocks starts nothing.
template <typename... Parameters>
void launch(void (*kernel)(Parameters...), const Launch& how,
            typename std::common_type<Parameters>::type... arguments) {
    if (how.grid.x == 0 || how.grid.y == 0 || how.grid.z == 0) return;
    if (how.grid.x > INT_MAX || how.grid.y > 65535 || how.grid.z > 65535)
        throw std::runtime_error("roberta_kernels: grid of " + std::to_string(how.grid.x) + " x " +
                                 std::to_string(how.grid.y) + " x " + std::to_string(how.grid.z) +
                                 " blocks is larger than CUDA allows");
    // A kernel has one attribute for all threads: nobody may lower it between another's asking and launching.
    static std::mutex one_at_a_time;
    std::unique_lock<std::mutex> asking(one_at_a_time, std::defer_lock);
    if (how.shared_bytes > kSharedUnasked) {
        asking.lock();
        check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(std::max(how.shared_bytes, size_t{48} * 1024))),
              "shared memory of a kernel");
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = how.grid;
    config.blockDim = how.block;
    config.dynamicSmemBytes = how.shared_bytes;
    config.stream = how.stream;
    check(cudaLaunchKernelEx(&config, kernel, arguments...), "kernel launch");
}

#ifdef __CUDACC__
// The block's dynamic shared memory.
__device__ inline unsigned char* shared_memory() {
    extern __shared__ __align__(1024) unsigned char rk_shared_memory[];
    return rk_shared_memory;
}
#endif

}  // namespace rk::cuda
