// Arguments of the linear_log1p_max kernels. All tensors are contiguous, and of one dtype where nothing else is said.
// T: rows, B: sequences, H: hidden size, V: words of the vocabulary.
#pragma once
#include "csrc/cpu/dispatch.h"

namespace rk::cpu {

struct LinearLog1pMaxArgs {
    int64_t rows, sequences, hidden, words;  // T, B, H, V
    int64_t rows_at_once, words_at_once;     // of a block of logits
    bool bf16;
    const void* x;       // [T, H]
    const void* weight;  // [V, H]
    const void* bias;    // [V], or null

    const int32_t* cu_seqlens;  // [B + 1]; forward
    float* logits;              // [rows_at_once, logits_stride(words_at_once)] scratch; forward
    float* out;                 // [B, V]: written by forward, read by backward
    int32_t* top_rows;          // [B, V]: of x, the row that out comes from, or -1; likewise

    const float* grad_out;  // [B, V]; backward
    float* slopes;          // [B, V] scratch: the gradient of the logit that out comes from
    float* grad_sum;        // [2, T, H] scratch
    void* grad_x;           // [T, H]
    void* grad_weight;      // [V, H], or null
    void* grad_bias;        // [V], or null
};

// Rows of logits are walked down their columns: one behind the other by a power of two they would all meet in a few lines
// of the first-level cache.
constexpr int64_t logits_stride(int64_t words) {
    return words + 16;
}

}  // namespace rk::cpu

RK_DECLARE_ENTRY(linear_log1p_max_forward, LinearLog1pMaxArgs)
RK_DECLARE_ENTRY(linear_log1p_max_backward, LinearLog1pMaxArgs)
