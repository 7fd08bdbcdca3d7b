// In the place of what is not emulated: CUTLASS's Hopper kernels. The variant can be set, and then says what
// is amiss.
#include <stdexcept>

#include "csrc/cuda/gelu_ffn.h"

namespace rk::cuda {

void fused_forward_sm90(const FusedForward&) {
    throw std::runtime_error("gelu_ffn: the variant sm90 (CUTLASS) is not emulated");
}
void fused_backward_sm90(const FusedBackward&) {
    throw std::runtime_error("gelu_ffn: the variant sm90 (CUTLASS) is not emulated");
}

}  // namespace rk::cuda
