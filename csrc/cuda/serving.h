// What the bindings of single ops have and the encoder's shares: torch's GEMM, and kernels by the variant that is
// set. For *_binding.cpp only.
#pragma once
#include <device.h>

#include "csrc/cuda/attention.h"
#include "csrc/cuda/tensor_checks.h"

namespace rk::cuda {

// torch's GEMM, called past the dispatcher: autocast, which would change the dtype, and autograd, which
// refuses an output argument, stand above it.
inline void multiply(Tensor& out, const Tensor& a, const Tensor& b) {
    TORCH_ERROR_CODE_CHECK(RK_ATEN(mm_out)(out.get(), a.get(), b.get()));
}

inline void multiply_add(Tensor& out, const Tensor& bias, const Tensor& a, const Tensor& b) {
    TORCH_ERROR_CODE_CHECK(RK_ATEN(addmm_out)(out.get(), bias.get(), a.get(), b.get(), 1.0, 1.0));
}

// [rows, columns] of what a contiguous tensor holds from its element `first` on, as a view.
inline Tensor matrix_in(const Tensor& t, int64_t rows, int64_t columns, int64_t first = 0) {
    const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
    AtenTensorHandle view;
    TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, first, &view));
    return Tensor(view);
}

// The transpose of a contiguous matrix, as a view.
inline Tensor transposed(const Tensor& t) {
    const int64_t sizes[] = {t.size(1), t.size(0)}, strides[] = {1, t.size(1)};
    AtenTensorHandle view;
    TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, 0, &view));
    return Tensor(view);
}

// Sequences that cu_seqlens names. Its values stay on the device, unread.
inline int64_t check_cu_seqlens(const Checks& checks, const Tensor& t, const char* name) {
    checks.same(t, name, ScalarType::Int);
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) >= 1, checks.op(), ": ", name, " must have shape [B + 1]");
    return t.size(0) - 1;
}

// By the variant that is set, where this build and the device have it and it takes the call; else by the
// portable one.
void serve_attention_forward(const AttentionArgs& args);
// activation = gelu(x w_in^T + b_in), likewise: x [T, H], w_in [F, H], b_in [F], activation and preactivation
// (null: not kept) [T, F], all contiguous and checked.
void serve_gelu_product(const Checks& checks, const Tensor& x, const Tensor& w_in, const Tensor& b_in,
                        bool tanh, cudaStream_t stream, Tensor& activation, Tensor* preactivation);

}  // namespace rk::cuda
