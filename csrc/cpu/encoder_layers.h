// All layers of an encoder in one call, for inference; what multiplies, and from what kind of weight, is a
// parameter.
//
// The sequences are cut into groups of about a thousand tokens, and each group goes through all layers before
// the next one starts: what a group needs (rows, projections, activations: some 25 MB at H = 768) stays in
// the last-level cache, and the weights are read once a group. Within a group, per layer:
//
//   1. x (W_q | W_k | W_v)^T + bias, one product for the three projections -> [rows, 3 heads head_dim]
//   2. attention per (sequence, head), straight from there (attention.cpp) -> [rows, heads head_dim]
//   3. times W_out^T; its bias, the residual and LayerNorm in one pass over rows that are in cache -> x
//   4. GELU(x W_in^T + bias), in the product's epilogue, written in the layout that the next product reads
//   5. times W^T; bias, residual and LayerNorm as in 3 -> x
//
// Work: 2 T (4 H^2 + 2 H F) + 4 H sum(length^2) flops a layer; for few tokens reading the weights takes
// longer: (4 H^2 + 2 H F) elements a layer.
//
// Steps 1, 3 and 4-5 are the products, a class like this:
//
//   struct Products {
//       using Element = float;  // or bf16: of x, out and biases, and of all that is in memory between steps
//       using Weight = ...;     // EncoderLayer<Weight>
//
//       // out[r] = x[r] (W_q | W_k | W_v)^T + biases.  x: [rows, H], out: [rows, 3 heads head_dim]
//       void qkv(const EncoderLayer<Weight>&, const Element* x, int64_t rows, Element* out) const;
//
//       // out[r] = context[r] W_out^T, without the bias.  context: [rows, heads head_dim], out: [rows, H]
//       void attention_out(const EncoderLayer<Weight>&, const Element* context, int64_t rows,
//                          Element* out) const;
//
//       // out[r] = gelu(x[r] W_in^T + in_bias) W^T, without the bias of the second.  x, out: [rows, H]
//       template <bool kTanh>
//       void feed_forward(const EncoderLayer<Weight>&, const Element* x, int64_t rows, Element* out) const;
//   };
//
// Rows are contiguous. A product runs its own parallel region, keeps its memory in thread_scratch, and must
// take every sum in an order that depends on K alone, not on `rows`, the row's place or the number of
// threads: the same sequence then gives the same bits alone and in any batch.
#pragma once
#include "csrc/cpu/add_layer_norm.h"
#include "csrc/cpu/attention.h"
#include "csrc/cpu/encoder.h"
#include "csrc/cpu/scratch.h"
#include "csrc/cpu/simd.h"
#include "csrc/cpu/util.h"

namespace rk::cpu::RK_CPU_ISA {

constexpr int64_t kGroupTokens = 1024;
constexpr int64_t kKeepBytes = 128 << 20;  // of memory between calls

template <class T>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<bf16> = true;

struct SequenceGroup {
    int64_t first_sequence, sequences, first_row, rows;
};

// What lies in memory between the steps of a layer.
template <class T>
struct LayerBuffers {
    T *x, *qkv, *context, *product;  // [rows, H], [rows, 3 heads head_dim], [rows, heads head_dim], [rows, H]
    float *lse, *mean, *rstd;        // [heads, rows], [rows], [rows]
    int32_t* cu_seqlens;             // [sequences + 1], from 0
};

template <class Products>
class EncoderRun {
  public:
    using T = typename Products::Element;
    using W = typename Products::Weight;
    EncoderRun(const EncoderArgs<W>& args, const Products& products) : e_(args), products_(products) {}

    void run() {
        int64_t rows = 0, sequences = 0;
        for_groups([&](const SequenceGroup& g) {
            rows = max64(rows, g.rows), sequences = max64(sequences, g.sequences);
        });
        const int64_t inner = e_.heads * e_.head_dim;
        const int64_t elements = rows * (2 * e_.hidden + 4 * inner), floats = rows * (e_.heads + 2);
        const int64_t bytes = elements * int64_t(sizeof(T)) + 4 * (floats + sequences + 1);
        Scratch once;
        Scratch& memory = bytes > kKeepBytes ? once : thread_scratch(Use::encoder);
        memory.reset(size_t(bytes), 8);
        b_.x = memory.take<T>(rows * e_.hidden);
        b_.qkv = memory.take<T>(rows * 3 * inner);
        b_.context = memory.take<T>(rows * inner);
        b_.product = memory.take<T>(rows * e_.hidden);
        b_.lse = memory.take<float>(rows * e_.heads);
        b_.mean = memory.take<float>(rows);
        b_.rstd = memory.take<float>(rows);
        b_.cu_seqlens = memory.take<int32_t>(sequences + 1);
        for_groups([&](const SequenceGroup& g) { e_.tanh ? group<true>(g) : group<false>(g); });
    }

  private:
    // Whole sequences, about as many tokens in each group.
    template <class F>
    void for_groups(const F& f) const {
        const int64_t target = ceil_div(e_.tokens, max64(1, ceil_div(e_.tokens, kGroupTokens)));
        for (int64_t first = 0; first < e_.batch;) {
            int64_t last = first + 1;
            while (last < e_.batch && e_.cu_seqlens[last + 1] - e_.cu_seqlens[first] <= target) ++last;
            const int64_t row = e_.cu_seqlens[first], rows = e_.cu_seqlens[last] - row;
            if (rows > 0) f(SequenceGroup{first, last - first, row, rows});
            first = last;
        }
    }

    template <bool kTanh>
    void group(const SequenceGroup& g) const {
        const int64_t first = g.first_row * e_.hidden, bytes = g.rows * e_.hidden * int64_t(sizeof(T));
        __builtin_memcpy(b_.x, static_cast<const T*>(e_.x) + first, size_t(bytes));
        for (int64_t i = 0; i <= g.sequences; ++i)
            b_.cu_seqlens[i] = e_.cu_seqlens[g.first_sequence + i] - e_.cu_seqlens[g.first_sequence];
        for (int64_t i = 0; i < e_.layer_count; ++i) {
            const EncoderLayer<W>& l = e_.layers[i];
            products_.qkv(l, b_.x, g.rows, b_.qkv);
            attend(g);
            products_.attention_out(l, b_.context, g.rows, b_.product);
            add_norm(g.rows, l.attention_out_bias, l.attention_norm_weight, l.attention_norm_bias);
            products_.template feed_forward<kTanh>(l, b_.x, g.rows, b_.product);
            add_norm(g.rows, l.out_bias, l.norm_weight, l.norm_bias);
        }
        __builtin_memcpy(static_cast<T*>(e_.out) + first, b_.x, size_t(bytes));
    }

    void attend(const SequenceGroup& g) const {
        const int64_t inner = e_.heads * e_.head_dim;
        const auto part = [&](int64_t i) { return HeadsView{b_.qkv + i * inner, 3 * inner, e_.head_dim}; };
        AttentionArgs a{};
        a.q = part(0), a.k = part(1), a.v = part(2);
        a.cu_seqlens_q = a.cu_seqlens_k = b_.cu_seqlens;
        a.key_mask = e_.key_mask == nullptr ? nullptr : e_.key_mask + g.first_row;
        a.bias = e_.bias, a.bias_rows = e_.bias_rows, a.bias_columns = e_.bias_columns;
        a.batch = g.sequences, a.heads = e_.heads, a.head_dim = e_.head_dim, a.total_q = g.rows;
        a.scale = e_.scale, a.causal = e_.causal, a.bf16 = kIsBf16<T>;
        a.out = b_.context, a.lse = b_.lse;
        attention_forward(a);
    }

    // x = layer_norm(x + product + bias)
    void add_norm(int64_t rows, const void* bias, const void* weight, const void* norm_bias) const {
        AddLayerNormArgs a{};
        a.x = b_.product, a.residual = b_.x, a.x_bias = bias, a.weight = weight, a.bias = norm_bias;
        a.rows = rows, a.hidden = e_.hidden, a.eps = e_.eps, a.bf16 = kIsBf16<T>;
        a.out = b_.x;  // a row is read before it is written
        a.mean = b_.mean, a.rstd = b_.rstd;
        add_layer_norm_forward(a);
    }

    const EncoderArgs<W>& e_;
    const Products& products_;
    LayerBuffers<T> b_{};
};

template <class Products>
inline void run_encoder(const EncoderArgs<typename Products::Weight>& args, const Products& products) {
    EncoderRun<Products>(args, products).run();
}

}  // namespace rk::cpu::RK_CPU_ISA
