// What a binding needs of torch's CUDA device. The emulation in tests/cuda_emulation has a header of the same
// name, for CPU tensors: include it as <device.h>, so that the include path decides.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

// The dispatch key that the kernels are registered for.
#define RK_DISPATCH_KEY CUDA
// torch's own implementation of an op on the device, past the dispatcher: RK_ATEN(mm_out)(...).
#define RK_ATEN(op) aoti_torch_cuda_##op

namespace rk::cuda {

// Makes a tensor's device the current one while it lives, and gives torch's current stream there.
class OnDeviceOf {
  public:
    explicit OnDeviceOf(const torch::stable::Tensor& t) : guard_(t.get_device_index()) {
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
    }
    cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_); }

  private:
    torch::stable::accelerator::DeviceGuard guard_;
    void* stream_ = nullptr;
};

}  // namespace rk::cuda
