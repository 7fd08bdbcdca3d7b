// Arguments of the inference path: weights packed once, and all layers of an encoder in one call. float32
// hidden states; T: tokens, H: hidden size, F: feed-forward size, N and K: rows and columns of a weight.
#pragma once
#include <cstdint>

#include "csrc/cpu/dispatch.h"

namespace rk::cpu {

// What a weight is kept as. float32, bfloat16 and int8 are multiplied with float32 rows, in float32;
// int8_dynamic with rows that are rounded to whole numbers in the call, in whole numbers.
enum class WeightKind : int32_t { float32, bfloat16, int8, int8_dynamic };
constexpr const char* kWeightKinds[] = {"float32", "bfloat16", "int8", "int8-dynamic"};
constexpr int kWeightKindCount = 4;

// A packed weight in memory starts with this; the layout of what follows is the instruction set's own.
struct PackedHeader {
    uint64_t magic;
    int32_t kind, isa;
    int64_t rows, columns;  // of the weight: N, K
    int64_t panels_at;      // bytes from the start of the header
};
constexpr uint64_t kPackedMagic = 0x314b43415052524bull;

struct PackWeight {
    const float* weight;  // [N, K], contiguous
    int64_t rows, columns;
    WeightKind kind;
    char* panels;    // written, unless null
    int64_t* bytes;  // of `panels`; written
};

struct PackedWeight {
    const char* panels;
    int64_t rows, columns;
    WeightKind kind;
};

struct PackedLayer {
    PackedWeight qkv, attention_out, in, out;  // [3 H, H], [H, H], [F, H], [H, F]
    const float *q_bias, *k_bias, *v_bias;     // [H]
    const float *attention_out_bias, *attention_norm_weight, *attention_norm_bias;  // [H]
    const float* in_bias;                                                           // [F]
    const float *out_bias, *norm_weight, *norm_bias;                                // [H]
};

struct PackedEncoder {
    const float* x;  // [T, H]
    float* out;      // [T, H]
    int64_t tokens, hidden, heads, head_dim;
    const PackedLayer* layers;
    int64_t layer_count;
    const int32_t* cu_seqlens;  // [batch + 1]
    int64_t batch;
    const bool* key_mask;  // [T], true = may be seen; or null
    bool causal, tanh;
    float scale, eps;
};

}  // namespace rk::cpu

RK_DECLARE_ENTRY(pack_weight, PackWeight)
RK_DECLARE_ENTRY(packed_encoder, PackedEncoder)
