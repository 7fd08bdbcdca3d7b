// out = layer_norm(residual + dropout(x + x_bias)): one pass over memory.
//
// A row is read once into a float32 scratch row in L1; mean, variance (about that mean) and result come from
// there, so 3 H values move per row and nothing else of size [T, H] exists. Backward reads x, residual and
// grad_out, builds the sum again, and writes one gradient (two with dropout): 4 H or 5 H values. Gradients of
// weight, bias and x_bias are summed per fixed chunk of rows in L1, and the chunks in order. Both are bound
// by memory: about 10 flops for each 4 bytes.
#include "csrc/cpu/add_layer_norm.h"

#include "csrc/cpu/layer_norm.h"

namespace rk::cpu::RK_CPU_ISA {
namespace {

// residual + x + x_bias
template <class T, bool kBias>
struct Sum {
    const T *x, *residual, *x_bias;

    Sum(const AddLayerNormArgs& a, int64_t row)
        : x(static_cast<const T*>(a.x) + row * a.hidden),
          residual(static_cast<const T*>(a.residual) + row * a.hidden),
          x_bias(static_cast<const T*>(a.x_bias)) {}
    RK_INLINE vf32 branch(int64_t c, int count) const {
        const vf32 y = load_some(x + c, count);
        return kBias ? y + load_some(x_bias + c, count) : y;
    }
    RK_INLINE vf32 operator()(int64_t c, int count) const {
        return branch(c, count) + load_some(residual + c, count);
    }
};

// to = residual + dropout(x + x_bias); returns the sum of the row.
template <class T, bool kBias>
RK_INLINE float add_rows(const AddLayerNormArgs& a, int64_t row, float* to) {
    const Sum<T, kBias> sum(a, row);
    if (a.dropout.on) {
        vf32 total[4] = {};
        for_vectors_dropout(a.hidden, a.dropout, row, [&](int64_t c, int count, vf32 multiplier, int chain) {
            const vf32 y = fma(sum.branch(c, count), multiplier, load_some(sum.residual + c, count));
            total[chain] += y;
            store_some(to + c, y, count);
        });
        return chain_sum(total);
    }
    return sum_vectors(a.hidden, [&](int64_t c, int count) {
        const vf32 y = sum(c, count);
        store_some(to + c, y, count);
        return y;
    });
}

template <class T, bool kBias>
void forward(const AddLayerNormArgs& a) {
    parallel_for(0, a.rows, row_grain(a.hidden), [&](int64_t begin, int64_t end) {
        static thread_local Scratch memory;
        memory.reset(static_cast<size_t>(a.hidden) * 4, 1);
        float* sum = memory.take<float>(a.hidden);
        const T *weight = static_cast<const T*>(a.weight), *bias = static_cast<const T*>(a.bias);
        for (int64_t row = begin; row < end; ++row) {
            const float total = add_rows<T, kBias>(a, row, sum);
            const RowStatistics s = row_statistics(sum, a.hidden, total, a.eps);
            T* out = static_cast<T*>(a.out) + row * a.hidden;
            for_vectors(a.hidden, [&](int64_t c, int count) {
                store_some(out + c, normalised(sum, s, weight, bias, c, count), count);
            });
            a.mean[row] = s.mean;
            a.rstd[row] = s.rstd;
        }
    });
}

template <class T, bool kBias>
void backward(const AddLayerNormArgs& a) {
    const RowChunks chunks(a.rows);
    const int sums = kBias ? 3 : 2;
    static thread_local Scratch shared;
    shared.reset(static_cast<size_t>(chunks.count * sums * a.hidden) * 4, 1);
    float* const partial = shared.take<float>(chunks.count * sums * a.hidden);
    parallel_for(
        0, chunks.count, 1 + row_grain(a.hidden) / chunks.chunk_rows, [&](int64_t begin, int64_t end) {
            static thread_local Scratch memory;
            memory.reset(static_cast<size_t>(3 * a.hidden) * 4, 3);
            float *sum = memory.take<float>(a.hidden), *unit = memory.take<float>(a.hidden),
                  *g = memory.take<float>(a.hidden);
            const T* weight = static_cast<const T*>(a.weight);
            for (int64_t chunk = begin; chunk < end; ++chunk) {
                float *grad_weight = partial + chunk * sums * a.hidden, *grad_bias = grad_weight + a.hidden,
                      *grad_x_bias = grad_bias + a.hidden;
                for (int64_t c = 0; c < sums * a.hidden; ++c) grad_weight[c] = 0.0f;
                for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
                    const RowStatistics s{a.mean[row], a.rstd[row]};
                    const T* grad_out = static_cast<const T*>(a.grad_out) + row * a.hidden;
                    T* grad_residual = static_cast<T*>(a.grad_residual) + row * a.hidden;
                    const auto grad = [&](int64_t c, int count) { return load_some(grad_out + c, count); };
                    const auto to_x_bias = [&](int64_t c, int count, vf32 grad_x) {
                        if (kBias)
                            store_some(grad_x_bias + c, grad_x + load_some(grad_x_bias + c, count), count);
                    };
                    if (!a.dropout.on) {
                        layer_norm_row_backward(a.hidden, s, weight, Sum<T, kBias>(a, row), grad, unit, g,
                                                grad_weight, grad_bias,
                                                [&](int64_t c, int count, vf32 value) {
                                                    store_some(grad_residual + c, value, count);
                                                    to_x_bias(c, count, value);
                                                });
                        continue;
                    }
                    add_rows<T, kBias>(a, row, sum);
                    layer_norm_row_backward(
                        a.hidden, s, weight, [&](int64_t c, int count) { return load_some(sum + c, count); },
                        grad, unit, g, grad_weight, grad_bias,
                        [&](int64_t c, int count, vf32 value) {
                            store_some(grad_residual + c, value, count);
                            store_some(sum + c, value, count);
                        });
                    T* grad_x = static_cast<T*>(a.grad_x) + row * a.hidden;
                    for_vectors_dropout(a.hidden, a.dropout, row,
                                        [&](int64_t c, int count, vf32 multiplier, int) {
                                            const vf32 value = load_some(sum + c, count) * multiplier;
                                            store_some(grad_x + c, value, count);
                                            to_x_bias(c, count, value);
                                        });
                }
            }
        });
    void* const to[3] = {a.grad_weight, a.grad_bias, a.grad_x_bias};
    reduce_chunks<T>(partial, chunks.count, sums, a.hidden, to);
}

}  // namespace

void add_layer_norm_forward(const AddLayerNormArgs& a) {
    if (a.bf16)
        a.x_bias ? forward<bf16, true>(a) : forward<bf16, false>(a);
    else
        a.x_bias ? forward<float, true>(a) : forward<float, false>(a);
}

void add_layer_norm_backward(const AddLayerNormArgs& a) {
    if (a.bf16)
        a.x_bias ? backward<bf16, true>(a) : backward<bf16, false>(a);
    else
        a.x_bias ? backward<float, true>(a) : backward<float, false>(a);
}

}  // namespace rk::cpu::RK_CPU_ISA
