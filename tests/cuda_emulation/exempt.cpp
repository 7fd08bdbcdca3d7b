// In the place of what is not emulated: CUTLASS's Hopper kernels. The variant can be set, and then says what
// is amiss.
#include <stdexcept>

#include "csrc/cuda/gelu_ffn.h"

namespace rk::cuda {
namespace {

[[noreturn]] void refuse() {
    throw std::runtime_error("gelu_ffn: the variant sm90 (CUTLASS) is not emulated");
}

}  // namespace

void fused_forward_sm90_bfloat16(const FusedForward&) {
    refuse();
}
void fused_forward_sm90_float16(const FusedForward&) {
    refuse();
}
void fused_backward_sm90_bfloat16(const FusedBackward&) {
    refuse();
}
void fused_backward_sm90_float16(const FusedBackward&) {
    refuse();
}

}  // namespace rk::cuda
