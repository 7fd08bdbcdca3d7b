// The dtypes of the CUDA kernels. Plain C++: shared by the kernels (.cu) and their bindings.
#pragma once

namespace rk::cuda {

enum class Dtype { float32, bfloat16, float16 };

}  // namespace rk::cuda

// RK_FOR_DTYPE(dtype, T, statement): runs the statement with T naming the CUDA type of a Dtype.
#define RK_FOR_DTYPE(dtype, T, ...)         \
    switch (dtype) {                        \
        case ::rk::cuda::Dtype::float32: {  \
            using T = float;                \
            __VA_ARGS__;                    \
            break;                          \
        }                                   \
        case ::rk::cuda::Dtype::bfloat16: { \
            using T = __nv_bfloat16;        \
            __VA_ARGS__;                    \
            break;                          \
        }                                   \
        case ::rk::cuda::Dtype::float16: {  \
            using T = __half;               \
            __VA_ARGS__;                    \
            break;                          \
        }                                   \
    }
