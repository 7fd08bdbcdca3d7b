// Arguments of a product with a weight that is read where it lies.
#pragma once
#include "csrc/cpu/encoder.h"

namespace rk::cpu {

struct LinearArgs {
    const void* x;     // [T, K]
    Weight weight;     // [N, K]
    const void* bias;  // [N], or null
    void* out;         // [T, N]
    int64_t tokens;
    bool bf16;
};

}  // namespace rk::cpu

RK_DECLARE_ENTRY(linear, LinearArgs)
