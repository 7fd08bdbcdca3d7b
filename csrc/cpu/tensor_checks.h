// The checks of the CPU bindings: csrc/tensor_checks.h for the dtypes and the dropout arguments of this
// backend.
#pragma once
#include "csrc/cpu/dropout.h"
#include "csrc/tensor_checks.h"

namespace rk::cpu {

class Checks : public TensorChecks {
  public:
    Checks(const char* op, const Tensor& first, const char* name)
        : TensorChecks(op, first, name, {ScalarType::Float, ScalarType::BFloat16},
                       "float32 or bfloat16 on the CPU") {}

    bool bf16() const { return scalar_type() == ScalarType::BFloat16; }

    Dropout dropout(double p, const std::optional<Tensor>& seed) const {
        const int64_t* address = dropout_seed(p, seed);
        return address == nullptr ? Dropout{} : Dropout(p, *address);
    }
};

}  // namespace rk::cpu
