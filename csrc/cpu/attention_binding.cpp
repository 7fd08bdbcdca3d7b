#include <vector>

#include "csrc/cpu/attention.h"
#include "csrc/cpu/tensor_checks.h"

namespace rk::cpu {
namespace {

HeadsView heads_view(const Checks& checks, const Tensor& t, const char* name, int64_t tokens, int64_t heads,
                     int64_t head_dim) {
    const char* op = checks.op();
    checks.same(t, name, checks.scalar_type());
    STD_TORCH_CHECK(t.dim() == 3, op, ": ", name, " must have shape [T, heads, head_dim]");
    const auto sizes = t.sizes();
    STD_TORCH_CHECK(sizes[0] == tokens && sizes[1] == heads && sizes[2] == head_dim, op, ": ", name,
                    " must have shape [", tokens, ", ", heads, ", ", head_dim, "], not [", sizes[0], ", ",
                    sizes[1], ", ", sizes[2], "]");
    const auto strides = t.strides();
    STD_TORCH_CHECK(strides[2] == 1 || tokens == 0, op, ": ", name,
                    " must have unit stride in head_dim, got ", strides[2]);
    return {t.const_data_ptr(), strides[0], strides[1]};
}

// The arguments that forward and backward share, checked; `owned` keeps contiguous copies alive.
struct Checked {
    Checks checks;
    AttentionArgs args;
    Tensor cu_seqlens_q, cu_seqlens_k;
    std::optional<Tensor> key_mask, bias;
    int64_t total_k;
};

Checked check(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
              const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, double scale,
              bool causal, const std::optional<Tensor>& key_mask, double dropout_p,
              const std::optional<Tensor>& seed, const std::optional<Tensor>& bias) {
    const Checks checks(op, q, "q");
    AttentionArgs a{};
    a.bf16 = checks.bf16();
    STD_TORCH_CHECK(q.dim() == 3, op, ": q must have shape [Tq, heads, head_dim]");
    STD_TORCH_CHECK(k.dim() == 3, op, ": k must have shape [Tk, heads, head_dim]");
    a.total_q = q.size(0);
    a.heads = q.size(1);
    a.head_dim = q.size(2);
    STD_TORCH_CHECK(a.head_dim >= 16 && a.head_dim <= 128 && a.head_dim % 8 == 0, op,
                    ": head_dim must be a multiple of 8 from 16 to 128, got ", a.head_dim);
    const int64_t total_k = k.size(0);
    a.q = heads_view(checks, q, "q", a.total_q, a.heads, a.head_dim);
    a.k = heads_view(checks, k, "k", total_k, a.heads, a.head_dim);
    a.v = heads_view(checks, v, "v", total_k, a.heads, a.head_dim);
    Tensor cu_q =
        check_cu_seqlens(checks, cu_seqlens_q, "cu_seqlens_q", a.total_q, max_seqlen_q, "max_seqlen_q");
    Tensor cu_k =
        check_cu_seqlens(checks, cu_seqlens_k, "cu_seqlens_k", total_k, max_seqlen_k, "max_seqlen_k");
    a.batch = cu_q.size(0) - 1;
    STD_TORCH_CHECK(cu_k.size(0) - 1 == a.batch, op, ": cu_seqlens_k must have ", a.batch + 1,
                    " elements, as cu_seqlens_q, got ", cu_k.size(0));
    a.cu_seqlens_q = static_cast<const int32_t*>(cu_q.const_data_ptr());
    a.cu_seqlens_k = static_cast<const int32_t*>(cu_k.const_data_ptr());
    std::optional<Tensor> mask;
    if (key_mask.has_value()) {
        checks.vector(*key_mask, "key_mask", total_k, ScalarType::Bool);
        mask = as_contiguous(*key_mask);
        a.key_mask = static_cast<const bool*>(mask->const_data_ptr());
    }
    a.scale = static_cast<float>(scale);
    a.causal = causal;
    a.dropout = checks.dropout(dropout_p, seed);
    const std::optional<Tensor> own = check_bias(checks, bias, a.heads, max_seqlen_q, max_seqlen_k);
    if (own) a.bias = own->const_data_ptr(), a.bias_rows = own->size(1), a.bias_columns = own->size(2);
    return {checks, a, std::move(cu_q), std::move(cu_k), std::move(mask), own, total_k};
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                   int64_t max_seqlen_q, int64_t max_seqlen_k, double scale, bool causal,
                                   const std::optional<Tensor>& key_mask, double dropout_p,
                                   const std::optional<Tensor>& seed, const std::optional<Tensor>& bias) {
    Checked c = check("attention", q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale,
                      causal, key_mask, dropout_p, seed, bias);
    AttentionArgs& a = c.args;
    Tensor out = c.checks.empty({a.total_q, a.heads, a.head_dim});
    Tensor lse = c.checks.empty({a.heads, a.total_q}, ScalarType::Float);
    a.out = out.mutable_data_ptr();
    a.lse = static_cast<float*>(lse.mutable_data_ptr());
    RK_DISPATCH(attention_forward, a);
    return {std::move(out), std::move(lse)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                                    const Tensor& v, const Tensor& /*out*/, const Tensor& lse,
                                                    const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                                    int64_t max_seqlen_q, int64_t max_seqlen_k, double scale,
                                                    bool causal, const std::optional<Tensor>& key_mask,
                                                    double dropout_p, const std::optional<Tensor>& seed,
                                                    const std::optional<Tensor>& bias) {
    const char* op = "attention_backward";
    Checked c = check(op, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal,
                      key_mask, dropout_p, seed, bias);
    AttentionArgs& a = c.args;
    // autograd may hand over any strides (an expanded scalar, say)
    Tensor g =
        grad_out.dim() == 3 && grad_out.stride(2) == 1 ? grad_out : torch::stable::contiguous(grad_out);
    a.grad_out = heads_view(c.checks, g, "grad_out", a.total_q, a.heads, a.head_dim);
    c.checks.matrix(lse, "lse", a.heads, a.total_q, ScalarType::Float);
    Tensor saved_lse = as_contiguous(lse);
    a.lse = static_cast<float*>(saved_lse.data_ptr());
    Tensor grad_q = c.checks.empty({a.total_q, a.heads, a.head_dim});
    Tensor grad_k = c.checks.empty({c.total_k, a.heads, a.head_dim});
    Tensor grad_v = c.checks.empty({c.total_k, a.heads, a.head_dim});
    a.grad_q = grad_q.mutable_data_ptr();
    a.grad_k = grad_k.mutable_data_ptr();
    a.grad_v = grad_v.mutable_data_ptr();
    Tensor grad_bias = c.bias ? c.checks.empty({a.heads, a.bias_rows, a.bias_columns}) : c.checks.empty({0});
    a.grad_bias = grad_bias.mutable_data_ptr();
    RK_DISPATCH(attention_backward, a);
    return {std::move(grad_q), std::move(grad_k), std::move(grad_v), std::move(grad_bias)};
}

// [batch, heads, tokens, head_dim]
HeadsView cached_view(const Checks& checks, const Tensor& t, const char* name, int64_t batch, int64_t heads,
                      int64_t tokens, int64_t head_dim) {
    checks.same(t, name, checks.scalar_type());
    STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == batch && t.size(1) == heads && t.size(2) == tokens &&
                        t.size(3) == head_dim,
                    checks.op(), ": ", name, " must have shape [", batch, ", ", heads, ", ", tokens, ", ",
                    head_dim, "]");
    STD_TORCH_CHECK(t.stride(3) == 1 || t.numel() == 0, checks.op(), ": ", name,
                    " must have unit stride in head_dim, got ", t.stride(3));
    return {t.const_data_ptr(), t.stride(2), t.stride(1), t.stride(0)};
}

// `batch` sequences of `length` each.
std::vector<int32_t> equal_lengths(int64_t batch, int64_t length) {
    std::vector<int32_t> ends(static_cast<size_t>(batch + 1));
    for (int64_t b = 0; b <= batch; ++b) ends[static_cast<size_t>(b)] = static_cast<int32_t>(b * length);
    return ends;
}

Tensor cached(const Tensor& query, const Tensor& key, const Tensor& value,
              const std::optional<Tensor>& key_mask, double scale, bool causal) {
    const Checks checks("cached_attention", query, "query");
    checks.require(query.dim() == 4, "query must have shape [B, heads, Q, head_dim]");
    checks.require(key.dim() == 4, "key must have shape [B, heads, K, head_dim]");
    const int64_t batch = query.size(0), queries = query.size(2), keys = key.size(2);
    AttentionArgs a{};
    a.batch = batch, a.heads = query.size(1), a.head_dim = query.size(3), a.total_q = batch * queries;
    STD_TORCH_CHECK(queries <= kMostCachedQueries, checks.op(), ": query must have at most ",
                    kMostCachedQueries, " rows in each sequence, got ", queries);
    STD_TORCH_CHECK(a.head_dim >= 16 && a.head_dim <= 128 && a.head_dim % 8 == 0, checks.op(),
                    ": head_dim must be a multiple of 8 from 16 to 128, got ", a.head_dim);
    checks.require(batch * keys <= INT32_MAX && batch * queries <= INT32_MAX, "too many rows");
    a.q = cached_view(checks, query, "query", batch, a.heads, queries, a.head_dim);
    a.k = cached_view(checks, key, "key", batch, a.heads, keys, a.head_dim);
    a.v = cached_view(checks, value, "value", batch, a.heads, keys, a.head_dim);
    const std::vector<int32_t> ends_q = equal_lengths(batch, queries), ends_k = equal_lengths(batch, keys);
    a.cu_seqlens_q = ends_q.data(), a.cu_seqlens_k = ends_k.data();
    Tensor mask = query;
    if (key_mask) {
        checks.matrix(*key_mask, "key_mask", batch, keys, ScalarType::Bool);
        mask = as_contiguous(*key_mask);
        a.key_mask = static_cast<const bool*>(mask.const_data_ptr());
    }
    a.scale = static_cast<float>(scale);
    a.causal = causal, a.bf16 = checks.bf16();
    Tensor out = checks.empty({batch, queries, a.heads, a.head_dim});
    a.out = out.mutable_data_ptr();
    if (a.total_q > 0 && a.heads > 0) RK_DISPATCH(cached_attention, a);
    return out;
}

}  // namespace
}  // namespace rk::cpu

STABLE_TORCH_LIBRARY_IMPL(roberta_kernels_cpu, CPU, m) {
    m.impl("attention_forward", TORCH_BOX(&rk::cpu::forward));
    m.impl("attention_backward", TORCH_BOX(&rk::cpu::backward));
    m.impl("cached_attention", TORCH_BOX(&rk::cpu::cached));
}
