// gelu_ffn's products for Hopper, in bfloat16: gelu_ffn_sm90.cuh has them.
#include "csrc/cuda/gelu_ffn_sm90.cuh"

namespace rk::cuda {

void fused_forward_sm90_bfloat16(const FusedForward& args) {
    forward_of<cutlass::bfloat16_t>(args);
}

void fused_backward_sm90_bfloat16(const FusedBackward& args) {
    backward<cutlass::bfloat16_t>(args);
}

}  // namespace rk::cuda
