// add_layer_norm as its kernels see it: filled in by add_layer_norm_binding.cpp. Plain C++.
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

#include "csrc/cuda/dropout.h"
#include "csrc/cuda/dtype.h"

namespace rk::cuda {

// All contiguous, at addresses that are multiples of 16 bytes.
struct AddLayerNormArgs {
    const void* x;         // [rows, hidden]
    const void* residual;  // [rows, hidden]
    const void* weight;    // [hidden]
    const void* bias;      // [hidden]; forward
    const void* x_bias;    // [hidden] or null
    int64_t rows, hidden;
    float eps;
    Dtype dtype;
    Dropout dropout;
    cudaStream_t stream;

    void* out;    // [rows, hidden]; forward
    float* mean;  // [rows]; written by forward, read by backward
    float* rstd;  // [rows]

    const void* grad_out;  // [rows, hidden]; backward
    void* grad_x;          // [rows, hidden], or null without dropout, when it is grad_residual
    void* grad_residual;   // [rows, hidden]
    void* grad_weight;     // [hidden]
    void* grad_bias;       // [hidden]
    void* grad_x_bias;     // [hidden] or null
    float* partials;       // scratch of backward, add_layer_norm_partials(args) floats
};

void add_layer_norm_forward(const AddLayerNormArgs& args);
void add_layer_norm_backward(const AddLayerNormArgs& args);
int64_t add_layer_norm_partials(const AddLayerNormArgs& args);

}  // namespace rk::cuda
