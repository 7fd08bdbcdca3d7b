// Attention forward over packed sequences: out = softmax(scale * q kᵀ) v and the log-sum-exp, in one kernel
// (FlashAttention-2, Dao 2023, algorithm 1, with the sequences of RoBERTa in mind: 16 to 512 tokens).
//
// Idea. A warp owns 16 or 32 queries of one head. Their output, running maximum and row sum stay in
// registers; so do their scores, which go from one mma.sync straight into the next as its left operand. Keys
// and values come by cp.async into a ring of tiles of 64 (float32: 32). A sequence whose tiles all fit in the
// ring is copied once, every tile a copy group of its own, so that the first product waits for the first tile
// only; the block then walks its query tiles over what lies there, with no barrier any more. A longer one
// streams through, the next tiles on their way while this one is multiplied, one barrier a tile. Scores are
// exponentiated by exp2 with log2(e) folded into the scale. The output is rescaled only when a tile moves the
// maximum of some row of the warp: never for a sequence of one tile, seldom after the second.
//
// Masks cost where they bite: a tile that all queries see in full runs without any; key_mask is read once a
// tile and warp as 32-bit votes, and a tile of masked keys (the padding of a padded batch), or beyond the
// causal diagonal, is skipped. Dropout draws each Philox group of four keys once, two lanes sharing the work
// of two rows.
//
// Work. 4 * len_q * len_k * head_dim flops and len_q * len_k exponentials a head; q, k and v are read, out
// and the log-sum-exp written once: 8 * head_dim + 4 bytes a token and head in 16 bits. That is len / 2 flops
// a byte: on an H200 (4.3 TB/s, 790 TFLOP/s) memory is the floor below some 370 tokens, 5.9 us for 32 x 128
// tokens of roberta-base, 33 us of products for 32 x 512. mma.m16n8k16 wants 256 bytes of right operand from
// shared memory for each 16 rows, all that 128 bytes a clock give at an A100's full rate: hence 32 rows a
// warp where there is enough work.
//
// Schedule. One-dimensional grid of (query split, sequence, head), split slowest and last split first: the
// splits that only long sequences have start first. How many splits, warps and tiles of room: plan_forward in
// attention_plan.h.
#include "csrc/cuda/attention_common.cuh"
#include "csrc/cuda/attention_plan.h"

namespace rk::cuda {
namespace attention {
namespace {

// A block's share of the rows that belong to no sequence. All is found again from the block's number, which the compiler
// may not know to be the same: kept through the kernel it would take registers that there are not.
template <typename T>
__device__ inline void clear_rest(const AttentionArgs& a, int64_t first_work, int splits) {
    unsigned block = blockIdx.x;
    asm volatile("" : "+r"(block));
    const int64_t work = first_work + block, pairs = a.batch * a.heads;
    const int split = splits - 1 - static_cast<int>(work / pairs);
    const int head = static_cast<int>(work % pairs % a.heads);
    const Sequence s = sequence(a, work % pairs / a.heads);
    const int from = s.start_q + s.len_q, threads = static_cast<int>(blockDim.x);
    clear_rows<T>(a, a.out, from, s.end_q, head, split, splits);
    for (int row = from + split * threads + static_cast<int>(threadIdx.x); row < s.end_q;
         row += splits * threads)
        a.lse[head * a.total_q + row] = negative_infinity();
}

// As many blocks of a multiprocessor as have registers for it without spilling.
template <typename T, int D, int Groups, bool HasDropout>
constexpr int kForwardBlocks =
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
    kOnTensorCores<T> && Groups == 1 && D <= 64 && !HasDropout ? 3 : 2;
#else
    kOnTensorCores<T> && Groups == 1 && D <= 64 ? 3 : 2;
#endif

template <typename T, int D, int Groups, bool HasDropout>
__global__ void __launch_bounds__(kMostForwardThreads, kForwardBlocks<T, D, Groups, HasDropout>)
    attention_forward_kernel(const AttentionArgs a, const int64_t first_work, const int splits,
                             const int slots) {
    constexpr int kKeys = kOnTensorCores<T> ? 64 : 32;
    constexpr int kRows = 16 * Groups;
    const int lane = lane_index(), g = lane / 4, t = lane % 4, warp = warp_index();
    const int block_rows = static_cast<int>(blockDim.x) / kWarp * kRows;
    const int head_dim = static_cast<int>(a.head_dim);

    T* queries = reinterpret_cast<T*>(shared_memory()) + warp * kRows * kStride<T, D>;  // this warp's
    TileRing<T, D, kKeys> ring;
    ring.memory = reinterpret_cast<T*>(shared_memory()) + block_rows * kStride<T, D>;
    ring.statistics_memory = nullptr;
    ring.statistics = nullptr;
    ring.first_stride = a.k.token_stride;
    ring.second_stride = a.v.token_stride;
    ring.head_dim = head_dim;
    ring.slots = slots;

    // Rows are compared by their largest score before the scale is applied, which takes a scale above zero:
    // the sign, or a scale of zero, goes to the scores.
    const float sign = a.scale < 0.0f ? -1.0f : a.scale > 0.0f ? 1.0f : 0.0f;
    const float score_scale = a.scale == 0.0f ? 1.0f : fabsf(a.scale) * kLog2e;
    PhiloxKey key{};
    if constexpr (HasDropout) key = philox_key(a.dropout);

    const int64_t work = first_work + blockIdx.x, pairs = a.batch * a.heads;
    const int split = splits - 1 - static_cast<int>(work / pairs);
    const int head = static_cast<int>(work % pairs % a.heads);
    const Sequence s = sequence(a, work % pairs / a.heads);
    ring.first = row_of<T>(a.k, s.start_k, head);
    ring.second = row_of<T>(a.v, s.start_k, head);
    ring.length = s.len_k;
    const int key_tiles = ring.tiles(s.len_k);
    const bool stays = key_tiles <= slots;
    const int query_tiles = (s.len_q + block_rows - 1) / block_rows;

    for (int tile = split; tile < query_tiles; tile += splits) {
        const int first = tile * block_rows + warp * kRows;
        const int tiles = ring.tiles(end_of_keys(s, static_cast<int64_t>(tile + 1) * block_rows, a.causal));
        const bool copies = tile == split || !stays;
        __syncwarp();  // the queries before have been read
        copy_rows<T, D>(queries, row_of<T>(a.q, s.start_q, head), a.q.token_stride, first, s.len_q, kRows,
                        head_dim, lane, kWarp);
        ptx::copy_async_commit();
        if (copies) {
            if (tile != split) {
                wait_for_all_but(1);
                __syncthreads();  // all warps have left the tiles of the last pass
            }
            ring.start(0, stays ? key_tiles : tiles);
        }
        wait_for_all_but(copies ? ring.issued : 0);
        __syncwarp();
        LeftOperand<T, D, Groups, kOnTensorCores<T>> q;
        q.load(queries);

        float out[Groups][D / 8][4], row_max[Groups][2], row_sum[Groups][2];
        set_zero(out);
#pragma unroll
        for (int group = 0; group < Groups; ++group)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                row_max[group][half] = negative_infinity();  // in base 2, scaled
                row_sum[group][half] = 0.0f;                 // of this lane's columns
            }

        for (int j = 0; j < tiles; ++j) {
            ring.wait_for(j);
            const int first_key = j * kKeys;
            if (first >= s.len_q || (a.causal && first_key > first + kRows - 1 + s.shift)) continue;
            const bool diagonal = a.causal && first_key + kKeys - 1 > first + s.shift;
            bool masked = diagonal;
            uint32_t seen[kKeys / 32];
            if (first_key + kKeys > s.len_k || a.key_mask != nullptr) {
                uint32_t any = 0, all = ~0u;
#pragma unroll
                for (int i = 0; i < kKeys / 32; ++i) {
                    seen[i] = seen_keys(a.key_mask, s, first_key + 32 * i);
                    any |= seen[i];
                    all &= seen[i];
                }
                if (any == 0) continue;
                masked = masked || all != ~0u;
            } else {
#pragma unroll
                for (int i = 0; i < kKeys / 32; ++i) seen[i] = ~0u;
            }

            float scores[Groups][kKeys / 8][4];
            set_zero(scores);
            multiply_by_rows<T, D>(scores, q, ring.first_tile(j));
            if (sign != 1.0f) {
#pragma unroll
                for (int group = 0; group < Groups; ++group)
#pragma unroll
                    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
                        for (int i = 0; i < 4; ++i) scores[group][n][i] *= sign;
            }
            if (masked) {
#pragma unroll
                for (int n = 0; n < kKeys / 8; ++n) {
                    const uint32_t bits = seen[n / 4] >> (8 * (n % 4) + 2 * t);
#pragma unroll
                    for (int group = 0; group < Groups; ++group)
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            const int row = first + group * 16 + i / 2 * 8 + g;
                            const int column = first_key + 8 * n + 2 * t + i % 2;
                            const bool visible =
                                (bits >> (i % 2) & 1u) && (!diagonal || column <= row + s.shift);
                            scores[group][n][i] = visible ? scores[group][n][i] : negative_infinity();
                        }
                }
            }

            float decay[Groups][2];
            bool decays = false;
#pragma unroll
            for (int group = 0; group < Groups; ++group)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float largest = negative_infinity();
#pragma unroll
                    for (int n = 0; n < kKeys / 8; ++n)
                        largest =
                            fmaxf(largest, fmaxf(scores[group][n][2 * half], scores[group][n][2 * half + 1]));
                    largest = warp_max<4>(largest) * score_scale;
                    largest = fmaxf(row_max[group][half], largest);
                    // a row that has seen no key yet is measured from 0: its weights are 2^-inf, zeros
                    const float reference = largest == negative_infinity() ? 0.0f : largest;
                    decay[group][half] = ptx::exp2(row_max[group][half] - reference);
                    decays = decays || (decay[group][half] != 1.0f);
                    row_max[group][half] = largest;
                    float sum = 0.0f;
#pragma unroll
                    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            float& score = scores[group][n][2 * half + e];
                            score = ptx::exp2(fmaf(score, score_scale, -reference));
                            sum += score;
                        }
                    row_sum[group][half] = row_sum[group][half] * decay[group][half] + sum;
                }
            // The first tile has nothing to rescale, and later ones seldom move the maximum of every row.
            if (j > 0 && __any_sync(kAllLanes, decays)) {
#pragma unroll
                for (int group = 0; group < Groups; ++group)
#pragma unroll
                    for (int n = 0; n < D / 8; ++n)
#pragma unroll
                        for (int i = 0; i < 4; ++i) out[group][n][i] *= decay[group][i / 2];
            }
            if constexpr (HasDropout) {
#pragma unroll
                for (int group = 0; group < Groups; ++group)
#pragma unroll
                    for (int n = 0; n < kKeys / 8; ++n) {
                        const uint32_t kept = kept_along_keys(
                            a.dropout, key, static_cast<uint32_t>(s.start_q + first + group * 16),
                            static_cast<uint32_t>(first_key + 8 * n), static_cast<uint32_t>(head));
#pragma unroll
                        for (int i = 0; i < 4; ++i)
                            scores[group][n][i] = kept >> i & 1u ? scores[group][n][i] : 0.0f;
                    }
            }
            multiply_by_columns<T, D>(out, scores, ring.second_tile(j));
        }

        if (first >= s.len_q) continue;
#pragma unroll
        for (int group = 0; group < Groups; ++group) {
            float factor[2];
            bool valid[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = first + group * 16 + half * 8 + g;
                const float sum = warp_sum<4>(row_sum[group][half]);
                valid[half] = row < s.len_q;
                factor[half] = sum == 0.0f ? 0.0f : a.dropout.scale / sum;
                if (valid[half] && t == 0)
                    a.lse[head * a.total_q + s.start_q + row] =
                        sum == 0.0f ? negative_infinity() : (row_max[group][half] + log2f(sum)) * kLn2;
            }
            const int64_t stride = a.heads * a.head_dim;
            T* to = static_cast<T*>(a.out) + (s.start_q + first + group * 16) * stride + head * a.head_dim;
            store_rows<T, D>(to, stride, out[group], factor, valid, head_dim);
        }
    }
    // The last pass may have stopped short of what was copied (causal).
    ptx::copy_async_wait<0>();
    clear_rest<T>(a, first_work, splits);
}

template <typename T, int D, int Groups>
void launch_forward(const AttentionArgs& a, const ForwardPlan& plan) {
    if constexpr (Groups == 1) {
        if (a.dropout.seed != nullptr)
            return launch_all(attention_forward_kernel<T, D, 1, true>, a, plan, static_cast<int>(plan.splits),
                              plan.slots);
    }
    launch_all(attention_forward_kernel<T, D, Groups, false>, a, plan, static_cast<int>(plan.splits),
               plan.slots);
}

template <typename T>
void launch_forward(const AttentionArgs& a, const ForwardPlan& plan) {
    switch (plan.d) {
        case 32:
            return plan.groups == 2 ? launch_forward<T, 32, 2>(a, plan) : launch_forward<T, 32, 1>(a, plan);
        case 64:
            return plan.groups == 2 ? launch_forward<T, 64, 2>(a, plan) : launch_forward<T, 64, 1>(a, plan);
        case 96:
            return launch_forward<T, 96, 1>(a, plan);
        default:
            return launch_forward<T, 128, 1>(a, plan);
    }
}

}  // namespace
}  // namespace attention

void attention_forward(const AttentionArgs& a) {
    using namespace attention;
    // A kernel for one architecture (wgmma) is chosen here, before the one that serves all.
    const Device& device = current_device();
    const ForwardPlan plan =
        plan_forward(sizes_of(a), {device.multiprocessors, device.shared_bytes_per_block});
    RK_FOR_DTYPE(a.dtype, T, launch_forward<T>(a, plan))
}

}  // namespace rk::cuda
