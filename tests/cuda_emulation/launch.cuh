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

// Called in the place of a kernel, from where it is called: its arguments lie where the kernel's will.
template <typename... Parameters>
__attribute__((noinline)) void note_parameters(Parameters... parameters) {
    (::emulation::note_parameter(&parameters, sizeof(parameters)), ...);
}

template <typename... Parameters>
void launch(void (*kernel)(Parameters...), const Launch& how,
            typename std::common_type<Parameters>::type... arguments) {
    // CUDA C++ Programming Guide, "Function Parameters": more needs newer drivers than we ask for.
    static_assert((sizeof(Parameters) + ... + 0) <= 4096, "parameter space");
    if (how.grid.x == 0 || how.grid.y == 0 || how.grid.z == 0) return;
    ::emulation::run(how.grid, how.block, how.shared_bytes, reinterpret_cast<const void*>(kernel), [&] {
        void (*volatile calls[])(Parameters...) = {note_parameters<Parameters...>, kernel};
#pragma GCC unroll 1
        for (int i = 0; i < 2; ++i) calls[i](arguments...);
    });
}

inline unsigned char* shared_memory() {
    return ::emulation::shared_memory();
}

}  // namespace rk::cuda
