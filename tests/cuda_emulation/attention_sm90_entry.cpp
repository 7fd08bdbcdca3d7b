// The Hopper attention kernels by a plain C call, for test_attention_sm90.py.
#include <cstdio>
#include <exception>

#include "csrc/cuda/attention_sm90.h"

using namespace rk::cuda;

// views: address, token stride and head stride of q, k, v and, for backward, grad_out. out and lse: written
// by forward, read by backward. gradients: addresses of those of q, k and v, and of statistics; null:
// forward. Returns 0; 1: not supported; 2: `message` (room for 512) says why.
extern "C" __attribute__((visibility("default"))) int rk_attention_sm90(
    const int64_t* views, const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k, const bool* key_mask,
    const int64_t* sizes, double scale, int causal, int bfloat16, double dropout_p, const int64_t* seed,
    void* out, float* lse, void* const* gradients, char* message) {
    AttentionArgs a{};
    HeadsView* const to[] = {&a.q, &a.k, &a.v, &a.grad_out};
    for (int i = 0; i < (gradients != nullptr ? 4 : 3); ++i)
        *to[i] = {reinterpret_cast<const void*>(views[3 * i]), views[3 * i + 1], views[3 * i + 2]};
    a.cu_seqlens_q = cu_seqlens_q;
    a.cu_seqlens_k = cu_seqlens_k;
    a.key_mask = key_mask;
    a.batch = sizes[0];
    a.heads = sizes[1];
    a.head_dim = sizes[2];
    a.total_q = sizes[3];
    a.total_k = sizes[4];
    a.max_seqlen_q = sizes[5];
    a.max_seqlen_k = sizes[6];
    a.scale = static_cast<float>(scale);
    a.causal = causal != 0;
    a.dtype = bfloat16 != 0 ? Dtype::bfloat16 : Dtype::float16;
    if (dropout_p > 0.0) a.dropout = Dropout(dropout_p, seed);
    a.out = out;
    a.lse = lse;
    if (gradients != nullptr) {
        a.grad_q = gradients[0];
        a.grad_k = gradients[1];
        a.grad_v = gradients[2];
        a.statistics = static_cast<float2*>(gradients[3]);
    }
    try {
        if (gradients != nullptr) {
            if (!attention_sm90_supports_backward(a)) return 1;
            attention_sm90_backward(a);
        } else {
            if (!attention_sm90_supports(a)) return 1;
            attention_sm90_forward(a);
        }
    } catch (const std::exception& error) {
        std::snprintf(message, 512, "%s", error.what());
        return 2;
    }
    return 0;
}
