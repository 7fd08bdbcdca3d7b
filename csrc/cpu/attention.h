#pragma once
#include <cstdint>

#include "csrc/cpu/dispatch.h"
#include "csrc/cpu/dropout.h"

namespace rk::cpu {

// [T, heads, head_dim], unit stride in head_dim; strides in elements. sequence_stride: of cached_attention, from a
// sequence's first token to the next one's; negative: sequences are where cu_seqlens says.
struct HeadsView {
    const void* data;
    int64_t token_stride, head_stride, sequence_stride = -1;
};

constexpr int64_t kMostCachedQueries = 8;

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
    float* lse;  // [heads, Tq]; written by forward, read by backward; of cached_attention null

    HeadsView grad_out;              // backward
    void *grad_q, *grad_k, *grad_v;  // [T, heads, head_dim]; backward
    void* grad_bias;                 // as bias, where there is one; backward
};

}  // namespace rk::cpu

RK_DECLARE_ENTRY(attention_forward, AttentionArgs)
// Forward of up to kMostCachedQueries queries in each sequence (few_queries.h), without bias and dropout.
RK_DECLARE_ENTRY(cached_attention, AttentionArgs)
RK_DECLARE_ENTRY(attention_backward, AttentionArgs)
