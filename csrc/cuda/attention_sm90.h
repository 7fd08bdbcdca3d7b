// Attention on Hopper (sm_90a), by wgmma and bulk tensor copies: for what it supports, the same as
// attention_forward. Plain C++.
#pragma once
#include "csrc/cuda/attention.h"

namespace rk::cuda {

// Whether the forward below serves such a call: bfloat16 and float16, head_dim 32, 64 or 128, heads that lie
// within their token's row. Lengths, masks, causality, dropout: all. Does not look at which device it is.
bool attention_sm90_supports(const AttentionArgs& args);

void attention_sm90_forward(const AttentionArgs& args);

// Likewise for the gradients: head_dim 32 or 64, and grad_out like the others.
bool attention_sm90_supports_backward(const AttentionArgs& args);
void attention_sm90_backward(const AttentionArgs& args);

}  // namespace rk::cuda
