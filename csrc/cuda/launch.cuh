// How the host side of a .cu file finds out what it runs on and starts a kernel. The emulation in
// tests/cuda_emulation has a header of the same name: include it as <launch.cuh>, so that the include path
// decides.
#pragma once
#include <cuda_runtime.h>

#include <climits>
#include <stdexcept>
#include <string>
#include <type_traits>

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

// The current device's. Read once per device: these are driver calls of some microseconds.
inline const Device& current_device() {
    constexpr int kMost = 64;
    static Device devices[kMost] = {};
    int index = 0;
    check(cudaGetDevice(&index), "cudaGetDevice");
    if (index >= kMost) throw std::runtime_error("roberta_kernels: device index above 63");
    Device& device = devices[index];
    if (device.arch == 0) {
        int major = 0, minor = 0, multiprocessors = 0, shared = 0;
        check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "compute capability");
        check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index), "compute capability");
        check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index),
              "multiprocessor count");
        check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
              "shared memory per block");
        device.multiprocessors = multiprocessors;
        device.shared_bytes_per_block = static_cast<size_t>(shared);
        device.arch = 10 * major + minor;  // last: two threads may fill it, with the same values
    }
    return device;
}

struct Launch {
    dim3 grid;
    dim3 block;
    size_t shared_bytes;  // dynamic
    cudaStream_t stream;
};

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...), checked. A grid without blocks starts nothing.
template <typename... Parameters>
void launch(void (*kernel)(Parameters...), const Launch& how,
            typename std::common_type<Parameters>::type... arguments) {
    if (how.grid.x == 0 || how.grid.y == 0 || how.grid.z == 0) return;
    if (how.grid.x > INT_MAX || how.grid.y > 65535 || how.grid.z > 65535)
        throw std::runtime_error("roberta_kernels: grid of " + std::to_string(how.grid.x) + " x " +
                                 std::to_string(how.grid.y) + " x " + std::to_string(how.grid.z) +
                                 " blocks is larger than CUDA allows");
    if (how.shared_bytes > 48 * 1024)
        check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(how.shared_bytes)),
              "shared memory of a kernel");
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
