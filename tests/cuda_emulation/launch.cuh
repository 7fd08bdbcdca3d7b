// The emulation's csrc/cuda/launch.cuh: the device is what the tests say it is, and a launch runs the kernel
// here.
#pragma once
#include <climits>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace rk::cuda {

struct Device {
    int arch;
    int multiprocessors;
    size_t shared_bytes_per_block;
};

const Device& current_device();

struct Launch {
    dim3 grid;
    dim3 block;
    size_t shared_bytes;
    cudaStream_t stream;
};

template <typename... Parameters>
void launch(void (*kernel)(Parameters...), const Launch& how,
            typename std::common_type<Parameters>::type... arguments) {
    if (how.grid.x == 0 || how.grid.y == 0 || how.grid.z == 0) return;
    ::emulation::run(how.grid, how.block, how.shared_bytes, [&] { kernel(arguments...); });
}

inline unsigned char* shared_memory() {
    return ::emulation::shared_memory();
}

}  // namespace rk::cuda
