// The emulation's csrc/cuda/ptx.cuh: the same functions in software, written from the PTX ISA.
#pragma once
#include <stdint.h>

namespace rk::cuda::ptx {

inline uint4 load_streaming(const void* global) {
    return *static_cast<const uint4*>(global);
}

inline float exp2(float x) {
    const float y = std::exp2(x);
    return std::fpclassify(y) == FP_SUBNORMAL ? 0.0f : y;
}

}  // namespace rk::cuda::ptx
