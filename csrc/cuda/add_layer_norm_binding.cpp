#include "csrc/cuda/add_layer_norm.h"
#include "csrc/cuda/tensor_checks.h"

namespace rk::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                           const Tensor& bias, double eps,
                                           const std::optional<Tensor>& x_bias, double dropout_p,
                                           const std::optional<Tensor>& seed) {
    const Checks checks("add_layer_norm", x, "x");
    checks.require(x.dim() == 2, "x must have shape [T, H]");
    AddLayerNormArgs a{};
    a.rows = x.size(0);
    a.hidden = x.size(1);
    checks.matrix(residual, "residual", a.rows, a.hidden);
    checks.vector(weight, "weight", a.hidden);
    checks.vector(bias, "bias", a.hidden);
    if (x_bias.has_value()) checks.vector(*x_bias, "x_bias", a.hidden);
    a.dropout = checks.dropout(dropout_p, seed);
    const OnDeviceOf device(x);
    const Tensor x_rows = as_aligned(x), residual_rows = as_aligned(residual);
    const Tensor w = as_aligned(weight), b = as_aligned(bias);
    std::optional<Tensor> xb;
    if (x_bias.has_value()) xb = as_aligned(*x_bias);
    Tensor out = checks.empty({a.rows, a.hidden});
    Tensor mean = checks.empty({a.rows}, ScalarType::Float), rstd = checks.empty({a.rows}, ScalarType::Float);
    a.x = x_rows.const_data_ptr();
    a.residual = residual_rows.const_data_ptr();
    a.weight = w.const_data_ptr();
    a.bias = b.const_data_ptr();
    a.x_bias = xb.has_value() ? xb->const_data_ptr() : nullptr;
    a.eps = static_cast<float>(eps);
    a.dtype = checks.dtype();
    a.stream = device.stream();
    a.out = out.mutable_data_ptr();
    a.mean = static_cast<float*>(mean.mutable_data_ptr());
    a.rstd = static_cast<float*>(rstd.mutable_data_ptr());
    add_layer_norm_forward(a);
    return {std::move(out), std::move(mean), std::move(rstd)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& x,
                                                            const Tensor& residual, const Tensor& weight,
                                                            const std::optional<Tensor>& x_bias,
                                                            const Tensor& mean, const Tensor& rstd,
                                                            double dropout_p,
                                                            const std::optional<Tensor>& seed) {
    const Checks checks("add_layer_norm_backward", x, "x");
    checks.require(x.dim() == 2, "x must have shape [T, H]");
    AddLayerNormArgs a{};
    a.rows = x.size(0);
    a.hidden = x.size(1);
    checks.matrix(grad_out, "grad_out", a.rows, a.hidden);
    checks.matrix(residual, "residual", a.rows, a.hidden);
    checks.vector(weight, "weight", a.hidden);
    checks.vector(mean, "mean", a.rows, ScalarType::Float);
    checks.vector(rstd, "rstd", a.rows, ScalarType::Float);
    if (x_bias.has_value()) checks.vector(*x_bias, "x_bias", a.hidden);
    a.dropout = checks.dropout(dropout_p, seed);
    const OnDeviceOf device(x);
    const bool dropped = a.dropout.seed != nullptr;
    const Tensor g = as_aligned(grad_out), x_rows = as_aligned(x), residual_rows = as_aligned(residual);
    const Tensor w = as_aligned(weight), m = as_contiguous(mean), r = as_contiguous(rstd);
    std::optional<Tensor> xb;
    if (x_bias.has_value()) xb = as_aligned(*x_bias);
    Tensor grad_residual = checks.empty({a.rows, a.hidden});
    Tensor grad_x = dropped ? checks.empty({a.rows, a.hidden}) : checks.empty({0});
    Tensor grad_weight = checks.empty({a.hidden}), grad_bias = checks.empty({a.hidden});
    Tensor grad_x_bias = checks.empty({xb.has_value() ? a.hidden : 0});
    a.grad_out = g.const_data_ptr();
    a.x = x_rows.const_data_ptr();
    a.residual = residual_rows.const_data_ptr();
    a.weight = w.const_data_ptr();
    a.x_bias = xb.has_value() ? xb->const_data_ptr() : nullptr;
    a.mean = static_cast<float*>(m.data_ptr());
    a.rstd = static_cast<float*>(r.data_ptr());
    a.dtype = checks.dtype();
    a.stream = device.stream();
    a.grad_residual = grad_residual.mutable_data_ptr();
    a.grad_x = dropped ? grad_x.mutable_data_ptr() : nullptr;
    a.grad_weight = grad_weight.mutable_data_ptr();
    a.grad_bias = grad_bias.mutable_data_ptr();
    a.grad_x_bias = xb.has_value() ? grad_x_bias.mutable_data_ptr() : nullptr;
    Tensor partials = checks.empty({add_layer_norm_partials(a)}, ScalarType::Float);
    a.partials = static_cast<float*>(partials.mutable_data_ptr());
    add_layer_norm_backward(a);
    return {std::move(grad_x), std::move(grad_residual), std::move(grad_weight), std::move(grad_bias),
            std::move(grad_x_bias)};
}

}  // namespace
}  // namespace rk::cuda

STABLE_TORCH_LIBRARY_IMPL(roberta_kernels_cuda, RK_DISPATCH_KEY, m) {
    m.impl("add_layer_norm_forward", TORCH_BOX(&rk::cuda::forward));
    m.impl("add_layer_norm_backward", TORCH_BOX(&rk::cuda::backward));
}
