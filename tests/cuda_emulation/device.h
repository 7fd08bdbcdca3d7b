// The emulation's csrc/cuda/device.h: the "device" is the CPU, and there are no streams.
#pragma once
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/tensor.h>

#define RK_DISPATCH_KEY CPU
// Not in a dry run, where there may be nothing behind an address.
#define RK_ATEN(op) \
    [](auto... arguments) { return ::emulation::is_dry_run() ? 0 : aoti_torch_cpu_##op(arguments...); }

namespace rk::cuda {

class OnDeviceOf {
  public:
    explicit OnDeviceOf(const torch::stable::Tensor&) {}
    cudaStream_t stream() const { return nullptr; }
};

}  // namespace rk::cuda
