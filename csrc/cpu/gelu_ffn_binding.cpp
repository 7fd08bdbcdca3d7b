// Registers gelu_ffn for CPU tensors: checks what the kernels rely on, allocates, hands over plain pointers.
#include "csrc/cpu/gelu_ffn.h"
#include "csrc/cpu/tensor_checks.h"

namespace rk::cpu {
namespace {

void check(const Tensor& t, const char* name, const Tensor& like, int64_t rows, int64_t columns) {
    STD_TORCH_CHECK(t.is_cpu(), "gelu_ffn: ", name, " must be on the CPU");
    STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), "gelu_ffn: ", name, " must have the dtype of x");
    if (columns < 0) {
        STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == rows, "gelu_ffn: ", name, " must have shape [", rows,
                        "]");
    } else {
        STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, "gelu_ffn: ", name,
                        " must have shape [", rows, ", ", columns, "]");
    }
}

void check_matrix(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2, "gelu_ffn: ", name, " must be a matrix on the CPU");
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16,
                    "gelu_ffn: ", name, " must be float32 or bfloat16");
}

std::tuple<Tensor, Tensor> forward(const Tensor& x_, const Tensor& w_in_, const Tensor& b_in_,
                                   const Tensor& w_out_, const std::optional<Tensor>& b_out_, bool tanh,
                                   bool save_preactivation) {
    check_matrix(x_, "x");
    check_matrix(w_in_, "w_in");
    check_matrix(w_out_, "w_out");
    const int64_t tokens = x_.size(0), hidden = x_.size(1), inner = w_in_.size(0), outer = w_out_.size(0);
    check(w_in_, "w_in", x_, inner, hidden);
    check(b_in_, "b_in", x_, inner, -1);
    check(w_out_, "w_out", x_, outer, inner);
    if (b_out_) check(*b_out_, "b_out", x_, outer, -1);

    const Tensor x = as_contiguous(x_), w_in = as_contiguous(w_in_), b_in = as_contiguous(b_in_),
                 w_out = as_contiguous(w_out_);
    const Tensor b_out = b_out_ ? as_contiguous(*b_out_) : b_in;
    Tensor out = torch::stable::new_empty(x, {tokens, outer});
    Tensor preactivation =
        save_preactivation ? torch::stable::new_empty(x, {tokens, inner}) : torch::stable::new_empty(x, {0});

    GeluFfnForward args{};
    args.tokens = tokens, args.hidden = hidden, args.inner = inner, args.outer = outer;
    args.bfloat16 = x.scalar_type() == ScalarType::BFloat16;
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
    check_matrix(x_, "x");
    check_matrix(w_in_, "w_in");
    check_matrix(w_out_, "w_out");
    const int64_t tokens = x_.size(0), hidden = x_.size(1), inner = w_in_.size(0), outer = w_out_.size(0);
    check(grad_out_, "grad_out", x_, tokens, outer);
    check(w_in_, "w_in", x_, inner, hidden);
    check(w_out_, "w_out", x_, outer, inner);
    check(preactivation_, "preactivation", x_, tokens, inner);

    const Tensor grad_out = as_contiguous(grad_out_), x = as_contiguous(x_), w_in = as_contiguous(w_in_);
    const Tensor w_out = as_contiguous(w_out_), preactivation = as_contiguous(preactivation_);
    Tensor activation = torch::stable::new_empty(x, {tokens, inner});
    Tensor grad_preactivation = torch::stable::new_empty(x, {tokens, inner});
    Tensor grad_x = torch::stable::new_empty(x, {tokens, hidden});
    Tensor grad_w_in = torch::stable::new_empty(x, {inner, hidden});
    Tensor grad_b_in = torch::stable::new_empty(x, {inner});
    Tensor grad_w_out = torch::stable::new_empty(x, {outer, inner});
    Tensor grad_b_out = torch::stable::new_empty(x, {outer});

    GeluFfnBackward args{};
    args.tokens = tokens, args.hidden = hidden, args.inner = inner, args.outer = outer;
    args.bfloat16 = x.scalar_type() == ScalarType::BFloat16;
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
