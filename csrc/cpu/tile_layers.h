// What the layers multiply, on tiles: projections of rows, and the feed-forward block, for float32 (as one, two or three
// bfloat16 parts) and bfloat16.
//
// Feed-forward: GELU works on a block of C^T whose rows are elements along K of the next product, two neighbours of which
// make a word of its right operand: so the activation goes from the tile's sums through GELU into the next product's
// tiles without being transposed, and never exists as a tensor. 32 of its elements for 32 tokens, one step, at a time.
//
// Tokens are taken in groups, so that what is packed of them (6 bytes an element in three parts: 512 tokens at F = 3072
// are 9 MB) comes back from the last-level cache for every block of weight rows. Each group reads and splits the weights
// once.
#pragma once
#include "csrc/cpu/encoder.h"
#include "csrc/cpu/tile_products.h"

namespace rk::cpu::RK_CPU_ISA {

constexpr int64_t kTokensAtOnce = 1024;
constexpr int64_t kPackedAtOnce = 10 << 20;  // bytes

// The number of parts of a call, as a constant.
template <int kParts>
struct Parts {
    constexpr int operator()() const { return kParts; }
};
// f(Parts, element) for what a call of this dtype multiplies, under the precision in force.
template <class F>
inline void on_parts(bool is_bf16, const F& f) {
    if (is_bf16) return f(Parts<1>{}, bf16{});
    switch (float32_parts()) {
        case 1:
            return f(Parts<1>{}, float{});
        case 2:
            return f(Parts<2>{}, float{});
        default:
            return f(Parts<3>{}, float{});
    }
}

// f(first, count) for groups of tokens, as equal as can be; k_size: the largest number of elements packed of each.
template <int kParts, class F>
inline void for_token_groups(int64_t tokens, int64_t k_size, const F& f) {
    const int64_t fitting = kPackedAtOnce / TileLayout<kParts>(k_size).bytes() * kGroup32;
    const int64_t groups = ceil_div(tokens, max64(kGroup32, min64(kTokensAtOnce, fitting)));
    for (int64_t i = 0; i < groups; ++i) {
        const int64_t first = tokens * i / groups;
        f(first, tokens * (i + 1) / groups - first);
    }
}

// out[token] = x[token] (W_0 | W_1 | W_2)^T + biases.  x: [tokens, K], out: [tokens, sum of rows]
template <int kParts, class T>
inline void project_rows(const Weight* weights, const T* const* biases, int count, const T* x, int64_t tokens,
                         T* out) {
    const int64_t k_size = weights[0].columns;
    StoreBlocks<T> store{out, 0, {}, {}};
    for (int i = 0; i < count; ++i) {
        store.first[i] = store.stride;
        store.bias[i] = biases[i];
        store.stride += weights[i].rows;
    }
    for_token_groups<kParts>(tokens, k_size, [&](int64_t first, int64_t group) {
        const auto tiles = token_tiles<kParts>(Use::right_operand, group, k_size);
        pack_token_tiles(tiles, row_major(x + first * k_size, group, k_size));
        StoreBlocks<T> store_group = store;
        store_group.out += first * store.stride;
        multiply_tiles<T, kParts>(weights, count, tiles, store_group);
    });
}

// out = a b^T, contiguous; rows of either may lie across K.  a: [M, K], b: [N, K], out: [M, N]
template <int kParts, class T>
inline void multiply_matrices(const Matrix<T>& a, const Matrix<T>& b, T* out) {
    for_token_groups<kParts>(a.rows, a.columns, [&](int64_t first, int64_t group) {
        const auto tiles = token_tiles<kParts>(Use::right_operand, group, a.columns);
        pack_token_tiles(tiles, a.some_rows(first, group));
        multiply_tiles<T, kParts>(&b, 1, tiles, StoreBlocks<T>{out + first * b.rows, b.rows, {0}, {nullptr}});
    });
}

// Bias and GELU, into the tiles of the next product; and what GELU is applied to, if wanted.
template <class T, int kParts, bool kTanh>
struct ActivateBlocks {
    const T* bias;  // [F]
    const TokenTiles<kParts>& activation;
    T* preactivation;  // [tokens, F], or null
    int64_t inner;
    WriteAhead ahead(int, int64_t row, int64_t token, int) const {
        return {activation.step(token / kGroup32, row / kStepElements), 128,
                int(activation.layout.step_bytes / 128)};
    }
    void operator()(int, int64_t row, int64_t token, int rows, int tokens, const float* block) const {
        if (preactivation != nullptr)
            store_block(block, rows, tokens, bias + row, preactivation + token * inner + row, inner);
        activate_block<T, kParts, kTanh>(block, rows, bias + row, activation, row / kStepElements,
                                         token / kGroup32);
    }
};

// From the gradient of the activation and the pre-activation: the activation and the gradient of the pre-activation,
// [tokens, F], and sums over up to 32 tokens of the latter, [panels, F].
template <class T, bool kTanh>
struct DifferentiateBlocks {
    const T* preactivation;
    T *activation, *grad_preactivation;
    float* sums;
    int64_t inner;
    WriteAhead ahead(int, int64_t row, int64_t token, int tokens) const {
        char* const at = reinterpret_cast<char*>(grad_preactivation + token * inner + row);
        const auto from_there = [&](const T* other) {
            return reinterpret_cast<intptr_t>(other) - reinterpret_cast<intptr_t>(grad_preactivation);
        };
        return {at, inner * int64_t(sizeof(T)), tokens, {from_there(activation), from_there(preactivation)}};
    }
    void operator()(int, int64_t first_row, int64_t first_token, int rows, int tokens,
                    const float* block) const {
        for (int row = 0; row < rows; row += kLanes) {
            const int width = int(min64(kLanes, rows - row));
            vf32 sum = zero();
            for (int token = 0; token < tokens; token += kLanes) {
                vf32 square[kLanes];
                for (int r = 0; r < kLanes; ++r)
                    square[r] = load(block_row(block, row + r, token / kTileSide) + token % kTileSide);
                transpose(square);
                for (int t = 0; t < min64(kLanes, tokens - token); ++t) {
                    const int64_t at = (first_token + token + t) * inner + first_row + row;
                    vf32 value;
                    const vf32 slope = gelu_grad<kTanh>(load_some(preactivation + at, width), &value);
                    const vf32 grad = square[t] * slope;
                    sum += grad;
                    store_some(activation + at, value, width);
                    store_some(grad_preactivation + at, grad, width);
                }
            }
            store_some(sums + first_token / kGroup32 * inner + first_row + row, sum, width);
        }
    }
};

template <class T>
struct FeedForward {
    Weight in, out;               // [F, H], [O, F]
    const T *in_bias, *out_bias;  // [F]; [O], or null
    const T* x;                   // [tokens, H]
    T* result;                    // [tokens, O]
    T* preactivation;             // [tokens, F], or null
    int64_t tokens;
};

// result = gelu(x W_in^T + in_bias) W_out^T + out_bias
template <int kParts, bool kTanh, class T>
inline void feed_forward(const FeedForward<T>& f) {
    const int64_t hidden = f.in.columns, inner = f.in.rows, outer = f.out.rows;
    for_token_groups<kParts>(f.tokens, max64(hidden, inner), [&](int64_t first, int64_t group) {
        const auto tiles = token_tiles<kParts>(Use::right_operand, group, hidden);
        const auto activation = token_tiles<kParts>(Use::activation, group, inner);
        pack_token_tiles(tiles, row_major(f.x + first * hidden, group, hidden));
        if (inner == 0) pack_token_tiles(activation, row_major(f.x, group, 0));
        T* const preactivation = f.preactivation == nullptr ? nullptr : f.preactivation + first * inner;
        multiply_tiles<T, kParts>(
            &f.in, 1, tiles, ActivateBlocks<T, kParts, kTanh>{f.in_bias, activation, preactivation, inner});
        multiply_tiles<T, kParts>(&f.out, 1, activation,
                                  StoreBlocks<T>{f.result + first * outer, outer, {0}, {f.out_bias}});
    });
}

// The products of an encoder's layers (encoder_layers.h) on tiles.
template <class T, int kParts>
struct TileProducts {
    using Element = T;
    using Weight = rk::cpu::Weight;

    void qkv(const EncoderLayer<Weight>& l, const T* x, int64_t rows, T* out) const {
        const T* const biases[3] = {static_cast<const T*>(l.qkv_bias[0]),
                                    static_cast<const T*>(l.qkv_bias[1]),
                                    static_cast<const T*>(l.qkv_bias[2])};
        project_rows<kParts>(l.qkv, biases, 3, x, rows, out);
    }
    void attention_out(const EncoderLayer<Weight>& l, const T* context, int64_t rows, T* out) const {
        const T* const none = nullptr;
        project_rows<kParts>(&l.attention_out, &none, 1, context, rows, out);
    }
    template <bool kTanh>
    void feed_forward(const EncoderLayer<Weight>& l, const T* x, int64_t rows, T* out) const {
        rk::cpu::RK_CPU_ISA::feed_forward<kParts, kTanh>(
            FeedForward<T>{l.in, l.out, static_cast<const T*>(l.in_bias), nullptr, x, out, nullptr, rows});
    }
};

}  // namespace rk::cpu::RK_CPU_ISA
