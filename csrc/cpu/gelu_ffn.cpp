// out = gelu(x w_in^T + b_in) w_out^T + b_out, and its gradients.
//
// Forward goes over the tokens in groups of up to a thousand. The epilogue of the first product adds the bias
// and applies GELU to a tile of a few rows by kColumns columns that has just left the registers, saves the
// pre-activation if asked, and writes the activation straight into the panel layout in which the second
// product reads its left operand: the activation [T, F] never exists as a tensor, and there is no pass over
// it. Two dozen tokens or fewer take the dot path of gemm.h: then the weights are only read, once, and the
// call runs at the speed of memory.
//
// With AMX the products are on tiles (tile_layers.h): forward for any number of tokens.
//
// Backward: the epilogue of grad_out w_out reads the pre-activation, computes gelu and its derivative from
// one exp, and writes the activation and the gradient of the pre-activation, with the column sums of each row
// panel for the bias gradient (added up afterwards in row order, so the result does not depend on the
// threads). Then three plain products, by the same GEMM: it measures level with torch's (float32: 96 GFLOP/s
// against 90 on one core at T = 1024, bfloat16: 192 against 188) and is the faster one for fewer tokens.
//
// Work: 2 T F (H + O) flops forward and twice that backward. GELU adds about 30 vector operations for kLanes
// elements, which cost H + O multiply-adds of whole vectors: 2% at H = O = 768.
#include "csrc/cpu/gelu_ffn.h"

#include "csrc/cpu/gemm.h"
#include "csrc/cpu/sum_rows.h"
#if defined(RK_CPU_ISA_AMX)
#    include "csrc/cpu/tile_layers.h"
#endif

namespace rk::cpu::RK_CPU_ISA {
namespace {

#if defined(RK_CPU_ISA_AMX)

template <bool kTanh>
void forward_on_tiles(const GeluFfnForwardArgs& a) {
    on_parts(a.bf16, [&](auto parts, auto element) {
        using T = decltype(element);
        FeedForward<T> f{};
        f.in = {a.w_in, a.inner, a.hidden, a.hidden};
        f.out = {a.w_out, a.outer, a.inner, a.inner};
        f.in_bias = static_cast<const T*>(a.b_in), f.out_bias = static_cast<const T*>(a.b_out);
        f.x = static_cast<const T*>(a.x);
        f.result = static_cast<T*>(a.out), f.preactivation = static_cast<T*>(a.preactivation);
        f.tokens = a.tokens;
        feed_forward<parts(), kTanh>(f);
    });
}

#else

// Bias and GELU of a tile: the activation goes to activation[row][column] with the given stride, the
// pre-activation to its place in [T, F] if wanted.
template <class T, bool kTanh>
RK_INLINE void activate(const GeluFfnForwardArgs& a, int64_t row, int64_t column, int rows, int width,
                        const float* tile, T* activation, int64_t activation_stride) {
    const T* bias = static_cast<const T*>(a.b_in);
    T* preactivation = static_cast<T*>(a.preactivation);
    for (int j = 0; j < width; j += kLanes) {
        const int left = width - j;
        const vf32 b = load_some(bias + column + j, left);
        for (int i = 0; i < rows; ++i) {
            const vf32 pre = load(tile + i * kColumns + j) + b;
            if (preactivation != nullptr)
                store_some(preactivation + (row + i) * a.inner + column + j, pre, left);
            store_some(activation + i * activation_stride + j, gelu<kTanh>(pre), left);
        }
    }
}

template <class T, bool kTanh>
void forward(const GeluFfnForwardArgs& a) {
    const Matrix<T> x = row_major(static_cast<const T*>(a.x), a.tokens, a.hidden);
    const Matrix<T> w_in = row_major(static_cast<const T*>(a.w_in), a.inner, a.hidden);
    const Matrix<T> w_out = row_major(static_cast<const T*>(a.w_out), a.outer, a.inner);
    const StoreTile<T> store_out{static_cast<T*>(a.out), a.outer, static_cast<const T*>(a.b_out)};

    if (a.tokens <= kFewRows<T>) {
        T* activation = reinterpret_cast<T*>(thread_scratch(Use::activation).words(a.tokens * a.inner));
        multiply_few_rows(x, w_in, [&](int64_t row, int64_t column, int rows, int width, const float* tile) {
            activate<T, kTanh>(a, row, column, rows, width, tile, activation + row * a.inner + column,
                               a.inner);
        });
        multiply_few_rows(row_major<T>(activation, a.tokens, a.inner), w_out, store_out);
        return;
    }

    const int64_t step = rows_at_once<T>(max64(a.hidden, a.inner));
    for (int64_t first = 0; first < a.tokens; first += step) {
        const int64_t count = min64(step, a.tokens - first);
        const RowPanels x_panels(count, words_of<T>(a.hidden)),
            activation_panels(count, words_of<T>(a.inner));
        float* packed_x = thread_scratch(Use::left_operand).words(count * x_panels.k_words);
        float* packed_activation = thread_scratch(Use::activation).words(count * activation_panels.k_words);
        pack_a(x.some_rows(first, count), x_panels, packed_x);
        multiply_packed(
            x_panels, packed_x, w_in,
            [&](int64_t row, int64_t column, int rows, int width, const float* tile) {
                alignas(64) T activation[kLanes * kColumns];  // pack_along_k knows of kLanes rows
                activate<T, kTanh>(a, first + row, column, rows, width, tile, activation, kColumns);
                float* panel = packed_activation + activation_panels.offset(activation_panels.index(row));
                pack_along_k(activation, kColumns, rows, width, panel + column / kPerWord<T> * rows, rows,
                             rows);
            });
        multiply_packed(activation_panels, packed_activation, w_out,
                        [&](int64_t row, int64_t column, int rows, int width, const float* tile) {
                            store_out(first + row, column, rows, width, tile);
                        });
    }
}

#endif

// total += the sum over rows of sums, [rows, columns]
void add_rows(const float* sums, int64_t rows, int64_t columns, float* total) {
    parallel_for(0, ceil_div(columns, kLanes), 1, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            const int64_t column = block * kLanes;
            const int left = int(min64(kLanes, columns - column));
            vf32 sum = zero();
            for (int64_t i = 0; i < rows; ++i) sum += load_some(sums + i * columns + column, left);
            store_some(total + column, load_some(total + column, left) + sum, left);
        }
    });
}

#if defined(RK_CPU_ISA_AMX)

template <bool kTanh>
void backward_on_tiles(const GeluFfnBackwardArgs& a) {
    const int64_t tokens = a.tokens, hidden = a.hidden, inner = a.inner, outer = a.outer;
    on_parts(a.bf16, [&](auto parts, auto element) {
        using T = decltype(element);
        const Matrix<T> grad_out = row_major(static_cast<const T*>(a.grad_out), tokens, outer);
        const Matrix<T> x = row_major(static_cast<const T*>(a.x), tokens, hidden);
        const Matrix<T> w_in = row_major(static_cast<const T*>(a.w_in), inner, hidden);
        const Matrix<T> w_out_t = row_major(static_cast<const T*>(a.w_out), outer, inner).transposed();
        const Matrix<T> grad_pre = row_major<T>(static_cast<T*>(a.grad_preactivation), tokens, inner);
        const Matrix<T> act = row_major<T>(static_cast<T*>(a.activation), tokens, inner);

        const int64_t most_panels = ceil_div(min64(tokens, kTokensAtOnce), kGroup32);
        float* const sums = thread_scratch(Use::sums).words((most_panels + 1) * inner);
        float* const total = sums + most_panels * inner;
        for (int64_t j = 0; j < inner; ++j) total[j] = 0.0f;
        for_token_groups<parts()>(tokens, outer, [&](int64_t first, int64_t group) {
            const auto tiles = token_tiles<parts()>(Use::right_operand, group, outer);
            pack_token_tiles(tiles, grad_out.some_rows(first, group));
            const DifferentiateBlocks<T, kTanh> differentiate{
                static_cast<const T*>(a.preactivation) + first * inner,
                static_cast<T*>(a.activation) + first * inner,
                static_cast<T*>(a.grad_preactivation) + first * inner, sums, inner};
            multiply_tiles<T, parts()>(&w_out_t, 1, tiles, differentiate);
            add_rows(sums, tiles.panels(), inner, total);
        });
        for (int64_t j = 0; j < inner; ++j) store1(static_cast<T*>(a.grad_b_in) + j, total[j]);
        sum_rows(grad_out.data, tokens, outer, static_cast<T*>(a.grad_b_out));

        multiply_matrices<parts()>(grad_pre, w_in.transposed(), static_cast<T*>(a.grad_x));
        multiply_matrices<parts()>(grad_pre.transposed(), x.transposed(), static_cast<T*>(a.grad_w_in));
        multiply_matrices<parts()>(grad_out.transposed(), act.transposed(), static_cast<T*>(a.grad_w_out));
    });
}

#endif

template <class T, bool kTanh>
void backward(const GeluFfnBackwardArgs& a) {
    const int64_t tokens = a.tokens, hidden = a.hidden, inner = a.inner, outer = a.outer;
    const Matrix<T> grad_out = row_major(static_cast<const T*>(a.grad_out), tokens, outer);
    const Matrix<T> x = row_major(static_cast<const T*>(a.x), tokens, hidden);
    const Matrix<T> w_in = row_major(static_cast<const T*>(a.w_in), inner, hidden);
    const Matrix<T> w_out = row_major(static_cast<const T*>(a.w_out), outer, inner);
    const T* preactivation = static_cast<const T*>(a.preactivation);
    T* activation = static_cast<T*>(a.activation);
    T* grad_preactivation = static_cast<T*>(a.grad_preactivation);

    // Column sums of the gradient of the pre-activation: one row for each row panel, then the total so far.
    const int64_t step = rows_at_once<T>(outer);
    const int64_t most_panels = ceil_div(step, kRows);
    float* const sums = thread_scratch(Use::sums).words((most_panels + 1) * inner);
    float* const total = sums + most_panels * inner;
    for (int64_t j = 0; j < inner; ++j) total[j] = 0.0f;

    for (int64_t first = 0; first < tokens; first += step) {
        const int64_t count = min64(step, tokens - first);
        const RowPanels panels(count, words_of<T>(outer));
        float* packed_grad = thread_scratch(Use::left_operand).words(count * panels.k_words);
        pack_a(grad_out.some_rows(first, count), panels, packed_grad);
        multiply_packed(panels, packed_grad, w_out.transposed(),
                        [&](int64_t row, int64_t column, int rows, int width, const float* tile) {
                            float* panel_sums = sums + panels.index(row) * inner + column;
                            for (int j = 0; j < width; j += kLanes) {
                                const int left = width - j;
                                vf32 sum = zero();
                                for (int i = 0; i < rows; ++i) {
                                    const int64_t at = (first + row + i) * inner + column + j;
                                    vf32 value;
                                    const vf32 slope =
                                        gelu_grad<kTanh>(load_some(preactivation + at, left), &value);
                                    const vf32 grad = load(tile + i * kColumns + j) * slope;
                                    sum += grad;
                                    store_some(activation + at, value, left);
                                    store_some(grad_preactivation + at, grad, left);
                                }
                                store_some(panel_sums + j, sum, left);
                            }
                        });
        add_rows(sums, panels.count, inner, total);
    }
    T* grad_b_in = static_cast<T*>(a.grad_b_in);
    for (int64_t j = 0; j < inner; ++j) store1(grad_b_in + j, total[j]);
    sum_rows(grad_out.data, tokens, outer, static_cast<T*>(a.grad_b_out));

    const auto store_to = [](void* out, int64_t columns) {
        return StoreTile<T>{static_cast<T*>(out), columns, nullptr};
    };
    const Matrix<T> grad_pre = row_major<T>(grad_preactivation, tokens, inner);
    const Matrix<T> act = row_major<T>(activation, tokens, inner);
    multiply(grad_pre, w_in.transposed(), store_to(a.grad_x, hidden));
    multiply(grad_pre.transposed(), x.transposed(), store_to(a.grad_w_in, hidden));
    multiply(grad_out.transposed(), act.transposed(), store_to(a.grad_w_out, inner));
}

}  // namespace

void gelu_ffn_forward(const GeluFfnForwardArgs& a) {
#if defined(RK_CPU_ISA_AMX)
    return a.tanh ? forward_on_tiles<true>(a) : forward_on_tiles<false>(a);
#else
    if (a.bf16)
        a.tanh ? forward<bf16, true>(a) : forward<bf16, false>(a);
    else
        a.tanh ? forward<float, true>(a) : forward<float, false>(a);
#endif
}

void gelu_ffn_backward(const GeluFfnBackwardArgs& a) {
#if defined(RK_CPU_ISA_AMX)
    // Few tokens in float32: splitting weights that lie across K takes longer than multiplying them.
    if (a.bf16 || a.tokens >= 128) return a.tanh ? backward_on_tiles<true>(a) : backward_on_tiles<false>(a);
#endif
    if (a.bf16)
        a.tanh ? backward<bf16, true>(a) : backward<bf16, false>(a);
    else
        a.tanh ? backward<float, true>(a) : backward<float, false>(a);
}

}  // namespace rk::cpu::RK_CPU_ISA
