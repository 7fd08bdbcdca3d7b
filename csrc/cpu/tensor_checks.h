// What the row bindings share: checks that name the argument at fault, and allocation. For *_binding.cpp
// only: it includes torch's stable headers.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <tuple>

#include "csrc/cpu/dropout.h"

namespace rk::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
    int64_t strides[4];
    int64_t stride = 1;
    for (int i = static_cast<int>(sizes.size()) - 1; i >= 0; --i) {
        strides[i] = stride;
        stride *= sizes.begin()[i] > 0 ? sizes.begin()[i] : 1;
    }
    const int32_t code = dtype == ScalarType::Float      ? aoti_torch_dtype_float32()
                         : dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                                         : aoti_torch_dtype_int64();
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                    strides, code, aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
}

inline Tensor as_contiguous(const Tensor& t) {
    return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// float32 or bfloat16, by the first tensor; returns true for bfloat16.
inline bool check_dtype(const char* op, const Tensor& first, const char* name) {
    const ScalarType dtype = first.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op, ": ", name,
                    " must be float32 or bfloat16 on the CPU, not ", torch::headeronly::toString(dtype));
    return dtype == ScalarType::BFloat16;
}

inline void check_same_dtype(const char* op, const Tensor& t, const char* name, ScalarType dtype) {
    STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " must be ", torch::headeronly::toString(dtype),
                    ", not ", torch::headeronly::toString(t.scalar_type()));
    STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, " must be on the CPU");
}

inline void check_vector(const char* op, const Tensor& t, const char* name, ScalarType dtype, int64_t size) {
    check_same_dtype(op, t, name, dtype);
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size, op, ": ", name, " must have shape [", size, "]");
}

inline void check_matrix(const char* op, const Tensor& t, const char* name, ScalarType dtype, int64_t rows,
                         int64_t columns) {
    check_same_dtype(op, t, name, dtype);
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, op, ": ", name,
                    " must have shape [", rows, ", ", columns, "]");
}

inline Dropout check_dropout(const char* op, double p, const std::optional<Tensor>& seed) {
    STD_TORCH_CHECK(p >= 0.0 && p < 1.0, op, ": dropout_p must be in [0, 1), not ", p);
    if (p == 0.0) return Dropout{};
    STD_TORCH_CHECK(seed.has_value(), op, ": dropout_p > 0 needs a seed");
    check_same_dtype(op, *seed, "seed", ScalarType::Long);
    STD_TORCH_CHECK(seed->numel() == 1, op, ": seed must hold one element");
    return Dropout(p, *static_cast<const int64_t*>(seed->const_data_ptr()));
}

}  // namespace rk::cpu
