// Registers gelu_ffn for CPU tensors: checks what the kernels rely on, allocates, hands over plain pointers.
#include "csrc/cpu/gelu_ffn.h"
#include "csrc/cpu/tensor_checks.h"

namespace rk::cpu {
namespace {

// The checks of the sizes that both directions share.
Checks check(const char* op, const Tensor& x, const Tensor& w_in, const Tensor& w_out) {
    const Checks checks(op, x, "x");
    checks.require(x.dim() == 2, "x must have shape [T, H]");
    checks.require(w_in.dim() == 2, "w_in must have shape [F, H]");
    checks.require(w_out.dim() == 2, "w_out must have shape [O, F]");
    checks.matrix(w_in, "w_in", w_in.size(0), x.size(1));
    checks.matrix(w_out, "w_out", w_out.size(0), w_in.size(0));
    return checks;
}

std::tuple<Tensor, Tensor> forward(const Tensor& x_, const Tensor& w_in_, const Tensor& b_in_,
                                   const Tensor& w_out_, const std::optional<Tensor>& b_out_, bool tanh,
                                   bool save_preactivation) {
    const Checks checks = check("gelu_ffn", x_, w_in_, w_out_);
    const int64_t tokens = x_.size(0), hidden = x_.size(1), inner = w_in_.size(0), outer = w_out_.size(0);
    checks.vector(b_in_, "b_in", inner);
    if (b_out_) checks.vector(*b_out_, "b_out", outer);

    const Tensor x = as_contiguous(x_), w_in = as_contiguous(w_in_), b_in = as_contiguous(b_in_),
                 w_out = as_contiguous(w_out_);
    const Tensor b_out = b_out_ ? as_contiguous(*b_out_) : b_in;
    Tensor out = checks.empty({tokens, outer});
    Tensor preactivation = save_preactivation ? checks.empty({tokens, inner}) : checks.empty({0});

    GeluFfnForwardArgs args{};
    args.tokens = tokens, args.hidden = hidden, args.inner = inner, args.outer = outer;
    args.bf16 = checks.bf16();
    args.tanh = tanh;
    args.x = x.const_data_ptr();
    args.w_in = w_in.const_data_ptr();
    args.b_in = b_in.const_data_ptr();
    args.w_out = w_out.const_data_ptr();
    args.b_out = b_out_ ? b_out.const_data_ptr() : nullptr;
    args.out = out.mutable_data_ptr();
    args.preactivation = save_preactivation ? preactivation.mutable_data_ptr() : nullptr;
    if (tokens > 0 && (inner > 0 || outer > 0)) RK_DISPATCH(gelu_ffn_forward, args);
    return {out, preactivation};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_out_, const Tensor& x_,
                                                            const Tensor& w_in_, const Tensor& w_out_,
                                                            const Tensor& preactivation_, bool tanh) {
    const Checks checks = check("gelu_ffn_backward", x_, w_in_, w_out_);
    const int64_t tokens = x_.size(0), hidden = x_.size(1), inner = w_in_.size(0), outer = w_out_.size(0);
    checks.matrix(grad_out_, "grad_out", tokens, outer);
    checks.matrix(preactivation_, "preactivation", tokens, inner);

    const Tensor grad_out = as_contiguous(grad_out_), x = as_contiguous(x_), w_in = as_contiguous(w_in_);
    const Tensor w_out = as_contiguous(w_out_), preactivation = as_contiguous(preactivation_);
    Tensor activation = checks.empty({tokens, inner});
    Tensor grad_preactivation = checks.empty({tokens, inner});
    Tensor grad_x = checks.empty({tokens, hidden});
    Tensor grad_w_in = checks.empty({inner, hidden});
    Tensor grad_b_in = checks.empty({inner});
    Tensor grad_w_out = checks.empty({outer, inner});
    Tensor grad_b_out = checks.empty({outer});

    GeluFfnBackwardArgs args{};
    args.tokens = tokens, args.hidden = hidden, args.inner = inner, args.outer = outer;
    args.bf16 = checks.bf16();
    args.tanh = tanh;
    args.grad_out = grad_out.const_data_ptr();
    args.x = x.const_data_ptr();
    args.w_in = w_in.const_data_ptr();
    args.w_out = w_out.const_data_ptr();
    args.preactivation = preactivation.const_data_ptr();
    args.activation = activation.mutable_data_ptr();
    args.grad_preactivation = grad_preactivation.mutable_data_ptr();
    args.grad_x = grad_x.mutable_data_ptr();
    args.grad_w_in = grad_w_in.mutable_data_ptr();
    args.grad_b_in = grad_b_in.mutable_data_ptr();
    args.grad_w_out = grad_w_out.mutable_data_ptr();
    args.grad_b_out = grad_b_out.mutable_data_ptr();
    RK_DISPATCH(gelu_ffn_backward, args);
    return {grad_x, grad_w_in, grad_b_in, grad_w_out, grad_b_out};
}

}  // namespace
}  // namespace rk::cpu

STABLE_TORCH_LIBRARY_IMPL(roberta_kernels_cpu, CPU, m) {
    m.impl("gelu_ffn_forward", TORCH_BOX(&rk::cpu::forward));
    m.impl("gelu_ffn_backward", TORCH_BOX(&rk::cpu::backward));
}
