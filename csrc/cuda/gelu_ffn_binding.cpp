// Registers gelu_ffn for CUDA tensors: checks, allocation, the choice of a variant, and torch's GEMM for the
// products that are not fused with anything.
#include <launch.cuh>

#include "csrc/cuda/gelu_ffn.h"
#include "csrc/cuda/serving.h"

namespace rk::cuda {
namespace {

// A variant can only be set where it was built, so what is left out here is never reached.
void run_fused(GeluFfnVariant path, const FusedForward& args) {
#ifdef ROBERTA_KERNELS_CUTLASS
#    ifdef ROBERTA_KERNELS_SM90A
    if (path == GeluFfnVariant::sm90)
        return args.dtype == Dtype::bfloat16 ? fused_forward_sm90_bfloat16(args)
                                             : fused_forward_sm90_float16(args);
#    endif
    if (path == GeluFfnVariant::sm80) return fused_forward_sm80(args);
#endif
    throw std::logic_error("gelu_ffn: this build has no fused kernels");
}

void run_fused(GeluFfnVariant path, const FusedBackward& args) {
#ifdef ROBERTA_KERNELS_CUTLASS
#    ifdef ROBERTA_KERNELS_SM90A
    if (path == GeluFfnVariant::sm90)
        return args.dtype == Dtype::bfloat16 ? fused_backward_sm90_bfloat16(args)
                                             : fused_backward_sm90_float16(args);
#    endif
    if (path == GeluFfnVariant::sm80) return fused_backward_sm80(args);
#endif
    throw std::logic_error("gelu_ffn: this build has no fused kernels");
}

}  // namespace

void serve_gelu_product(const Checks& checks, const Tensor& x, const Tensor& w_in, const Tensor& b_in,
                        bool tanh, cudaStream_t stream, Tensor& activation, Tensor* preactivation) {
    const int64_t tokens = x.size(0), hidden = x.size(1), inner = w_in.size(0);
    const Device& properties = current_device();
    const GeluFfnVariant path =
        gelu_ffn_path(gelu_ffn_variant(), properties.arch, checks.dtype(), tokens, hidden, inner,
                      is_aligned(x) && is_aligned(w_in) && is_aligned(b_in));
    if (path == GeluFfnVariant::portable) {
        Tensor& pre = preactivation == nullptr ? activation : *preactivation;
        multiply_add(pre, b_in, x, transposed(w_in));
        gelu_forward({pre.const_data_ptr(), activation.mutable_data_ptr(), tokens * inner, checks.dtype(),
                      tanh, stream});
    } else {
        FusedForward args{};
        args.x = x.const_data_ptr();
        args.w_in = w_in.const_data_ptr();
        args.b_in = b_in.const_data_ptr();
        args.activation = activation.mutable_data_ptr();
        args.preactivation = preactivation == nullptr ? nullptr : preactivation->mutable_data_ptr();
        args.tokens = tokens, args.hidden = hidden, args.inner = inner;
        args.dtype = checks.dtype();
        args.tanh = tanh;
        args.device = {properties.multiprocessors, stream};
        run_fused(path, args);
    }
    note_served(path, Direction::forward);
}

namespace {

std::tuple<Tensor, Tensor> forward(const Tensor& x_, const Tensor& w_in_, const Tensor& b_in_,
                                   const Tensor& w_out_, const std::optional<Tensor>& b_out_, bool tanh,
                                   bool save_preactivation) {
    const Checks checks("gelu_ffn", x_, "x");
    checks.require(x_.dim() == 2 && w_in_.dim() == 2 && w_out_.dim() == 2,
                   "x, w_in and w_out must be matrices");
    const int64_t tokens = x_.size(0), hidden = x_.size(1), inner = w_in_.size(0), outer = w_out_.size(0);
    checks.matrix(w_in_, "w_in", inner, hidden);
    checks.vector(b_in_, "b_in", inner);
    checks.matrix(w_out_, "w_out", outer, inner);
    if (b_out_) checks.vector(*b_out_, "b_out", outer);

    const OnDeviceOf device(x_);
    const Tensor x = as_contiguous(x_), w_in = as_contiguous(w_in_), b_in = as_contiguous(b_in_);
    const Tensor w_out = as_contiguous(w_out_);
    Tensor preactivation = checks.empty({0});
    Tensor activation = checks.empty({tokens, inner});
    if (save_preactivation) preactivation = checks.empty({tokens, inner});
    serve_gelu_product(checks, x, w_in, b_in, tanh, device.stream(), activation,
                       save_preactivation ? &preactivation : nullptr);

    Tensor out = checks.empty({tokens, outer});
    if (b_out_)
        multiply_add(out, as_contiguous(*b_out_), activation, transposed(w_out));
    else
        multiply(out, activation, transposed(w_out));
    return {out, preactivation};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_out_, const Tensor& x_,
                                                            const Tensor& w_in_, const Tensor& w_out_,
                                                            const Tensor& preactivation_, bool tanh) {
    const Checks checks("gelu_ffn", x_, "x");
    checks.require(x_.dim() == 2 && w_in_.dim() == 2 && w_out_.dim() == 2,
                   "x, w_in and w_out must be matrices");
    const int64_t tokens = x_.size(0), hidden = x_.size(1), inner = w_in_.size(0), outer = w_out_.size(0);
    checks.matrix(grad_out_, "grad_out", tokens, outer);
    checks.matrix(w_in_, "w_in", inner, hidden);
    checks.matrix(w_out_, "w_out", outer, inner);
    checks.matrix(preactivation_, "preactivation", tokens, inner);

    const OnDeviceOf device(x_);
    const Tensor grad_out = as_contiguous(grad_out_), x = as_contiguous(x_), w_in = as_contiguous(w_in_);
    const Tensor w_out = as_contiguous(w_out_), preactivation = as_contiguous(preactivation_);
    const Device& properties = current_device();
    const GeluFfnVariant path =
        gelu_ffn_path(gelu_ffn_variant(), properties.arch, checks.dtype(), tokens, outer, inner,
                      is_aligned(grad_out) && is_aligned(w_out) && is_aligned(preactivation));
    Tensor grad_preactivation = checks.empty({tokens, inner});
    Tensor activation = checks.empty({tokens, inner});
    Tensor grad_b_in = checks.empty({inner}), grad_b_out = checks.empty({outer});

    const bool fused = path != GeluFfnVariant::portable;
    Partials partials =
        fused ? fused_partials(path, tokens, inner) : Partials{nullptr, sum_blocks(tokens), inner, inner};
    Tensor partial_sums = checks.empty({partials.rows, partials.pitch}, ScalarType::Float);
    partials.data = static_cast<float*>(partial_sums.mutable_data_ptr());
    if (fused) {
        FusedBackward args{};
        args.grad_out = grad_out.const_data_ptr();
        args.w_out = w_out.const_data_ptr();
        args.preactivation = preactivation.const_data_ptr();
        args.grad_preactivation = grad_preactivation.mutable_data_ptr();
        args.activation = activation.mutable_data_ptr();
        args.partials = partials;
        args.tokens = tokens, args.outer = outer, args.inner = inner;
        args.dtype = checks.dtype();
        args.tanh = tanh;
        args.device = {properties.multiprocessors, device.stream()};
        run_fused(path, args);
    } else {
        multiply(grad_preactivation, grad_out, w_out);  // of the activation: the next kernel works in place
        GeluBackward args{};
        args.grad_activation = grad_preactivation.const_data_ptr();
        args.preactivation = preactivation.const_data_ptr();
        args.grad_preactivation = grad_preactivation.mutable_data_ptr();
        args.activation = activation.mutable_data_ptr();
        args.partials = partials;
        args.tokens = tokens, args.inner = inner;
        args.dtype = checks.dtype();
        args.tanh = tanh;
        args.stream = device.stream();
        gelu_backward(args);
    }
    note_served(path, Direction::backward);
    add_partials(partials, {grad_b_in.mutable_data_ptr()}, checks.dtype(), device.stream());

    Partials out_partials{nullptr, sum_blocks(tokens), outer, outer};
    Tensor out_sums = checks.empty({out_partials.rows, outer}, ScalarType::Float);
    out_partials.data = static_cast<float*>(out_sums.mutable_data_ptr());
    sum_row_blocks(grad_out.const_data_ptr(), tokens, out_partials, checks.dtype(), device.stream());
    add_partials(out_partials, {grad_b_out.mutable_data_ptr()}, checks.dtype(), device.stream());

    Tensor grad_x = checks.empty({tokens, hidden});
    Tensor grad_w_in = checks.empty({inner, hidden});
    Tensor grad_w_out = checks.empty({outer, inner});
    multiply(grad_x, grad_preactivation, w_in);
    multiply(grad_w_in, transposed(grad_preactivation), x);
    multiply(grad_w_out, transposed(grad_out), activation);
    return {grad_x, grad_w_in, grad_b_in, grad_w_out, grad_b_out};
}

}  // namespace
}  // namespace rk::cuda

STABLE_TORCH_LIBRARY_IMPL(roberta_kernels_cuda, RK_DISPATCH_KEY, m) {
    m.impl("gelu_ffn_forward", TORCH_BOX(&rk::cuda::forward));
    m.impl("gelu_ffn_backward", TORCH_BOX(&rk::cuda::backward));
}
