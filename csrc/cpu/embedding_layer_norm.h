#pragma once
#include <cstdint>

#include "csrc/cpu/dispatch.h"
#include "csrc/cpu/dropout.h"

namespace rk::cpu {

constexpr int kTables = 3;  // word, position, token type

struct EmbeddingLayerNormArgs {
    const int64_t* ids[kTables];  // [rows] each, all within their tables
    const void* table[kTables];   // [table_rows, hidden]
    int64_t table_rows[kTables];
    const void* weight;  // [hidden]
    const void* bias;    // [hidden]; forward
    int64_t rows, hidden;
    float eps;
    bool bf16;
    Dropout dropout;

    void* out;    // [rows, hidden]; forward
    float* mean;  // [rows]; written by forward, read by backward
    float* rstd;  // [rows]

    const void* grad_out;  // [rows, hidden]; backward
    // Tokens grouped by id: tokens order[t][start[t][i] .. start[t][i + 1]) of table t, ascending, hold its
    // i-th smallest id, unique[t][i].
    const int32_t* order[kTables];
    const int32_t* start[kTables];
    const int32_t* unique[kTables];
    int64_t unique_count[kTables];
    int64_t padding_idx[kTables];  // whose gradient is zero; -1: none
    void* grad_table[kTables];     // [table_rows, hidden]
    float* grad_sum;               // [rows, hidden] scratch: gradient of the sum of the three rows
    void* grad_weight;             // [hidden]
    void* grad_bias;               // [hidden]
};

}  // namespace rk::cpu

RK_DECLARE_ENTRY(embedding_layer_norm_forward, EmbeddingLayerNormArgs)
RK_DECLARE_ENTRY(embedding_layer_norm_backward, EmbeddingLayerNormArgs)
