// Registers linear_cross_entropy for CPU tensors: checks what the kernels rely on, allocates, hands over plain pointers.
#include "csrc/cpu/linear_cross_entropy.h"
#include "csrc/cpu/tensor_checks.h"

namespace rk::cpu {
namespace {

// Words of a chunk: its logits stay within some megabytes, and a product is not too narrow.
int64_t words_at_once(int64_t rows, int64_t words) {
    constexpr int64_t kLogits = 1 << 22, kFewest = 512, kMost = 8192;
    const int64_t fitting = kLogits / (rows > 0 ? rows : 1) / 64 * 64;
    const int64_t chunk = fitting < kFewest ? kFewest : fitting > kMost ? kMost : fitting;
    return chunk < words ? chunk : words;
}
constexpr int64_t kFewestColumns = 8;  // that a product's tile has on any instruction set

// Checked inputs; contiguous copies, where they were needed, live here.
struct Inputs {
    Checks checks;
    LinearCrossEntropyArgs args;
    Tensor x, weight, bias, labels;
};

Inputs check(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
             const Tensor& labels, int64_t ignore_index) {
    const Checks checks(op, x, "x");
    checks.require(x.dim() == 2, "x must have shape [T, H]");
    checks.require(weight.dim() == 2 && weight.size(0) > 0, "weight must have shape [V, H]");
    LinearCrossEntropyArgs a{};
    a.rows = x.size(0), a.hidden = x.size(1), a.words = weight.size(0);
    checks.matrix(weight, "weight", a.words, a.hidden);
    if (bias) checks.vector(*bias, "bias", a.words);
    checks.vector(labels, "labels", a.rows, ScalarType::Long);
    const Tensor weight_here = as_contiguous(weight);
    Inputs in{checks,
              a,
              as_contiguous(x),
              weight_here,
              bias ? as_contiguous(*bias) : weight_here,
              as_contiguous(labels)};
    in.args.bf16 = checks.bf16();
    in.args.words_at_once = words_at_once(a.rows, a.words);
    in.args.x = in.x.const_data_ptr();
    in.args.weight = in.weight.const_data_ptr();
    in.args.bias = bias ? in.bias.const_data_ptr() : nullptr;
    in.args.labels = static_cast<const int64_t*>(in.labels.const_data_ptr());
    in.args.ignore_index = ignore_index;
    for (int64_t i = 0; i < a.rows; ++i) {
        const int64_t label = in.args.labels[i];
        STD_TORCH_CHECK(label == ignore_index || (label >= 0 && label < a.words), op, ": labels[", i,
                        "] = ", label, " is out of bounds, with ", a.words, " words");
    }
    return in;
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                   const Tensor& labels, int64_t ignore_index) {
    Inputs in = check("linear_cross_entropy", x, weight, bias, labels, ignore_index);
    LinearCrossEntropyArgs& a = in.args;
    Tensor loss = in.checks.empty({a.rows}, ScalarType::Float);
    Tensor statistics = in.checks.empty({2, a.rows}, ScalarType::Float);
    const int64_t tiles = (a.words_at_once + kFewestColumns - 1) / kFewestColumns;
    Tensor partials = in.checks.empty({2, tiles, a.rows}, ScalarType::Float);
    a.loss = static_cast<float*>(loss.mutable_data_ptr());
    a.largest = static_cast<float*>(statistics.mutable_data_ptr());
    a.log_sum = a.largest + a.rows;
    a.partials = static_cast<float*>(partials.mutable_data_ptr());
    if (a.rows > 0) RK_DISPATCH(linear_cross_entropy_forward, a);
    return {loss, statistics};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_loss_, const Tensor& x, const Tensor& weight,
                                            const std::optional<Tensor>& bias, const Tensor& labels,
                                            const Tensor& statistics_, int64_t ignore_index,
                                            bool weight_gradient) {
    Inputs in = check("linear_cross_entropy_backward", x, weight, bias, labels, ignore_index);
    LinearCrossEntropyArgs& a = in.args;
    in.checks.vector(grad_loss_, "grad_loss", a.rows, ScalarType::Float);
    in.checks.matrix(statistics_, "statistics", 2, a.rows, ScalarType::Float);
    const Tensor grad_loss = as_contiguous(grad_loss_), statistics = as_contiguous(statistics_);
    Tensor grad_logits = in.checks.empty({a.rows, a.words_at_once});
    Tensor grad_sum = in.checks.empty({a.rows, a.hidden}, ScalarType::Float);
    Tensor grad_x = in.checks.empty({a.rows, a.hidden});
    Tensor grad_weight = weight_gradient ? in.checks.empty({a.words, a.hidden}) : in.checks.empty({0});
    Tensor grad_bias = bias ? in.checks.empty({a.words}) : in.checks.empty({0});
    a.grad_loss = static_cast<const float*>(grad_loss.const_data_ptr());
    a.largest = static_cast<float*>(statistics.data_ptr());
    a.log_sum = a.largest + a.rows;
    a.grad_logits = grad_logits.mutable_data_ptr();
    a.grad_sum = static_cast<float*>(grad_sum.mutable_data_ptr());
    a.grad_x = grad_x.mutable_data_ptr();
    a.grad_weight = weight_gradient ? grad_weight.mutable_data_ptr() : nullptr;
    a.grad_bias = bias ? grad_bias.mutable_data_ptr() : nullptr;
    RK_DISPATCH(linear_cross_entropy_backward, a);
    return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace rk::cpu

STABLE_TORCH_LIBRARY_IMPL(roberta_kernels_cpu, CPU, m) {
    m.impl("linear_cross_entropy_forward", TORCH_BOX(&rk::cpu::forward));
    m.impl("linear_cross_entropy_backward", TORCH_BOX(&rk::cpu::backward));
}
