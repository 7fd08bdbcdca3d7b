// What the two CUTLASS variants of gelu_ffn share. To be included before CUTLASS.
#pragma once
#ifndef NDEBUG
#    define NDEBUG
#endif
// Again, as nvcc has included it before: a device-side assert is a function call, and all wgmma before one is
// waited for.
#include <cassert>
#include <stdexcept>
#include <string>

#include "cutlass/cutlass.h"

namespace rk::cuda {

inline void check_cutlass(cutlass::Status status, const char* what) {
    if (status != cutlass::Status::kSuccess)
        throw std::runtime_error(std::string("gelu_ffn, CUTLASS kernel, ") + what + ": " +
                                 cutlassGetStatusString(status));
}

}  // namespace rk::cuda
