// How attention's launches are laid out: plain host functions of sizes alone, so that they can be tested
// where no GPU is. Grids are one-dimensional (y and z end at 65535); work beyond kMostBlocks takes a second
// launch.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <optional>

#include "csrc/cuda/dtype.h"

namespace rk::cuda::attention {

constexpr int64_t kMostBlocks = 2147483647;
constexpr int kMostForwardWarps = 4, kMostBackwardWarps = 8;

struct Sizes {
    int64_t batch, heads, head_dim, max_seqlen_q, max_seqlen_k;
    Dtype dtype;
    bool causal, dropout;
};

struct Machine {
    int multiprocessors;
    size_t shared_bytes_per_block;
};

constexpr int64_t divide_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// The head dims that kernels are compiled for; others are padded with zeros, in shared memory only.
constexpr int padded_head_dim(int64_t head_dim) {
    return head_dim <= 32 ? 32 : head_dim <= 64 ? 64 : head_dim <= 96 ? 96 : 128;
}

// Bytes of a row of shared memory: see attention_common.cuh.
constexpr size_t row_bytes(Dtype dtype, int d) {
    return static_cast<size_t>(d) * (dtype == Dtype::float32 ? 4 : 2) + 16;
}

// Keys of a tile of forward; queries or keys of a tile that backward's kernels walk along.
constexpr int forward_tile(Dtype dtype) {
    return dtype == Dtype::float32 ? 32 : 64;
}
constexpr int backward_tile(Dtype dtype, int d) {
    return (dtype == Dtype::float32 ? 32 : 64) / (d > 64 ? 2 : 1);
}

// What is left of a block's `free` shared memory after a tile slot each time: from 1 to `most` slots, 0 where
// not even one fits.
constexpr int slots_that_fit(size_t free, size_t slot_bytes, int64_t most) {
    const int64_t fit = static_cast<int64_t>(free / slot_bytes);
    return static_cast<int>(fit < most ? fit : most);
}

struct ForwardPlan {
    int d;           // padded head dim
    int groups;      // of 16 query rows, in a warp: 1 or 2
    int warps;       // in a block
    int64_t splits;  // blocks that share the query tiles of one (sequence, head)
    int slots;       // of key and value tiles, in shared memory
    size_t shared_bytes;
    int64_t work;  // blocks
};

// Long sequences: four warps of 32 queries, so that what is read of a tile serves twice (not with dropout,
// where random numbers take longer than that). Short ones: as many warps of 16 as they have rows. One block
// walks all query tiles of a (sequence, head) when there are blocks enough without splitting them; the keys
// and values of a sequence that fits in its slots are then copied once.
inline ForwardPlan plan_forward(const Sizes& s, const Machine& machine) {
    ForwardPlan plan{};
    plan.d = padded_head_dim(s.head_dim);
    const int64_t pairs = s.batch * s.heads;
    const int64_t busy =
        4 * static_cast<int64_t>(machine.multiprocessors);  // blocks that keep the device busy
    const bool wide = !s.dropout && plan.d <= 64 && s.max_seqlen_q > 64 &&
                      pairs * divide_up(s.max_seqlen_q, 128) >= busy / 2;
    plan.groups = wide ? 2 : 1;
    const int64_t warp_rows = 16 * plan.groups;
    plan.warps = static_cast<int>(divide_up(s.max_seqlen_q < 1 ? 1 : s.max_seqlen_q, warp_rows));
    if (plan.warps > kMostForwardWarps) plan.warps = kMostForwardWarps;

    const size_t row = row_bytes(s.dtype, plan.d);
    const int keys = forward_tile(s.dtype);
    const size_t slot = 2 * keys * row;
    const int64_t key_tiles = divide_up(s.max_seqlen_k < 1 ? 1 : s.max_seqlen_k, keys);
    const int needed = key_tiles < 2 ? 1 : 2;
    while (plan.warps > 1 && plan.warps * warp_rows * row + needed * slot > machine.shared_bytes_per_block)
        plan.warps /= 2;
    const size_t queries = plan.warps * warp_rows * row;

    const int64_t query_tiles = divide_up(s.max_seqlen_q, plan.warps * warp_rows);
    const int64_t wish = pairs > 0 ? divide_up(busy, pairs) : 1;
    plan.splits = wish < query_tiles ? wish : query_tiles;
    if (plan.splits < 1) plan.splits = 1;

    // Enough slots to copy ahead; more where a second block still fits beside this one: a block that walks
    // wants all tiles, another three.
    const bool walks = plan.splits < query_tiles;
    const size_t room = machine.shared_bytes_per_block / (walks ? 2 : 4);
    const int comfortable = room > queries ? slots_that_fit(room - queries, slot, walks ? key_tiles : 3) : 0;
    plan.slots = slots_that_fit(machine.shared_bytes_per_block - queries, slot, needed);
    if (plan.slots < comfortable)
        plan.slots = comfortable < key_tiles ? comfortable : static_cast<int>(key_tiles);
    plan.shared_bytes = queries + plan.slots * slot;

    plan.work = s.max_seqlen_q > 0 ? pairs * plan.splits : 0;
    return plan;
}

struct BackwardPlan {
    int d;
    int warps;      // in a block, 16 rows each of what it owns
    int64_t tiles;  // of what blocks own, in the longest sequence
    int slots;      // of tiles of what the block walks along
    size_t shared_bytes;
    int64_t work;  // blocks
};

// For the kernel whose blocks own keys (and walk along queries, with their statistics), or own queries (and
// walk along keys).
inline BackwardPlan plan_backward(const Sizes& s, const Machine& machine, bool owns_keys) {
    BackwardPlan plan{};
    plan.d = padded_head_dim(s.head_dim);
    const int64_t own = owns_keys ? s.max_seqlen_k : s.max_seqlen_q;
    const int64_t other = owns_keys ? s.max_seqlen_q : s.max_seqlen_k;
    const int64_t pairs = s.batch * s.heads;
    const size_t row = row_bytes(s.dtype, plan.d);
    const int columns = backward_tile(s.dtype, plan.d);
    const size_t slot = 2 * columns * row + (owns_keys ? columns * 8 : 0);
    const int64_t other_tiles = divide_up(other, columns);
    const int needed = other_tiles < 2 ? 1 : 2;

    plan.warps = static_cast<int>(divide_up(own < 1 ? 1 : own, 16));
    const bool many = pairs * divide_up(own, 128) >= 2 * static_cast<int64_t>(machine.multiprocessors);
    const int most = many ? kMostBackwardWarps : kMostBackwardWarps / 2;
    if (plan.warps > most) plan.warps = most;
    while (plan.warps > 1 && 2 * plan.warps * 16 * row + needed * slot > machine.shared_bytes_per_block)
        plan.warps /= 2;
    const size_t owned = 2 * plan.warps * 16 * row;
    plan.slots = slots_that_fit(machine.shared_bytes_per_block - owned, slot, needed);
    plan.shared_bytes = owned + plan.slots * slot;
    plan.tiles = divide_up(own, plan.warps * 16);
    plan.work = pairs * plan.tiles;
    return plan;
}

// For the kernel whose blocks own whole sequences: a warp for every 16 keys. Nothing where it does not serve.
inline std::optional<BackwardPlan> plan_backward_of_sequences(const Sizes& s, const Machine& machine) {
    BackwardPlan plan{};
    plan.d = padded_head_dim(s.head_dim);
    if (s.causal || plan.d > 64 || s.dtype == Dtype::float32 || s.max_seqlen_k > 16 * kMostBackwardWarps)
        return {};
    plan.warps = static_cast<int>(divide_up(s.max_seqlen_k < 1 ? 1 : s.max_seqlen_k, 16));
    plan.tiles = 1;
    const size_t row = row_bytes(s.dtype, plan.d);
    const int columns = backward_tile(s.dtype, plan.d);
    const size_t slot = 2 * columns * row + columns * 8;
    const size_t owned = 2 * plan.warps * 16 * row, grad_scores = plan.warps * 16 * (columns + 8) * 2;
    const int needed = divide_up(s.max_seqlen_q, columns) < 2 ? 1 : 2;
    if (owned + grad_scores + needed * slot > machine.shared_bytes_per_block) return {};
    plan.slots = needed;
    plan.shared_bytes = owned + grad_scores + plan.slots * slot;
    plan.work = s.batch * s.heads;
    return plan;
}

// Whether backward on Hopper is the kernel whose blocks own whole sequences: two warpgroups, of 64 keys each.
// (Without keys there is no block to write the gradient of the queries.)
constexpr int kMostWholeKeys = 128;
constexpr bool in_one_pass_sm90(bool causal, int64_t total_k, int64_t max_seqlen_k) {
    return !causal && total_k > 0 && max_seqlen_k <= kMostWholeKeys;
}

// The kernel that writes row statistics: 8 lanes a row of [Tq * heads].
constexpr int kStatisticsThreads = 256;
inline int64_t statistics_blocks(int64_t total_q, int64_t heads) {
    const int64_t blocks = divide_up(total_q * heads, kStatisticsThreads / 8);
    return blocks < kMostBlocks ? blocks : kMostBlocks;
}

}  // namespace rk::cuda::attention
