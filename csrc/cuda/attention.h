// Attention as its kernels see it: filled in by attention_binding.cpp. Plain C++.
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

#include "csrc/cuda/dropout.h"
#include "csrc/cuda/dtype.h"

namespace rk::cuda {

// [T, heads, head_dim], unit stride in head_dim; strides in elements. The binding sees to it that the address
// and the strides are multiples of 16 bytes (it copies what is not), so kernels may move 16 bytes at a time.
struct HeadsView {
    const void* data;
    int64_t token_stride, head_stride;
};

struct AttentionArgs {
    HeadsView q, k, v;
    const int32_t* cu_seqlens_q;  // [batch + 1], in device memory: the host never reads it
    const int32_t* cu_seqlens_k;  // [batch + 1], likewise
    const bool* key_mask;         // [Tk], true = may be seen; or null
    int64_t batch, heads, head_dim, total_q, total_k, max_seqlen_q, max_seqlen_k;
    float scale;  // of the scores, before the softmax
    bool causal;
    Dtype dtype;
    Dropout dropout;
    cudaStream_t stream;

    void* out;   // [Tq, heads, head_dim], contiguous; written by forward, read by backward
    float* lse;  // [heads, Tq], natural logarithm, -inf for a row that sees no key; likewise

    HeadsView grad_out;  // backward
    float2* statistics;  // [heads, Tq] scratch of backward: (lse in base 2, row sum of grad_out * out)
    void *grad_q, *grad_k, *grad_v;  // [T, heads, head_dim], contiguous; backward
};

// Any head_dim that is a multiple of 8 from 16 to 128, any dtype, sm_80 and later.
void attention_forward(const AttentionArgs& args);
void attention_backward(const AttentionArgs& args);

}  // namespace rk::cuda
