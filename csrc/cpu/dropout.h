// The dropout arguments of a kernel: Philox-4x32-10 key, threshold and scale. The keep mask itself is in
// simd.h; which counter belongs to which element stands in docs/design.md, section 4.
#pragma once
#include <stdint.h>

namespace rk::cpu {

struct Dropout {
    bool on = false;
    uint32_t threshold = 0;  // an element is kept when its Philox word >= threshold
    float scale = 1.0f;      // of what is kept
    uint32_t key0 = 0, key1 = 0;

    Dropout() = default;
    Dropout(double p, int64_t seed)
        : on(true),
          threshold(static_cast<uint32_t>(p * 4294967296.0)),
          scale(static_cast<float>(1.0 / (1.0 - p))),
          key0(static_cast<uint32_t>(static_cast<uint64_t>(seed))),
          key1(static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)) {}
};

}  // namespace rk::cpu
