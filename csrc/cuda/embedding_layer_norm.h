// embedding_layer_norm as its kernels see it: filled in by embedding_layer_norm_binding.cpp. Plain C++.
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

#include "csrc/cuda/dropout.h"
#include "csrc/cuda/dtype.h"

namespace rk::cuda {

constexpr int kTables = 3;  // word, position, token type
constexpr int kRun = 32;    // entries of the sorted ids that one warp adds up

// All contiguous, but for the ids at addresses that are multiples of 16 bytes.
struct EmbeddingLayerNormArgs {
    const int64_t* ids[kTables];  // [rows] each
    const void* table[kTables];   // [table_rows[t], hidden] each
    int64_t table_rows[kTables];
    const void* weight;    // [hidden]
    const void* bias;      // [hidden]; forward
    int64_t rows, hidden;  // rows: tokens
    float eps;
    Dtype dtype;
    Dropout dropout;
    cudaStream_t stream;

    void* out;    // [rows, hidden]; forward
    float* mean;  // [rows]; written by forward, read by backward
    float* rstd;  // [rows]

    const void* grad_out;          // [rows, hidden]; backward
    int64_t padding_idx[kTables];  // the row of the table that gets no gradient; -1: none
    void* grad_table[kTables];     // [table_rows[t], hidden]; zeros when backward is called
    void* grad_weight;             // [hidden]
    void* grad_bias;               // [hidden]

    // Scratch of backward. entries = sorted_tables(args) * rows: an entry is a token's id for one of the
    // tables, as a row of the tables laid end to end.
    void* keys;               // [entries], 16 or 32 bits: written by embedding_layer_norm_keys
    const void* sorted_keys;  // [entries]: keys, sorted
    const int64_t* order;     // [entries]: the entry that each of them is, increasing among equal keys
    float* grad_sum;          // [rows, hidden]: the gradient of what is normalised
    float* partials;          // embedding_layer_norm_partials(args) floats
    float* pieces;            // embedding_layer_norm_pieces(args) floats
};

// A token-type table of one row, RoBERTa's usual one, needs no sorting: every token has it.
inline int sorted_tables(const EmbeddingLayerNormArgs& args) {
    return args.table_rows[2] == 1 ? 2 : 3;
}

// Whether keys, of which one stands behind all rows, fit in 16 bits: torch's radix sort goes over the bits that a key
// has, so half as often. RoBERTa's and BERT's tables are that small, XLM-RoBERTa's is not.
inline bool embedding_layer_norm_narrow_keys(const EmbeddingLayerNormArgs& args) {
    return args.table_rows[0] + args.table_rows[1] + args.table_rows[2] <= UINT16_MAX;
}

void embedding_layer_norm_forward(const EmbeddingLayerNormArgs& args);
// Two steps, between which the binding sorts the keys.
void embedding_layer_norm_keys(const EmbeddingLayerNormArgs& args);
void embedding_layer_norm_backward(const EmbeddingLayerNormArgs& args);
int64_t embedding_layer_norm_partials(const EmbeddingLayerNormArgs& args);
int64_t embedding_layer_norm_pieces(const EmbeddingLayerNormArgs& args);

}  // namespace rk::cuda
