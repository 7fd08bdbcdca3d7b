// What the two ways of attention backward on Hopper share: attention_backward_sm90.cu (two kernels) and
// attention_backward_whole_sm90.cu (one).
#pragma once
#include "csrc/cuda/attention_sm90.cuh"

namespace rk::cuda {

// All gradients by one kernel, for calls that attention::in_one_pass_sm90() takes.
void attention_sm90_backward_whole(const AttentionArgs& args);

namespace sm90 {

// In units of log2; +inf, which makes every probability zero, for a row that sees nothing.
__device__ __forceinline__ float lse_of(float lse) {
    return lse == -INFINITY ? INFINITY : lse * kLog2e;
}

// Of two pairs of numbers: the sum of their products.
template <typename T>
__device__ __forceinline__ float product(uint32_t a, uint32_t b) {
    Vector<T, 2> x, y;
    memcpy(&x, &a, sizeof(x));
    memcpy(&y, &b, sizeof(y));
    return fmaf(to_float(x.values[0]), to_float(y.values[0]), to_float(x.values[1]) * to_float(y.values[1]));
}

// A consumer whose tiles are of keys: rows of scores are keys, columns are queries.
template <typename T, class P>
struct KeyRows : Consumer<T, P> {
    using Base = Consumer<T, P>;
    using Base::Base;
    using typename Base::Scores;

    // Which of a thread's two keys are there and not masked.
    __device__ __forceinline__ void seen_keys(bool (&seen)[2], const Unit& unit) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int at = this->row + 8 * r;
            seen[r] = at < unit.rows &&
                      (this->problem.key_mask == nullptr || this->problem.key_mask[unit.first_row + at]);
        }
    }
    // Whether some key of the tile is not seen by some query of the chunk that begins at query `first`, apart
    // from queries past the end, whose log-sum-exp is +inf.
    __device__ __forceinline__ bool some_unseen(const Unit& unit, int first) const {
        return unit.rows < kTile || first < unit.diagonal + kTile - 1 || this->problem.key_mask != nullptr;
    }
    // -inf where a key of the tile is not seen.
    __device__ __forceinline__ void mask_keys(Scores& scores, const Unit& unit, int first,
                                              const bool (&seen)[2]) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int from =
                unit.diagonal + this->row + 8 * r - first - this->column;  // the first that sees it
#pragma unroll
            for (int i = 0; i < 8; ++i)
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    if (!seen[r] || 8 * i + e < from) scores[4 * i + 2 * r + e] = -INFINITY;
        }
    }

    // Bit 4 (4 (i / 4) + 2 e + r) + lane / 4 % 4 of kept[i % 4] tells whether element [4 i + 2 r + e] is
    // kept. A group of 4 keys belongs to four lanes; each draws a quarter of their groups, and all get what
    // the others found.
    __device__ __forceinline__ void kept_queries(uint32_t (&kept)[4], const Unit& unit, int first_key,
                                                 int first_query, const PhiloxKey& key) const {
        const int member = this->lane / 4 % 4;
        uint32_t mine = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const int i = 4 * (j / 4) + member, e = j / 2 % 2, r = j % 2;
            const int group = (first_key + this->row - member + 8 * r) / 4;
            mine |= this->kept_words(key, group, unit.first_other + first_query + 8 * i + this->column + e,
                                     unit.head)
                    << (4 * j);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
            kept[i] = __shfl_sync(kAllLanes, mine, (this->lane & ~12) | i << 2) >> member;
    }
    static __device__ __forceinline__ bool is_kept(const uint32_t (&kept)[4], int i) {
        return kept[i / 4 % 4] >> (4 * (i / 16 * 4 + i % 2 * 2 + i / 2 % 2)) & 1;
    }
};

}  // namespace sm90
}  // namespace rk::cuda
