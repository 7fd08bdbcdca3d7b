// GELU and its derivative: the one place where they are written. In float32, whatever is stored around them.
//
// erf:  gelu(x) = x Phi(x), Phi the normal distribution function (Hendrycks and Gimpel 2016, section 2).
// tanh: its approximation there, x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), written as
//       x sigmoid(2u), which needs one exp and keeps its relative accuracy where tanh(u) comes near -1.
#pragma once
#include <cuda_runtime.h>
#include <math.h>

namespace rk::cuda {

struct GeluAndSlope {
    float value, slope;
};

namespace gelu_detail {

__host__ __device__ inline float probability(float x) {
    return 0.5f + 0.5f * erff(x * 0.7071067811865476f);
}

// sigmoid(x) and sigmoid(-x), both to their relative accuracy, from one exponential and one quick division, of 2
// units in the last place; it gives 0 where the divisor is infinite or nearly so, as it should be.
struct Sigmoids {
    float of, of_negative;
};
__host__ __device__ inline Sigmoids sigmoids(float x) {
    const float e = expf(-x);
#ifdef __CUDA_ARCH__
    const float s = __fdividef(1.0f, 1.0f + e);
#else
    const float s = 1.0f / (1.0f + e);
#endif
    return {s, s < 0.5f ? 1.0f - s : e * s};
}

__host__ __device__ inline float tanh_argument(float x) {
    return 0.7978845608028654f * (x + 0.044715f * x * x * x);
}

}  // namespace gelu_detail

__host__ __device__ inline float gelu_erf(float x) {
    return x * gelu_detail::probability(x);
}

__host__ __device__ inline float gelu_tanh(float x) {
    return x * gelu_detail::sigmoids(2.0f * gelu_detail::tanh_argument(x)).of;
}

__host__ __device__ inline GeluAndSlope gelu_erf_and_slope(float x) {
    const float p = gelu_detail::probability(x);
    return {x * p, p + x * (0.3989422804014327f * expf(-0.5f * x * x))};
}

__host__ __device__ inline GeluAndSlope gelu_tanh_and_slope(float x) {
    const float u = gelu_detail::tanh_argument(x);
    const float du = 0.7978845608028654f * (1.0f + 3.0f * 0.044715f * x * x);
    const gelu_detail::Sigmoids s = gelu_detail::sigmoids(2.0f * u);
    return {x * s.of, s.of + 2.0f * x * s.of * s.of_negative * du};
}

// The two epilogues, over N neighbours of any array type. `tanh` is the same for the whole grid, so the
// branch stands outside the loops: it costs one predicate, and saves compiling every kernel twice.

// to[i] = gelu(pre[i])
template <int N, class To, class From>
__host__ __device__ inline void gelu(To& to, const From& pre, bool tanh) {
    if (tanh) {
#pragma unroll
        for (int i = 0; i < N; ++i) to[i] = gelu_tanh(pre[i]);
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) to[i] = gelu_erf(pre[i]);
    }
}

// activation[i] = gelu(pre[i]); grad[i] = grad_activation[i] * gelu'(pre[i])
template <int N, class To, class Grad, class From>
__host__ __device__ inline void gelu_backward(To& activation, To& grad, const Grad& grad_activation,
                                              const From& pre, bool tanh) {
    if (tanh) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const GeluAndSlope g = gelu_tanh_and_slope(pre[i]);
            activation[i] = g.value;
            grad[i] = grad_activation[i] * g.slope;
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const GeluAndSlope g = gelu_erf_and_slope(pre[i]);
            activation[i] = g.value;
            grad[i] = grad_activation[i] * g.slope;
        }
    }
}

}  // namespace rk::cuda
