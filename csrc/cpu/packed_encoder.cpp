// All layers of an encoder in one call, for inference, with weights that were packed beforehand.
//
// The sequences are cut into groups of about a thousand tokens, and each group goes through all layers before
// the next one starts: what a group needs (rows, projections, activations: some 25 MB at H = 768) stays in
// the last-level cache, and the weights are read once a group. Within a group, per layer:
//
//   1. x W_qkv^T + bias, one product for the three projections -> [rows, 3 H]
//   2. attention per (sequence, head), straight from there (attention.cpp) -> [rows, H]
//   3. times W_out^T; its bias, the residual and LayerNorm in one pass over rows that are in cache -> x
//   4. GELU(x W_in^T + bias), in the registers' epilogue, written in the layout that the next product reads
//   5. times W^T; bias, residual and LayerNorm as in 3 -> x
//
// Every sum is taken in an order that depends on K alone: a sequence gives the same bits alone and in any
// batch.
//
// Work: 2 T (4 H^2 + 2 H F) + 4 H sum(length^2) flops a layer; for few tokens reading the weights takes
// longer: (4 H^2 + 2 H F) elements a layer.
#include "csrc/cpu/packed_encoder.h"

#include "csrc/cpu/add_layer_norm.h"
#include "csrc/cpu/attention.h"
#include "csrc/cpu/packed_weight.h"

namespace rk::cpu::RK_CPU_ISA {
namespace {

constexpr int64_t kGroupTokens = 1024;
constexpr int64_t kStepRows = kRows * (1024 / kRows);  // rows of one product
constexpr int64_t kKeepWords = 32 << 20;               // of memory between calls: 128 MB

struct Group {
    int64_t first_sequence, sequences, first_row, rows;
};

struct Buffers {
    float *x, *qkv, *context, *product;     // [rows, H], [rows, 3 H], [rows, H], [rows, H]
    float *lse, *mean, *rstd, *activation;  // [heads, rows], [rows], [rows], [rows of a step, F]
    int32_t* cu_seqlens;                    // [sequences + 1], from 0
};

// f(first, count) for steps of rows, as equal as can be.
template <class F>
void for_steps(int64_t rows, const F& f) {
    const int64_t steps = ceil_div(rows, kStepRows);
    for (int64_t i = 0; i < steps; ++i) f(rows * i / steps, rows * (i + 1) / steps - rows * i / steps);
}

// product = x W^T, and where there is one, a bias.
void multiply_rows(const PackedWeight& w, const float* x, int64_t rows, const float* bias, float* product) {
    for_steps(rows, [&](int64_t first, int64_t count) {
        const LeftOperand left = pack_left(w.kind, x + first * w.columns, count, w.columns, w.columns);
        multiply_weight(w, left, StoreTile<float>{product + first * w.rows, w.rows, bias});
    });
}

// x = layer_norm(x + product + bias)
void add_norm(const PackedEncoder& e, const Buffers& b, int64_t rows, const float* bias, const float* weight,
              const float* norm_bias) {
    AddLayerNormArgs a{};
    a.x = b.product, a.residual = b.x, a.x_bias = bias, a.weight = weight, a.bias = norm_bias;
    a.rows = rows, a.hidden = e.hidden, a.eps = e.eps;
    a.out = b.x;  // a row is read before it is written
    a.mean = b.mean, a.rstd = b.rstd;
    add_layer_norm_forward(a);
}

void attend(const PackedEncoder& e, const Group& g, const Buffers& b) {
    const int64_t inner = e.heads * e.head_dim;
    const auto heads = [&](int64_t part) { return HeadsView{b.qkv + part * inner, 3 * inner, e.head_dim}; };
    AttentionArgs a{};
    a.q = heads(0), a.k = heads(1), a.v = heads(2);
    a.cu_seqlens_q = a.cu_seqlens_k = b.cu_seqlens;
    a.key_mask = e.key_mask == nullptr ? nullptr : e.key_mask + g.first_row;
    a.batch = g.sequences, a.heads = e.heads, a.head_dim = e.head_dim, a.total_q = g.rows;
    a.scale = e.scale, a.causal = e.causal;
    a.out = b.context, a.lse = b.lse;
    attention_forward(a);
}

// product = GELU(x W_in^T + bias) W_out^T
template <bool kTanh>
void feed_forward(const PackedLayer& l, const Buffers& b, int64_t rows) {
    const int64_t hidden = l.in.columns, inner = l.in.rows;
    for_steps(rows, [&](int64_t first, int64_t count) {
        const LeftOperand left = pack_left(l.in.kind, b.x + first * hidden, count, hidden, hidden);
        const RowPanels panels(count, inner);
        const bool rounds = l.out.kind == WeightKind::int8_dynamic;  // a row is rounded when it is complete
        const StoreTile<float> store_activation{b.activation, inner, nullptr};
        multiply_weight(
            l.in, left, [&](int64_t row, int64_t column, int height, int width, const float* tile) {
                alignas(64) float activation[kLanes * kColumns];  // pack_along_k knows of kLanes rows
                for (int j = 0; j < width; j += kLanes) {
                    const vf32 bias = load_some(l.in_bias + column + j, width - j);
                    for (int i = 0; i < height; ++i)
                        store(activation + i * kColumns + j,
                              gelu<kTanh>(load(tile + i * kColumns + j) + bias));
                }
                if (rounds)
                    store_activation(row, column, height, width, activation);
                else
                    pack_along_k(activation, kColumns, height, width,
                                 b.activation + panels.offset(panels.index(row)) + column * height, height,
                                 height);
            });
        const LeftOperand activated = rounds ? pack_left(l.out.kind, b.activation, count, inner, inner)
                                             : LeftOperand{panels, b.activation, nullptr, nullptr};
        multiply_weight(l.out, activated, StoreTile<float>{b.product + first * hidden, hidden, nullptr});
    });
}

template <bool kTanh>
void run(const PackedEncoder& e, const Group& g, const Buffers& b) {
    __builtin_memcpy(b.x, e.x + g.first_row * e.hidden, size_t(g.rows * e.hidden) * 4);
    for (int64_t i = 0; i <= g.sequences; ++i)
        b.cu_seqlens[i] = e.cu_seqlens[g.first_sequence + i] - e.cu_seqlens[g.first_sequence];
    float* const qkv_bias = b.activation;  // free until the feed-forward
    for (int64_t i = 0; i < e.layer_count; ++i) {
        const PackedLayer& l = e.layers[i];
        const float* parts[3] = {l.q_bias, l.k_bias, l.v_bias};
        const int64_t inner = e.heads * e.head_dim;
        for (int part = 0; part < 3; ++part)
            __builtin_memcpy(qkv_bias + part * inner, parts[part], size_t(inner) * 4);
        multiply_rows(l.qkv, b.x, g.rows, qkv_bias, b.qkv);
        attend(e, g, b);
        multiply_rows(l.attention_out, b.context, g.rows, nullptr, b.product);
        add_norm(e, b, g.rows, l.attention_out_bias, l.attention_norm_weight, l.attention_norm_bias);
        feed_forward<kTanh>(l, b, g.rows);
        add_norm(e, b, g.rows, l.out_bias, l.norm_weight, l.norm_bias);
    }
    __builtin_memcpy(e.out + g.first_row * e.hidden, b.x, size_t(g.rows * e.hidden) * 4);
}

// Whole sequences, about as many tokens in each group.
template <class F>
void for_groups(const PackedEncoder& e, const F& f) {
    const int64_t target = ceil_div(e.tokens, max64(1, ceil_div(e.tokens, kGroupTokens)));
    for (int64_t first = 0; first < e.batch;) {
        int64_t last = first + 1;
        while (last < e.batch && e.cu_seqlens[last + 1] - e.cu_seqlens[first] <= target) ++last;
        const int64_t row = e.cu_seqlens[first], rows = e.cu_seqlens[last] - row;
        if (rows > 0) f(Group{first, last - first, row, rows});
        first = last;
    }
}

}  // namespace

void pack_weight(const PackWeight& p) {
    *p.bytes = bytes_of_weight(p.kind, p.rows, p.columns);
    if (p.panels != nullptr) pack_panels(p);
}

void packed_encoder(const PackedEncoder& e) {
    int64_t rows = 0, sequences = 0, inner = 3 * e.heads * e.head_dim;
    for_groups(
        e, [&](const Group& g) { rows = max64(rows, g.rows), sequences = max64(sequences, g.sequences); });
    int64_t activation = inner;
    for (int64_t i = 0; i < e.layer_count; ++i)
        activation = max64(activation, min64(rows, kStepRows) * e.layers[i].in.rows);
    // Each piece starts on a cache line.
    const int64_t sizes[] = {
        rows * e.hidden, rows * inner, rows * inner / 3, rows * e.hidden, e.heads * rows, rows, rows,
        activation,      sequences + 1};
    constexpr int kPieces = sizeof(sizes) / sizeof(sizes[0]);
    int64_t total = 0;
    float* pieces[kPieces];
    for (const int64_t size : sizes) total += ceil_div(size, 16) * 16;
    Scratch once;
    Scratch& scratch = total > kKeepWords ? once : thread_scratch(Use::encoder);
    float* next = scratch.words(total);
    for (int i = 0; i < kPieces; ++i) {
        pieces[i] = next;
        next += ceil_div(sizes[i], 16) * 16;
    }
    const Buffers b{pieces[0], pieces[1], pieces[2],
                    pieces[3], pieces[4], pieces[5],
                    pieces[6], pieces[7], reinterpret_cast<int32_t*>(pieces[8])};
    for_groups(e, [&](const Group& g) { e.tanh ? run<true>(e, g, b) : run<false>(e, g, b); });
}

}  // namespace rk::cpu::RK_CPU_ISA
