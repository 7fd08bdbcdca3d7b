// Arguments of an encoder's inference in one call. T: tokens, H: hidden size, F: feed-forward size, E: the
// elements of hidden states and vectors, float or bf16. A weight is whatever the products that read it take
// (encoder_layers.h).
#pragma once
#include <cstdint>

#include "csrc/cpu/dispatch.h"

namespace rk::cpu {

// A parameter where it lies: [rows, columns] elements, unit stride along columns. Nothing past a row's last
// element is read.
struct Weight {
    const void* data;
    int64_t rows, columns, row_stride;  // stride in elements
};

// One layer. The order is that of the ops' arguments `layers`.
template <class W>
struct EncoderLayer {
    W qkv[3];  // query, key, value: [heads * head_dim, H] each; packed kinds keep all three in the first
    const void* qkv_bias[3];                                                       // [heads * head_dim]
    W attention_out;                                                               // [H, heads * head_dim]
    const void *attention_out_bias, *attention_norm_weight, *attention_norm_bias;  // [H]
    W in;                                                                          // [F, H]
    const void* in_bias;                                                           // [F]
    W out;                                                                         // [H, F]
    const void *out_bias, *norm_weight, *norm_bias;                                // [H]
};

template <class W>
struct EncoderArgs {
    const void* x;  // [T, H]
    void* out;      // [T, H]
    int64_t tokens, hidden, heads, head_dim;
    const EncoderLayer<W>* layers;
    int64_t layer_count;
    const int32_t* cu_seqlens;  // [batch + 1]
    int64_t batch;
    const bool* key_mask;  // [T], true = may be seen; or null
    const void* bias;      // [heads, bias_rows, bias_columns] elements, added to all layers' scores; or null
    int64_t bias_rows, bias_columns;
    bool causal, tanh, bf16;
    float scale, eps;
};

using EncoderInPlaceArgs = EncoderArgs<Weight>;

}  // namespace rk::cpu

RK_DECLARE_ENTRY(encoder, EncoderInPlaceArgs)
