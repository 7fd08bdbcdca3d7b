// Registers linear: a product for inference, with the weight as it is.
#include "csrc/cpu/linear.h"
#include "csrc/cpu/tensor_checks.h"

namespace rk::cpu {
namespace {

Tensor multiply(const Tensor& x_, const Tensor& weight, const std::optional<Tensor>& bias_) {
    const Checks checks("linear", x_, "x");
    checks.require(x_.dim() == 2, "x must have shape [T, K]");
    checks.require(weight.dim() == 2, "weight must have shape [N, K]");
    checks.matrix(weight, "weight", weight.size(0), x_.size(1));
    checks.require(weight.numel() > 0, "weight must not be empty");
    checks.require((weight.size(1) == 1 || weight.stride(1) == 1) &&
                       (weight.size(0) == 1 || weight.stride(0) >= weight.size(1)),
                   "weight must have contiguous rows");
    const int64_t rows = weight.size(0), columns = weight.size(1);
    if (bias_) checks.vector(*bias_, "bias", rows);
    const Tensor x = as_contiguous(x_);
    const Tensor bias = bias_ ? as_contiguous(*bias_) : x;
    Tensor out = checks.empty({x.size(0), rows});
    LinearArgs args{};
    args.x = x.const_data_ptr();
    args.weight = {weight.const_data_ptr(), rows, columns, rows == 1 ? columns : weight.stride(0)};
    args.bias = bias_ ? bias.const_data_ptr() : nullptr;
    args.out = out.mutable_data_ptr();
    args.tokens = x.size(0);
    args.bf16 = checks.bf16();
    if (args.tokens > 0) RK_DISPATCH(linear, args);
    return out;
}

}  // namespace
}  // namespace rk::cpu

STABLE_TORCH_LIBRARY_IMPL(roberta_kernels_cpu, CPU, m) {
    m.impl("linear", TORCH_BOX(&rk::cpu::multiply));
}
