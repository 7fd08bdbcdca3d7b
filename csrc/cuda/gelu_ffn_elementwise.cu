// GELU beside a GEMM that is not ours: the portable variant of gelu_ffn.
//
// Forward: torch's addmm leaves the pre-activation, bias included and rounded once; one kernel makes the
// activation from it, in place when nobody needs the pre-activation afterwards. Backward: one kernel reads
// the gradient of the activation and the pre-activation, and writes the gradient of the pre-activation (over
// the gradient of the activation), the activation for w_out's gradient, and the column sums of each block of
// 32 rows for b_in's; column_sum.cu adds those up.
//
// Bytes, in passes over [T, F]: forward 2, backward 4, each at the speed of memory; at T = 8192, F = 3072 in
// bfloat16 that is 0.1 GB and 0.2 GB, 23 and 47 us at 4.3 TB/s, where the product before it computes for 49
// us at 790 TFLOP/s (H = 768). This is what the fused variants save. Flops: about 30 instructions an element,
// which the memory's time hides.
#include <launch.cuh>

#include "csrc/cuda/column_sum.cuh"
#include "csrc/cuda/common.cuh"
#include "csrc/cuda/gelu.cuh"
#include "csrc/cuda/gelu_ffn.h"

namespace rk::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 2;  // of N elements for each thread: two loads in flight

// Elements that no whole vector covers go one by one to the first threads of the grid.
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    gelu_forward_kernel(const T* preactivation, T* activation, int64_t count, bool tanh) {
    const int64_t vectors = count / N;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads * kVectors) + threadIdx.x;
    float pre[kVectors][N];
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
        if (first + v * kThreads < vectors) load(pre[v], preactivation + (first + v * kThreads) * N);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        if (first + v * kThreads < vectors) {
            float value[N];
            gelu<N>(value, pre[v], tanh);
            store(activation + (first + v * kThreads) * N, value);
        }
    }
    const int64_t rest = vectors * N + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (N > 1 && rest < count) {
        float one[1], value[1];
        load(one, preactivation + rest);
        gelu<1>(value, one, tanh);
        store(activation + rest, value);
    }
}

template <class T, int N>
__global__ void __launch_bounds__(kSumWarps* kWarp)
    gelu_backward_kernel(const T* grad_activation, const T* preactivation, T* grad_preactivation,
                         T* activation, Partials partials, int64_t tokens, bool tanh) {
    sum_rows_of_block<N>(tokens, partials, [&](int64_t row, int64_t column, float (&grad)[N]) {
        const int64_t at = row * partials.columns + column;
        float above[N], pre[N], value[N];
        load(above, grad_activation + at);
        load(pre, preactivation + at);
        gelu_backward<N>(value, grad, above, pre, tanh);
        store(activation + at, value);
        store(grad_preactivation + at, grad);
    });
}

bool aligned(const void* p) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

template <class T, int N>
void start_forward(const GeluForward& args) {
    constexpr int64_t kEach = static_cast<int64_t>(kThreads) * kVectors * N;
    const int64_t blocks = (args.count + kEach - 1) / kEach;
    if (blocks > INT_MAX) throw std::runtime_error("gelu_ffn: more elements than a grid can cover");
    launch(gelu_forward_kernel<T, N>, {dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, args.stream},
           static_cast<const T*>(args.preactivation), static_cast<T*>(args.activation), args.count,
           args.tanh);
}

template <class T, int N>
void start_backward(const GeluBackward& args) {
    launch(gelu_backward_kernel<T, N>, sum_launch<N>(args.tokens, args.inner, args.stream),
           static_cast<const T*>(args.grad_activation), static_cast<const T*>(args.preactivation),
           static_cast<T*>(args.grad_preactivation), static_cast<T*>(args.activation), args.partials,
           args.tokens, args.tanh);
}

}  // namespace

void gelu_forward(const GeluForward& args) {
    RK_FOR_DTYPE(args.dtype, T, {
        if (aligned(args.preactivation) && aligned(args.activation))
            start_forward<T, 16 / sizeof(T)>(args);
        else
            start_forward<T, 1>(args);
    });
}

void gelu_backward(const GeluBackward& args) {
    RK_FOR_DTYPE(args.dtype, T, {
        constexpr int kWide = 16 / sizeof(T);
        if (args.inner % kWide == 0 && aligned(args.grad_activation) && aligned(args.preactivation) &&
            aligned(args.grad_preactivation) && aligned(args.activation))
            start_backward<T, kWide>(args);
        else
            start_backward<T, 1>(args);
    });
}

}  // namespace rk::cuda
