// The emulation's csrc/cuda/device.h: the "device" is the CPU, and there are no streams.
#pragma once
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/tensor.h>

#define RK_DISPATCH_KEY CPU
#define RK_ATEN(op) aoti_torch_cpu_##op

namespace rk::cuda {

class OnDeviceOf {
  public:
    explicit OnDeviceOf(const torch::stable::Tensor&) {}
    cudaStream_t stream() const { return nullptr; }
};

}  // namespace rk::cuda
