#include <device.h>

#include <array>
#include <launch.cuh>
#include <optional>
#include <utility>

#include "csrc/cuda/attention.h"
#include "csrc/cuda/attention_sm90.h"
#include "csrc/cuda/serving.h"
#include "csrc/cuda/variants.h"

namespace rk::cuda {
namespace {

// A tensor as the kernels read it: 16 bytes at a time, so what does not start, or step, by multiples of 16
// bytes is copied.
Tensor aligned(const Tensor& t) {
    const int64_t elements = 16 / static_cast<int64_t>(t.element_size());
    const bool starts = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
    const bool steps = t.stride(2) == 1 && (t.size(0) <= 1 || t.stride(0) % elements == 0) &&
                       (t.size(1) <= 1 || t.stride(1) % elements == 0);
    if ((starts && steps) || t.numel() == 0) return t;
    return t.is_contiguous() ? torch::stable::clone(t) : torch::stable::contiguous(t);
}

HeadsView view(const Tensor& t) {
    return {t.const_data_ptr(), t.stride(0), t.stride(1)};
}

// The arguments that forward and backward share, checked; `owned` keeps what they point at alive.
struct Checked {
    AttentionArgs args{};
    std::array<Tensor, 5> owned;
    std::optional<Tensor> key_mask;
};

void check_heads(const Checks& checks, const Tensor& t, const char* name, int64_t tokens, int64_t heads,
                 int64_t head_dim) {
    checks.same(t, name, checks.scalar_type());
    STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == tokens && t.size(1) == heads && t.size(2) == head_dim,
                    checks.op(), ": ", name, " must have shape [", tokens, ", ", heads, ", ", head_dim, "]");
}

// Selection never hands one to this backend (roberta_kernels/backends/selection.py).
void check_no_bias(const Checks& checks, const std::optional<Tensor>& bias) {
    checks.require(!bias.has_value(), "the CUDA kernels take no bias");
}

Checked check(const Checks& checks, const Tensor& q, const Tensor& k, const Tensor& v,
              const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
              int64_t max_seqlen_k, double scale, bool causal, const std::optional<Tensor>& key_mask,
              double dropout_p, const std::optional<Tensor>& seed) {
    const char* op = checks.op();
    STD_TORCH_CHECK(q.dim() == 3, op, ": q must have shape [Tq, heads, head_dim]");
    STD_TORCH_CHECK(k.dim() == 3, op, ": k must have shape [Tk, heads, head_dim]");
    AttentionArgs a{};
    a.total_q = q.size(0);
    a.total_k = k.size(0);
    a.heads = q.size(1);
    a.head_dim = q.size(2);
    STD_TORCH_CHECK(a.head_dim >= 16 && a.head_dim <= 128 && a.head_dim % 8 == 0, op,
                    ": head_dim must be a multiple of 8 from 16 to 128, got ", a.head_dim);
    check_heads(checks, k, "k", a.total_k, a.heads, a.head_dim);
    check_heads(checks, v, "v", a.total_k, a.heads, a.head_dim);
    const std::pair<const Tensor&, const char*> rows[] = {{q, "q"}, {k, "k"}, {v, "v"}};
    for (const auto& [t, name] : rows)
        STD_TORCH_CHECK(t.stride(2) == 1 || t.size(0) == 0, op, ": ", name,
                        " must have unit stride in head_dim, got ", t.stride(2));
    a.batch = check_cu_seqlens(checks, cu_seqlens_q, "cu_seqlens_q");
    STD_TORCH_CHECK(check_cu_seqlens(checks, cu_seqlens_k, "cu_seqlens_k") == a.batch, op,
                    ": cu_seqlens_k must have ", a.batch + 1, " elements, as cu_seqlens_q, got ",
                    cu_seqlens_k.size(0));
    STD_TORCH_CHECK(max_seqlen_q >= 0 && max_seqlen_k >= 0, op,
                    ": max_seqlen_q and max_seqlen_k must not be negative");
    STD_TORCH_CHECK(a.batch > 0 || (a.total_q == 0 && a.total_k == 0), op,
                    ": there are tokens, and no sequences");
    // No sequence is longer than all tokens together: launches are planned from what can be.
    a.max_seqlen_q = max_seqlen_q < a.total_q ? max_seqlen_q : a.total_q;
    a.max_seqlen_k = max_seqlen_k < a.total_k ? max_seqlen_k : a.total_k;
    a.scale = static_cast<float>(scale);
    a.causal = causal;
    a.dtype = checks.dtype();
    a.dropout = checks.dropout(dropout_p, seed);

    Checked c{a,
              {aligned(q), aligned(k), aligned(v), as_contiguous(cu_seqlens_q), as_contiguous(cu_seqlens_k)},
              std::nullopt};
    c.args.q = view(c.owned[0]);
    c.args.k = view(c.owned[1]);
    c.args.v = view(c.owned[2]);
    c.args.cu_seqlens_q = static_cast<const int32_t*>(c.owned[3].const_data_ptr());
    c.args.cu_seqlens_k = static_cast<const int32_t*>(c.owned[4].const_data_ptr());
    if (key_mask.has_value()) {
        checks.vector(*key_mask, "key_mask", a.total_k, ScalarType::Bool);
        c.key_mask = as_contiguous(*key_mask);
        c.args.key_mask = static_cast<const bool*>(c.key_mask->const_data_ptr());
    }
    return c;
}

}  // namespace

void serve_attention_forward(const AttentionArgs& a) {
#ifdef ROBERTA_KERNELS_SM90A
    if (attention_variant() == AttentionVariant::sm90 && current_device().arch == 90 &&
        attention_sm90_supports(a)) {
        attention_sm90_forward(a);
        note_served(AttentionVariant::sm90, Direction::forward);
        return;
    }
#endif
    attention_forward(a);
    note_served(AttentionVariant::portable, Direction::forward);
}

namespace {

void run_backward(const AttentionArgs& a) {
#ifdef ROBERTA_KERNELS_SM90A
    if (attention_variant() == AttentionVariant::sm90 && current_device().arch == 90 &&
        attention_sm90_supports_backward(a)) {
        attention_sm90_backward(a);
        note_served(AttentionVariant::sm90, Direction::backward);
        return;
    }
#endif
    attention_backward(a);
    note_served(AttentionVariant::portable, Direction::backward);
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                   int64_t max_seqlen_q, int64_t max_seqlen_k, double scale, bool causal,
                                   const std::optional<Tensor>& key_mask, double dropout_p,
                                   const std::optional<Tensor>& seed, const std::optional<Tensor>& bias) {
    const Checks checks("attention", q, "q");
    check_no_bias(checks, bias);
    const OnDeviceOf device(q);
    Checked c = check(checks, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal,
                      key_mask, dropout_p, seed);
    AttentionArgs& a = c.args;
    a.stream = device.stream();
    Tensor out = checks.empty({a.total_q, a.heads, a.head_dim});
    Tensor lse = checks.empty({a.heads, a.total_q}, ScalarType::Float);
    a.out = out.mutable_data_ptr();
    a.lse = static_cast<float*>(lse.mutable_data_ptr());
    serve_attention_forward(a);
    return {std::move(out), std::move(lse)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                                    const Tensor& v, const Tensor& out, const Tensor& lse,
                                                    const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                                    int64_t max_seqlen_q, int64_t max_seqlen_k, double scale,
                                                    bool causal, const std::optional<Tensor>& key_mask,
                                                    double dropout_p, const std::optional<Tensor>& seed,
                                                    const std::optional<Tensor>& bias) {
    const Checks checks("attention_backward", q, "q");
    check_no_bias(checks, bias);
    const OnDeviceOf device(q);
    Checked c = check(checks, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal,
                      key_mask, dropout_p, seed);
    AttentionArgs& a = c.args;
    a.stream = device.stream();
    check_heads(checks, grad_out, "grad_out", a.total_q, a.heads, a.head_dim);
    check_heads(checks, out, "out", a.total_q, a.heads, a.head_dim);
    checks.same(lse, "lse", ScalarType::Float);
    STD_TORCH_CHECK(lse.dim() == 2 && lse.size(0) == a.heads && lse.size(1) == a.total_q, checks.op(),
                    ": lse must have shape [", a.heads, ", ", a.total_q, "]");
    const Tensor grad = aligned(grad_out);  // autograd may hand over any strides (an expanded scalar, say)
    const Tensor saved_out = aligned(as_contiguous(out)), saved_lse = as_contiguous(lse);
    a.grad_out = view(grad);
    a.out = saved_out.data_ptr();
    a.lse = static_cast<float*>(saved_lse.data_ptr());
    const Tensor statistics = checks.empty({a.heads, a.total_q, 2}, ScalarType::Float);
    a.statistics = static_cast<float2*>(statistics.data_ptr());
    Tensor grad_q = checks.empty({a.total_q, a.heads, a.head_dim});
    Tensor grad_k = checks.empty({a.total_k, a.heads, a.head_dim});
    Tensor grad_v = checks.empty({a.total_k, a.heads, a.head_dim});
    a.grad_q = grad_q.mutable_data_ptr();
    a.grad_k = grad_k.mutable_data_ptr();
    a.grad_v = grad_v.mutable_data_ptr();
    run_backward(a);
    return {std::move(grad_q), std::move(grad_k), std::move(grad_v), checks.empty({0})};
}

}  // namespace
}  // namespace rk::cuda

STABLE_TORCH_LIBRARY_IMPL(roberta_kernels_cuda, RK_DISPATCH_KEY, m) {
    m.impl("attention_forward", TORCH_BOX(&rk::cuda::forward));
    m.impl("attention_backward", TORCH_BOX(&rk::cuda::backward));
}
