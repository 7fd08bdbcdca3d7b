#pragma once
#include <cstdint>

#include "csrc/cpu/dispatch.h"
#include "csrc/cpu/dropout.h"

namespace rk::cpu {

// [T, heads, head_dim], unit stride in head_dim; strides in elements.
struct HeadsView {
    const void* data;
    int64_t token_stride, head_stride;
};

struct AttentionArgs {
    HeadsView q, k, v;
    const int32_t* cu_seqlens_q;  // [batch + 1]
    const int32_t* cu_seqlens_k;  // [batch + 1]
    const bool* key_mask;         // [Tk], true = may be seen; or null
    const void* bias;             // [heads, bias_rows, bias_columns], added to the scaled scores; or null
    int64_t bias_rows, bias_columns;
    int64_t batch, heads, head_dim, total_q;
    float scale;  // of the scores, before the softmax
    bool causal, bf16;
    Dropout dropout;

    void* out;   // [Tq, heads, head_dim]; forward
    float* lse;  // [heads, Tq]; written by forward, read by backward

    HeadsView grad_out;              // backward
    void *grad_q, *grad_k, *grad_v;  // [T, heads, head_dim]; backward
    void* grad_bias;                 // as bias, where there is one; backward
};

}  // namespace rk::cpu

RK_DECLARE_ENTRY(attention_forward, AttentionArgs)
RK_DECLARE_ENTRY(attention_backward, AttentionArgs)
