// The checks of the CUDA bindings: csrc/tensor_checks.h for the dtypes and the dropout arguments of this
// backend.
#pragma once
#include <device.h>

#include "csrc/cuda/dropout.h"
#include "csrc/cuda/dtype.h"
#include "csrc/tensor_checks.h"

namespace rk::cuda {

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
