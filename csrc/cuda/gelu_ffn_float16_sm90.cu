// gelu_ffn's products for Hopper, in float16: gelu_ffn_sm90.cuh has them.
#include "csrc/cuda/gelu_ffn_sm90.cuh"

namespace rk::cuda {

void fused_forward_sm90_float16(const FusedForward& args) {
    forward_of<cutlass::half_t>(args);
}

void fused_backward_sm90_float16(const FusedBackward& args) {
    backward<cutlass::half_t>(args);
}

}  // namespace rk::cuda
