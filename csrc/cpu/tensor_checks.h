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

// Every offset that the kernels use comes from cu_seqlens, so its values are checked here, on the host.
inline Tensor check_cu_seqlens(const Checks& checks, const Tensor& cu_seqlens, const char* name,
                               int64_t tokens, int64_t max_seqlen, const char* max_name) {
    const char* op = checks.op();
    checks.same(cu_seqlens, name, ScalarType::Int);
    STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, op, ": ", name,
                    " must have shape [B + 1]");
    Tensor contiguous = as_contiguous(cu_seqlens);
    const auto* cu = static_cast<const int32_t*>(contiguous.const_data_ptr());
    const int64_t batch = contiguous.size(0) - 1;
    STD_TORCH_CHECK(cu[0] == 0, op, ": ", name, " must start at 0, got ", cu[0]);
    for (int64_t b = 0; b < batch; ++b) {
        STD_TORCH_CHECK(cu[b + 1] >= cu[b], op, ": ", name, " must not decrease: ", name, "[", b,
                        "] = ", cu[b], " and ", name, "[", b + 1, "] = ", cu[b + 1]);
        STD_TORCH_CHECK(cu[b + 1] - cu[b] <= max_seqlen, op, ": sequence ", b, " of ", name, " has length ",
                        cu[b + 1] - cu[b], ", more than ", max_name, " = ", max_seqlen);
    }
    STD_TORCH_CHECK(cu[batch] == tokens, op, ": ", name, " must end at the number of tokens, ", tokens,
                    ", got ", cu[batch]);
    return contiguous;
}

// The bias on attention's scores, contiguous, if there is one.
inline std::optional<Tensor> check_bias(const Checks& checks, const std::optional<Tensor>& bias,
                                        int64_t heads, int64_t max_seqlen_q, int64_t max_seqlen_k) {
    if (!bias) return std::nullopt;
    checks.same(*bias, "bias", checks.scalar_type());
    STD_TORCH_CHECK(bias->dim() == 3 && bias->size(0) == heads && bias->size(1) >= max_seqlen_q &&
                        bias->size(2) >= max_seqlen_k,
                    checks.op(), ": bias must have shape [", heads, ", ", max_seqlen_q, " or more, ",
                    max_seqlen_k, " or more]");
    return as_contiguous(*bias);
}

}  // namespace rk::cpu
