// Arguments of the gelu_ffn kernels. All tensors are contiguous and of one dtype. T: tokens, H: hidden size,
// F: feed-forward size, O: output size.
#pragma once
#include "csrc/cpu/dispatch.h"

namespace rk::cpu {

struct GeluFfnForwardArgs {
    int64_t tokens, hidden, inner, outer;  // T, H, F, O
    bool bf16, tanh;
    const void* x;        // [T, H]
    const void* w_in;     // [F, H]
    const void* b_in;     // [F]
    const void* w_out;    // [O, F]
    const void* b_out;    // [O], or null
    void* out;            // [T, O]
    void* preactivation;  // [T, F], or null
};

struct GeluFfnBackwardArgs {
    int64_t tokens, hidden, inner, outer;
    bool bf16, tanh;
    const void* grad_out;       // [T, O]
    const void* x;              // [T, H]
    const void* w_in;           // [F, H]
    const void* w_out;          // [O, F]
    const void* preactivation;  // [T, F]
    void* activation;           // [T, F], scratch: gelu(preactivation)
    void* grad_preactivation;   // [T, F], scratch
    void* grad_x;               // [T, H]
    void* grad_w_in;            // [F, H]
    void* grad_b_in;            // [F]
    void* grad_w_out;           // [O, F]
    void* grad_b_out;           // [O]
};

}  // namespace rk::cpu

RK_DECLARE_ENTRY(gelu_ffn_forward, GeluFfnForwardArgs)
RK_DECLARE_ENTRY(gelu_ffn_backward, GeluFfnBackwardArgs)
