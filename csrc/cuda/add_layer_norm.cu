// out = layer_norm(residual + dropout(x + x_bias)): one pass over memory, forward and backward.
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

    template <int N>
    __device__ Loaded<N> load(const Row& at, int64_t column) const {
        Loaded<N> loaded = {
            load_once<N>(x + at.offset + column), load_once<N>(residual + at.offset + column), {}};
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
    sum_partials<T>(
        {a.partials,
         partial_rows<T>(a.rows, a.hidden, a.dropout),
         a.hidden,
         {static_cast<T*>(a.grad_weight), static_cast<T*>(a.grad_bias), static_cast<T*>(a.grad_x_bias)}},
        a.stream);
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
