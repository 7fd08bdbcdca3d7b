// The dropout arguments of a kernel, as the binding fills them in. Plain C++.
#pragma once
#include <stdint.h>

namespace rk::cuda {

struct Dropout {
    const int64_t* seed = nullptr;  // in device memory: the host never reads it; null: no dropout
    uint32_t threshold = 0;         // an element is kept when its Philox word >= threshold
    float scale = 1.0f;             // of what is kept

    Dropout() = default;
    Dropout(double p, const int64_t* device_seed)
        : seed(device_seed),
          threshold(static_cast<uint32_t>(p * 4294967296.0)),
          scale(static_cast<float>(1.0 / (1.0 - p))) {}
};

}  // namespace rk::cuda
