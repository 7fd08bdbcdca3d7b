// Registers linear_log1p_max for CPU tensors: checks what the kernels rely on, allocates, hands over plain pointers.
#include "csrc/cpu/linear_log1p_max.h"
#include "csrc/cpu/tensor_checks.h"

namespace rk::cpu {
namespace {

int64_t between(int64_t low, int64_t value, int64_t high) {
    return value < low ? low : value > high ? high : value;
}

// Checked inputs; contiguous copies, where they were needed, live here.
struct Inputs {
    Checks checks;
    LinearLog1pMaxArgs args;
    Tensor x, weight, bias;
};

Inputs check(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
    const Checks checks(op, x, "x");
    checks.require(x.dim() == 2, "x must have shape [T, H]");
    checks.require(weight.dim() == 2 && weight.size(0) > 0, "weight must have shape [V, H]");
    LinearLog1pMaxArgs a{};
    a.rows = x.size(0), a.hidden = x.size(1), a.words = weight.size(0);
    checks.matrix(weight, "weight", a.words, a.hidden);
    if (bias) checks.vector(*bias, "bias", a.words);
    const Tensor weight_here = as_contiguous(weight);
    Inputs in{checks, a, as_contiguous(x), weight_here, bias ? as_contiguous(*bias) : weight_here};
    in.args.bf16 = checks.bf16();
    in.args.x = in.x.const_data_ptr();
    in.args.weight = in.weight.const_data_ptr();
    in.args.bias = bias ? in.bias.const_data_ptr() : nullptr;
    return in;
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                   const Tensor& cu_seqlens_) {
    constexpr int64_t kLogits = 1 << 20, kPacked = 2 << 20;
    Inputs in = check("linear_log1p_max", x, weight, bias);
    LinearLog1pMaxArgs& a = in.args;
    const Tensor cu_seqlens =
        check_cu_seqlens(in.checks, cu_seqlens_, "cu_seqlens", a.rows, a.rows, "the number of rows");
    a.cu_seqlens = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
    a.sequences = cu_seqlens.size(0) - 1;
    a.rows_at_once = between(32, kPacked / (a.hidden > 0 ? a.hidden : 1), 1024);
    const int64_t together = between(1, a.rows, a.rows_at_once);
    const int64_t chunk = between(512, kLogits / together / 64 * 64, 8192);
    a.words_at_once = chunk < a.words ? chunk : a.words;
    Tensor out = in.checks.empty({a.sequences, a.words}, ScalarType::Float);
    Tensor rows = in.checks.empty({a.sequences, a.words}, ScalarType::Int);
    Tensor logits = in.checks.empty({together, logits_stride(a.words_at_once)}, ScalarType::Float);
    a.out = static_cast<float*>(out.mutable_data_ptr());
    a.top_rows = static_cast<int32_t*>(rows.mutable_data_ptr());
    a.logits = static_cast<float*>(logits.mutable_data_ptr());
    RK_DISPATCH(linear_log1p_max_forward, a);
    return {out, rows};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out_, const Tensor& x, const Tensor& weight,
                                            const std::optional<Tensor>& bias, const Tensor& out_,
                                            const Tensor& rows_, bool weight_gradient) {
    Inputs in = check("linear_log1p_max_backward", x, weight, bias);
    LinearLog1pMaxArgs& a = in.args;
    in.checks.require(out_.dim() == 2, "out must have shape [B, V]");
    a.sequences = out_.size(0);
    in.checks.matrix(out_, "out", a.sequences, a.words, ScalarType::Float);
    in.checks.matrix(grad_out_, "grad_out", a.sequences, a.words, ScalarType::Float);
    in.checks.matrix(rows_, "rows", a.sequences, a.words, ScalarType::Int);
    const Tensor grad_out = as_contiguous(grad_out_), out = as_contiguous(out_), rows = as_contiguous(rows_);
    Tensor slopes = in.checks.empty({a.sequences, a.words}, ScalarType::Float);
    Tensor grad_sum = in.checks.empty({2, a.rows, a.hidden}, ScalarType::Float);
    Tensor grad_x = in.checks.empty({a.rows, a.hidden});
    Tensor grad_weight = weight_gradient ? in.checks.empty({a.words, a.hidden}) : in.checks.empty({0});
    Tensor grad_bias = bias ? in.checks.empty({a.words}) : in.checks.empty({0});
    a.grad_out = static_cast<const float*>(grad_out.const_data_ptr());
    a.out = static_cast<float*>(out.data_ptr());
    a.top_rows = static_cast<int32_t*>(rows.data_ptr());
    for (int64_t i = 0; i < a.sequences * a.words; ++i)
        STD_TORCH_CHECK(a.top_rows[i] >= -1 && a.top_rows[i] < a.rows,
                        "linear_log1p_max_backward: rows holds ", a.top_rows[i], ", and x has ", a.rows,
                        " rows");
    a.slopes = static_cast<float*>(slopes.mutable_data_ptr());
    a.grad_sum = static_cast<float*>(grad_sum.mutable_data_ptr());
    a.grad_x = grad_x.mutable_data_ptr();
    a.grad_weight = weight_gradient ? grad_weight.mutable_data_ptr() : nullptr;
    a.grad_bias = bias ? grad_bias.mutable_data_ptr() : nullptr;
    RK_DISPATCH(linear_log1p_max_backward, a);
    return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace rk::cpu

STABLE_TORCH_LIBRARY_IMPL(roberta_kernels_cpu, CPU, m) {
    m.impl("linear_log1p_max_forward", TORCH_BOX(&rk::cpu::forward));
    m.impl("linear_log1p_max_backward", TORCH_BOX(&rk::cpu::backward));
}
