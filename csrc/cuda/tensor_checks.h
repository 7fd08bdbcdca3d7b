// The checks of the CUDA bindings: csrc/tensor_checks.h for the dtypes and the dropout arguments of this
// backend.
#pragma once
#include <device.h>

#include "csrc/cuda/dropout.h"
#include "csrc/cuda/dtype.h"
#include "csrc/tensor_checks.h"

namespace rk::cuda {

inline bool is_aligned(const Tensor& t) {
    return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

// Contiguous, at a multiple of 16 bytes: what is allocated is, a view into it may not be.
inline Tensor as_aligned(const Tensor& t) {
    const Tensor c = as_contiguous(t);
    return is_aligned(c) ? c : torch::stable::clone(c);
}

class Checks : public TensorChecks {
  public:
    Checks(const char* op, const Tensor& first, const char* name)
        : TensorChecks(op, first, name, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half},
                       "float32, bfloat16 or float16") {}

    Dtype dtype() const {
        return scalar_type() == ScalarType::Float      ? Dtype::float32
               : scalar_type() == ScalarType::BFloat16 ? Dtype::bfloat16
                                                       : Dtype::float16;
    }

    Dropout dropout(double p, const std::optional<Tensor>& seed) const {
        const int64_t* address = dropout_seed(p, seed);
        return address == nullptr ? Dropout{} : Dropout(p, address);
    }
};

}  // namespace rk::cuda
