// Attention on tiles with a C entry point, for test_tile_attention.py: compiled with RK_AMX_TWIN for any x86-64 machine,
// and without it for one that has AMX. Threads are the library's own.
#include "csrc/cpu/attention.cpp"

extern "C" {

// sizes: sequences, heads, head_dim, rows of q; strides: of tokens and heads, of q, k and v; tensors: q, k, v,
// cu_seqlens_q, cu_seqlens_k, key_mask (or null), out, lse
static rk::cpu::AttentionArgs arguments(bool is_bf16, bool causal, float scale, const int64_t* sizes,
                                        const int64_t* strides, void* const* tensors) {
    rk::cpu::AttentionArgs a{};
    rk::cpu::HeadsView* const views[] = {&a.q, &a.k, &a.v};
    for (int i = 0; i < 3; ++i) *views[i] = {tensors[i], strides[2 * i], strides[2 * i + 1]};
    a.cu_seqlens_q = static_cast<const int32_t*>(tensors[3]);
    a.cu_seqlens_k = static_cast<const int32_t*>(tensors[4]);
    a.key_mask = static_cast<const bool*>(tensors[5]);
    a.batch = sizes[0], a.heads = sizes[1], a.head_dim = sizes[2], a.total_q = sizes[3];
    a.scale = scale, a.causal = causal, a.bf16 = is_bf16;
    a.out = tensors[6], a.lse = static_cast<float*>(tensors[7]);
    return a;
}

void tile_attention(bool is_bf16, bool causal, float scale, const int64_t* sizes, const int64_t* strides,
                    void* const* tensors) {
    rk::cpu::amx::attention_forward(arguments(is_bf16, causal, scale, sizes, strides, tensors));
}

// strides: of grad_out, too; tensors: instead of out grad_out; then grad_q, grad_k, grad_v; dropout_p: 0 or more
void tile_attention_backward(bool is_bf16, bool causal, float scale, double dropout_p, int64_t seed,
                             const int64_t* sizes, const int64_t* strides, void* const* tensors) {
    rk::cpu::AttentionArgs a = arguments(is_bf16, causal, scale, sizes, strides, tensors);
    if (dropout_p > 0) a.dropout = rk::cpu::Dropout(dropout_p, seed);
    a.grad_out = {tensors[6], strides[6], strides[7]};
    a.grad_q = tensors[8], a.grad_k = tensors[9], a.grad_v = tensors[10];
    rk::cpu::amx::attention_backward(a);
}

}  // extern "C"
