// Arguments of the linear_cross_entropy kernels. All tensors are contiguous, and of one dtype where nothing else is said.
// T: rows, H: hidden size, V: words of the vocabulary.
#pragma once
#include "csrc/cpu/dispatch.h"

namespace rk::cpu {

struct LinearCrossEntropyArgs {
    int64_t rows, hidden, words;  // T, H, V
    int64_t words_at_once;        // a chunk of the vocabulary
    bool bf16;
    const void* x;          // [T, H]
    const void* weight;     // [V, H]
    const void* bias;       // [V], or null
    const int64_t* labels;  // [T], of the vocabulary or ignore_index
    int64_t ignore_index;

    float* largest;  // [T]: the largest logit; written by forward, read by backward
    float* log_sum;  // [T]: log(sum(exp(logit - largest))), likewise

    float* loss;      // [T]; forward
    float* partials;  // [2, tiles of words_at_once, T] scratch; forward

    const float* grad_loss;  // [T]; backward
    void* grad_logits;       // [T, words_at_once] scratch
    float* grad_sum;         // [T, H] scratch: grad_x so far
    void* grad_x;            // [T, H]
    void* grad_weight;       // [V, H], or null
    void* grad_bias;         // [V], or null
};

}  // namespace rk::cpu

RK_DECLARE_ENTRY(linear_cross_entropy_forward, LinearCrossEntropyArgs)
RK_DECLARE_ENTRY(linear_cross_entropy_backward, LinearCrossEntropyArgs)
