#pragma once
#include <cstdint>

#include "csrc/cpu/dispatch.h"
#include "csrc/cpu/dropout.h"

namespace rk::cpu {

struct AddLayerNormArgs {
    const void* x;         // [rows, hidden]
    const void* residual;  // [rows, hidden]
    const void* weight;    // [hidden]
    const void* bias;      // [hidden]; forward
    const void* x_bias;    // [hidden] or null
    int64_t rows, hidden;
    float eps;
    bool bf16;
    Dropout dropout;

    void* out;    // [rows, hidden]; forward
    float* mean;  // [rows]; written by forward, read by backward
    float* rstd;  // [rows]

    const void* grad_out;  // [rows, hidden]; backward
    void* grad_x;          // [rows, hidden], or null without dropout, when it is grad_residual
    void* grad_residual;   // [rows, hidden]
    void* grad_weight;     // [hidden]
    void* grad_bias;       // [hidden]
    void* grad_x_bias;     // [hidden] or null
};

}  // namespace rk::cpu

RK_DECLARE_ENTRY(add_layer_norm_forward, AddLayerNormArgs)
RK_DECLARE_ENTRY(add_layer_norm_backward, AddLayerNormArgs)
