// out = layer_norm(residual + dropout(x + x_bias)): one pass over memory, forward and backward.
//
// The rows' layout, and what forward and backward do with them, is in layer_norm.cuh. Here: how a row is made
// from x and residual (16-byte loads that leave the caches first; x_bias stays in L1), and where its
// gradients go.
//
// Bytes, for T rows of H columns of E bytes each; this is the floor, at the rate of a copy:
//
//     forward             3 T H E + 8 T         x, residual, out; mean and rstd
//     backward            4 T H E + 8 T         grad_out, x, residual, one gradient
//     ... with dropout    5 T H E + 8 T         two gradients: the mask is drawn again, not stored
//     column sums         24 H for each block   written and read again, in L2: at most one block a
//                                               multiprocessor up to 1024 columns (float32: 768);
//                                               2.4 MB on 132 at 768 columns
//
// 8192 x 768 in bfloat16: 38 MB forward, 50 MB backward; at 4.3 TB/s 8.8 and 11.7 microseconds. About 10
// flops an element forward and 20 backward, and with dropout another 20 integer instructions (Philox): no
// more than two thirds of what the schedulers issue in the time that the bytes take.
#include "csrc/cuda/add_layer_norm.h"
#include "csrc/cuda/layer_norm.cuh"

namespace rk::cuda {
namespace {

// z = residual + dropout(x + x_bias).
template <typename T, bool kDropout_>
struct Add {
    using Element = T;
    static constexpr bool kDropout = kDropout_;
    const T *x, *residual, *x_bias;
    T *grad_x, *grad_residual;
    int64_t columns;
    Dropout dropout;

    explicit Add(const AddLayerNormArgs& a)
        : x(static_cast<const T*>(a.x)),
          residual(static_cast<const T*>(a.residual)),
          x_bias(static_cast<const T*>(a.x_bias)),
          grad_x(static_cast<T*>(a.grad_x)),
          grad_residual(static_cast<T*>(a.grad_residual)),
          columns(a.hidden),
          dropout(a.dropout) {}

    struct Row {
        int64_t offset;
    };
    template <int N>
    struct Loaded {
        Packed<T, N> x, residual, x_bias;
    };

    __device__ Row row(int64_t row) const { return {row * columns}; }
    static constexpr int kRows = 2;
    __device__ const T* source(const Row& at, int i) const { return (i == 0 ? x : residual) + at.offset; }

    template <int N>
    __device__ Loaded<N> load(const Row& at, int64_t column) const {
        const Packed<T, N> rows[kRows] = {load_once<N>(x + at.offset + column),
                                          load_once<N>(residual + at.offset + column)};
        return loaded<N>(rows, column);
    }
    template <int N>
    __device__ Loaded<N> loaded(const Packed<T, N> (&rows)[kRows], int64_t column) const {
        Loaded<N> loaded = {rows[0], rows[1], {}};
        if (x_bias != nullptr) loaded.x_bias = load_packed<N>(x_bias + column);
        return loaded;
    }

    template <int N>
    __device__ void sum(float (&z)[N], const Row&, const Loaded<N>& loaded, uint32_t kept) const {
        float addend[N];
        unpack<T>(z, loaded.x);
        unpack<T>(addend, loaded.x_bias);
#pragma unroll
        for (int i = 0; i < N; ++i) z[i] += addend[i];
        if constexpr (kDropout) drop(z, kept, dropout.scale);
        unpack<T>(addend, loaded.residual);
#pragma unroll
        for (int i = 0; i < N; ++i) z[i] += addend[i];
    }

    template <int N>
    __device__ void drop_normalised(float (&)[N], uint32_t) const {}

    // Leaves the gradient of x, whose sum is x_bias's.
    template <int N>
    __device__ void store_gradient(int64_t row, int64_t column, float (&z)[N], uint32_t kept) const {
        store(grad_residual + row * columns + column, z);
        if constexpr (kDropout) {
            drop(z, kept, dropout.scale);
            store(grad_x + row * columns + column, z);
        }
    }
};

template <typename T>
void forward(const AddLayerNormArgs& a) {
    const LayerNormForward<T> rows{{static_cast<const T*>(a.weight), a.mean, a.rstd, a.rows, a.hidden},
                                   static_cast<const T*>(a.bias),
                                   static_cast<T*>(a.out),
                                   a.eps};
    if (a.dropout.seed != nullptr)
        layer_norm_forward(Add<T, true>(a), rows, a.stream);
    else
        layer_norm_forward(Add<T, false>(a), rows, a.stream);
}

template <typename T>
void backward(const AddLayerNormArgs& a) {
    const LayerNormBackward<T> rows{{static_cast<const T*>(a.weight), a.mean, a.rstd, a.rows, a.hidden},
                                    static_cast<const T*>(a.grad_out),
                                    a.partials};
    if (a.dropout.seed != nullptr)
        layer_norm_backward(Add<T, true>(a), rows, a.stream);
    else
        layer_norm_backward(Add<T, false>(a), rows, a.stream);
    const int64_t blocks = partial_rows<T>(a.rows, a.hidden, a.dropout);
    add_partials({a.partials, blocks, a.hidden, a.hidden}, {a.grad_weight, a.grad_bias, a.grad_x_bias},
                 a.dtype, a.stream);
}

}  // namespace

int64_t add_layer_norm_partials(const AddLayerNormArgs& a) {
    int64_t floats = 0;
    RK_FOR_DTYPE(a.dtype, T, floats = kColumnSums * partial_rows<T>(a.rows, a.hidden, a.dropout) * a.hidden);
    return floats;
}

void add_layer_norm_forward(const AddLayerNormArgs& a) {
    RK_FOR_DTYPE(a.dtype, T, forward<T>(a));
}

void add_layer_norm_backward(const AddLayerNormArgs& a) {
    RK_FOR_DTYPE(a.dtype, T, backward<T>(a));
}

}  // namespace rk::cuda
