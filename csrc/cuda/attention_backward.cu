// Attention backward over packed sequences: the weights are computed again from the log-sum-exp, nothing of
// size [len_q, len_k] reaches memory, and every gradient has one owner that sums in a fixed order: no
// atomics, the same bits every time.
//
// Idea. One kernel in three roles. Rows of scores belong to warps, 16 each; their two operands and the
// float32 gradients stay in registers, and the two tensors of the other side stream through the ring of
// attention_common.cuh in tiles of 64 (half of that above head dim 64, half in float32), 32 columns at a time:
//   scores = first rowsᵀ, grad_weights = second rowsᵀ, then weights and grad_scores element by element, which
//   are the left operands of the two sums as they lie in registers.
// keys: rows are keys (k, v), columns queries (q, grad_out); sums are grad_k and grad_v; four products.
// queries: rows are queries, columns keys; the sum is grad_q; three products.
// sequence: as keys, for sequences of up to 128 keys in 16 bits (head dim up to 64, not causal): all keys are
// in the block, so that a tile's score gradients, passed through shared memory once, give grad_q on the spot:
// five products in place of seven, and exponentials, random numbers and reads once in place of twice. A small
// kernel before writes what both need of a query, (log-sum-exp in base 2, sum(grad_out * out)).
//
// Work. 10 * len_q * len_k * head_dim flops a head at least (keys and queries: 14); q, k, v, out, grad_out
// are read and three gradients written once, 16 * head_dim bytes a token and head in 16 bits. 32 x 512 tokens
// of roberta-base on an H200 (4.3 TB/s, 790 TFLOP/s): 47 us of memory, 82 us of products (114 with seven); 32
// x 128: 12 us of memory, 5 us of products.
//
// Schedule. One-dimensional grid of (row tile, sequence, head), last tile first: only long sequences have it.
// Warps and tiles: plan_backward in attention_plan.h.
#include "csrc/cuda/attention_common.cuh"
#include "csrc/cuda/attention_plan.h"

namespace rk::cuda {
namespace attention {
namespace {

constexpr int kStatisticsLanes = 8;  // of a row

// What backward needs to know of each query row: its log-sum-exp in base 2, +inf (which makes every weight
// zero) for a row that saw no key; and delta = sum(grad_out * out), what the softmax's gradient subtracts
// from the gradient of each weight of the row.
template <typename T>
__global__ void __launch_bounds__(kStatisticsThreads) attention_statistics_kernel(const AttentionArgs a) {
    constexpr int kElements = 16 / static_cast<int>(sizeof(T));
    const int part = static_cast<int>(threadIdx.x) % kStatisticsLanes;
    const int64_t rows = a.total_q * a.heads, in_block = kStatisticsThreads / kStatisticsLanes;
    for (int64_t first = blockIdx.x * in_block; first < rows; first += gridDim.x * in_block) {
        const int64_t row = first + threadIdx.x / kStatisticsLanes;
        const int64_t token = row / a.heads, head = row % a.heads;
        float sum = 0.0f;
        if (row < rows) {
            const T* grad = row_of<T>(a.grad_out, token, head);
            const T* out = static_cast<const T*>(a.out) + row * a.head_dim;
            for (int64_t column = part * kElements; column < a.head_dim;
                 column += kStatisticsLanes * kElements) {
                float x[kElements], y[kElements];
                load(x, grad + column);
                load(y, out + column);
#pragma unroll
                for (int i = 0; i < kElements; ++i) sum = fmaf(x[i], y[i], sum);
            }
        }
        sum = warp_sum<kStatisticsLanes>(sum);
        if (row < rows && part == 0) {
            const int64_t place = head * a.total_q + token;
            const float lse = a.lse[place];
            a.statistics[place] = make_float2(lse == negative_infinity() ? -lse : lse * kLog2e, sum);
        }
    }
}

// What a block owns. keys: rows of scores are keys, columns queries, and it writes grad_k and grad_v of its
// keys. queries: rows are queries, columns keys, and it writes grad_q of its queries. sequence: it owns all
// keys of a (sequence, head), and so can write grad_q as well: the gradients of a tile's scores go through
// shared memory, once, and nothing is computed twice.
enum class Owner { keys, queries, sequence };

// Queries of a tile of score gradients in shared memory, [key][query], and its row length.
constexpr int kGradScoresStride = 64 + 8;

// grad_q of the 64 queries of a tile, from the gradients of all their scores and all keys, in pieces of 16
// queries x 32 columns that the warps take in turn. `keys` are the rows of warp 0, then (32 rows on) of
// warp 1.
template <typename T, int D>
__device__ inline void store_grad_q(T* to, int64_t row_stride, const T* grad_scores, const T* keys, int len_k,
                                    int len_q, int first_query, float scale, int head_dim) {
    const int lane = lane_index(), warps = static_cast<int>(blockDim.x) / kWarp;
    for (int piece = warp_index(); piece < 4 * (D / 32); piece += warps) {
        const int row = piece % 4 * 16, column = piece / 4 * 32;
        if (first_query + row >= len_q || column >= head_dim) continue;
        float sums[4][4] = {};
        const T* left_row =
            grad_scores + (lane / 16 * 8 + lane % 8) * kGradScoresStride + row + lane / 8 % 2 * 8;
        const T* right_row = keys + lane % 16 * kStride<T, D> + column + lane / 16 * 8;
#pragma unroll 2
        for (int key = 0; key < len_k; key += 16) {
            uint32_t left[4];
            ptx::load_matrices_transposed(left, left_row + key * kGradScoresStride);
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                uint32_t right[4];
                ptx::load_matrices_transposed(right, right_row + 2 * key * kStride<T, D> + n * 16);
                ptx::multiply_add<T>(sums[2 * n], left, right[0], right[1]);
                ptx::multiply_add<T>(sums[2 * n + 1], left, right[2], right[3]);
            }
        }
        const int query = first_query + row + lane / 4;
        const bool valid[2] = {query < len_q, query + 8 < len_q};
        const float factor[2] = {scale, scale};
        store_rows<T, 32>(to + (first_query + row) * row_stride + column, row_stride, sums, factor, valid,
                          head_dim - column);
    }
}

template <typename T, int D, Owner owner, bool HasDropout>
__global__ void __launch_bounds__(kMostBackwardThreads, 1)
    attention_backward_kernel(const AttentionArgs a, const int64_t first_work, const int row_tiles,
                              const int slots) {
    constexpr bool OwnsKeys = owner != Owner::queries, Whole = owner == Owner::sequence;
    constexpr int kColumns = (kOnTensorCores<T> ? 64 : 32) / (D > 64 ? 2 : 1);
    // Columns at a time: fewer where the registers do not hold more.
    constexpr int kStep = (kColumns < 32 || (D > 96 && HasDropout)) ? 16 : 32;
    constexpr int kRows = 16;  // of a warp
    const int lane = lane_index(), g = lane / 4, t = lane % 4, warp = warp_index();
    const int block_rows = static_cast<int>(blockDim.x) / kWarp * kRows;
    const int head_dim = static_cast<int>(a.head_dim);
    const HeadsView &row_first = OwnsKeys ? a.k : a.q, &row_second = OwnsKeys ? a.v : a.grad_out;
    const HeadsView &column_first = OwnsKeys ? a.q : a.k, &column_second = OwnsKeys ? a.grad_out : a.v;

    T* own = reinterpret_cast<T*>(shared_memory()) + warp * 2 * kRows * kStride<T, D>;  // this warp's
    TileRing<T, D, kColumns> ring;
    ring.memory = reinterpret_cast<T*>(shared_memory()) + 2 * block_rows * kStride<T, D>;
    ring.statistics_memory = reinterpret_cast<float2*>(ring.memory + slots * 2 * ring.kTile);
    T* all_grad_scores = reinterpret_cast<T*>(ring.statistics_memory + slots * kColumns);  // Whole
    ring.statistics = nullptr;
    ring.first_stride = column_first.token_stride;
    ring.second_stride = column_second.token_stride;
    ring.head_dim = head_dim;
    ring.slots = slots;

    const float score_scale = a.scale * kLog2e;
    PhiloxKey key{};
    if constexpr (HasDropout) key = philox_key(a.dropout);

    const int64_t work = first_work + blockIdx.x, pairs = a.batch * a.heads;
    const int tile = row_tiles - 1 - static_cast<int>(work / pairs);
    const int head = static_cast<int>(work % pairs % a.heads);
    const Sequence s = sequence(a, work % pairs / a.heads);
    const int len_rows = OwnsKeys ? s.len_k : s.len_q;
    if (OwnsKeys) {
        clear_rows<T>(a, a.grad_k, s.start_k + s.len_k, s.end_k, head, tile, row_tiles);
        clear_rows<T>(a, a.grad_v, s.start_k + s.len_k, s.end_k, head, tile, row_tiles);
    }
    if (owner != Owner::keys) clear_rows<T>(a, a.grad_q, s.start_q + s.len_q, s.end_q, head, tile, row_tiles);
    if (!Whole && static_cast<int64_t>(tile) * block_rows >= len_rows) return;
    const int start_rows = OwnsKeys ? s.start_k : s.start_q;
    const int start_columns = OwnsKeys ? s.start_q : s.start_k;
    const int first = tile * block_rows + warp * kRows;
    const float2* statistics = a.statistics + head * a.total_q + s.start_q;

    copy_rows<T, D>(own, row_of<T>(row_first, start_rows, head), row_first.token_stride, first, len_rows,
                    kRows, head_dim, lane, kWarp);
    copy_rows<T, D>(own + kRows * kStride<T, D>, row_of<T>(row_second, start_rows, head),
                    row_second.token_stride, first, len_rows, kRows, head_dim, lane, kWarp);
    ptx::copy_async_commit();
    ring.first = row_of<T>(column_first, start_columns, head);
    ring.second = row_of<T>(column_second, start_columns, head);
    ring.length = OwnsKeys ? s.len_q : s.len_k;
    int begin = 0, end = ring.tiles(ring.length);
    if (OwnsKeys) {
        ring.statistics = statistics;
        if (a.causal && tile * block_rows > s.shift)  // queries before see none of the keys
            begin = min((tile * block_rows - s.shift) / kColumns, end);
    } else {
        end = ring.tiles(end_of_keys(s, static_cast<int64_t>(tile + 1) * block_rows, a.causal));
    }
    ring.start(begin, end);
    wait_for_all_but(ring.issued - begin);
    __syncwarp();
    LeftOperand<T, D, 1, kOnTensorCores<T> && D <= 64> left_first, left_second;
    left_first.load(own);
    left_second.load(own + kRows * kStride<T, D>);

    bool in_rows[2];
    float2 row_statistics[2];  // of queries
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = first + 8 * half + g;
        in_rows[half] = row < len_rows;
        if (!OwnsKeys) row_statistics[half] = in_rows[half] ? statistics[row] : make_float2(0.0f, 0.0f);
        if (OwnsKeys && in_rows[half] && a.key_mask != nullptr) in_rows[half] = a.key_mask[s.start_k + row];
    }

    const int64_t stride = a.heads * a.head_dim;              // of the gradients' rows
    float grad_first[1][D / 8][4], grad_second[1][D / 8][4];  // grad_k and grad_v, or grad_q and nothing
    set_zero(grad_first);
    set_zero(grad_second);
    for (int j = begin; j < end; ++j) {
        ring.wait_for(j);
#pragma unroll 1
        for (int step = 0; step < kColumns; step += kStep) {
            const int column = j * kColumns + step;
            if (first >= len_rows || column >= ring.length) break;
            bool diagonal = false;
            uint32_t seen = ~0u;
            if (OwnsKeys) {
                if (a.causal) {
                    if (first > column + kStep - 1 + s.shift) continue;
                    diagonal = first + kRows - 1 > column + s.shift;
                }
            } else {
                if (a.causal) {
                    if (column > first + kRows - 1 + s.shift) continue;
                    diagonal = column + kStep - 1 > first + s.shift;
                }
                if (column + kStep > s.len_k || a.key_mask != nullptr) {
                    seen = seen_keys(a.key_mask, s, column);
                    if (kStep < 32) seen &= (1u << kStep % 32) - 1;
                    if (seen == 0) continue;
                }
            }

            const T* first_tile = ring.first_tile(j) + step * kStride<T, D>;
            const T* second_tile = ring.second_tile(j) + step * kStride<T, D>;
            float weights[1][kStep / 8][4], grad_weights[1][kStep / 8][4];
            set_zero(weights);
            set_zero(grad_weights);
            multiply_by_rows<T, D>(weights, left_first, first_tile);
            multiply_by_rows<T, D>(grad_weights, left_second, second_tile);
            float grad_scores[1][kStep / 8][4];
#pragma unroll
            for (int n = 0; n < kStep / 8; ++n) {
                float2 column_statistics[2];
                if (OwnsKeys) {
                    const float4 two =
                        *reinterpret_cast<const float4*>(ring.statistics_tile(j) + step + 8 * n + 2 * t);
                    column_statistics[0] = make_float2(two.x, two.y);
                    column_statistics[1] = make_float2(two.z, two.w);
                }
                uint32_t kept = 0;
                if constexpr (HasDropout) {
                    const uint32_t head32 = static_cast<uint32_t>(head);
                    kept = OwnsKeys
                               ? kept_along_queries(a.dropout, key,
                                                    static_cast<uint32_t>(s.start_q + column + 8 * n),
                                                    static_cast<uint32_t>(first), head32)
                               : kept_along_keys(a.dropout, key, static_cast<uint32_t>(s.start_q + first),
                                                 static_cast<uint32_t>(column + 8 * n), head32);
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float2 of_query = OwnsKeys ? column_statistics[i % 2] : row_statistics[i / 2];
                    float weight = ptx::exp2(fmaf(weights[0][n][i], score_scale, -of_query.x));
                    float grad = grad_weights[0][n][i];
                    bool visible = OwnsKeys ? in_rows[i / 2] : (seen >> (8 * n + 2 * t + i % 2) & 1u) != 0;
                    if (diagonal) {
                        const int row = first + 8 * (i / 2) + g, c = column + 8 * n + 2 * t + i % 2;
                        visible = visible && (OwnsKeys ? row <= c + s.shift : c <= row + s.shift);
                    }
                    weight = visible ? weight : 0.0f;
                    weights[0][n][i] = weight;
                    if constexpr (HasDropout) {
                        const bool keep = kept >> i & 1u;
                        grad = keep ? grad * a.dropout.scale : 0.0f;
                        weights[0][n][i] = keep ? weight : 0.0f;
                    }
                    grad_scores[0][n][i] = weight * (grad - of_query.y);
                }
            }
            if constexpr (Whole) {
                T* row = all_grad_scores + (warp * kRows + g) * kGradScoresStride + step + 2 * t;
#pragma unroll
                for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        *reinterpret_cast<uint32_t*>(row + half * 8 * kGradScoresStride + 8 * n) =
                            pack<T>(grad_scores[0][n][2 * half], grad_scores[0][n][2 * half + 1]);
            }
            multiply_by_columns<T, D>(grad_first, grad_scores, first_tile);
            if (OwnsKeys) multiply_by_columns<T, D>(grad_second, weights, second_tile);
        }
        if constexpr (Whole) {
            __syncthreads();  // and the next tile's wait_for() comes before grad_scores are overwritten
            store_grad_q<T, D>(static_cast<T*>(a.grad_q) + s.start_q * stride + head * a.head_dim, stride,
                               all_grad_scores, reinterpret_cast<const T*>(shared_memory()), s.len_k, s.len_q,
                               j * kColumns, a.scale, head_dim);
        }
    }

    const int64_t offset = (start_rows + first) * stride + head * a.head_dim;
    const bool valid[2] = {first + g < len_rows, first + 8 + g < len_rows};
    const float scale[2] = {a.scale, a.scale};
    store_rows<T, D>(static_cast<T*>(OwnsKeys ? a.grad_k : a.grad_q) + offset, stride, grad_first[0], scale,
                     valid, head_dim);
    if (OwnsKeys) {
        const float kept_scale[2] = {a.dropout.scale, a.dropout.scale};
        store_rows<T, D>(static_cast<T*>(a.grad_v) + offset, stride, grad_second[0], kept_scale, valid,
                         head_dim);
    }
}

template <typename T, int D, Owner owner>
void launch_backward(const AttentionArgs& a, const BackwardPlan& plan) {
    if (a.dropout.seed != nullptr)
        launch_all(attention_backward_kernel<T, D, owner, true>, a, plan, static_cast<int>(plan.tiles),
                   plan.slots);
    else
        launch_all(attention_backward_kernel<T, D, owner, false>, a, plan, static_cast<int>(plan.tiles),
                   plan.slots);
}

template <typename T, Owner owner>
void launch_backward(const AttentionArgs& a, const BackwardPlan& plan) {
    switch (plan.d) {
        case 32:
            return launch_backward<T, 32, owner>(a, plan);
        case 64:
            return launch_backward<T, 64, owner>(a, plan);
        default:
            break;
    }
    if constexpr (owner != Owner::sequence) {
        if (plan.d == 96) return launch_backward<T, 96, owner>(a, plan);
        launch_backward<T, 128, owner>(a, plan);
    }
}

template <typename T>
void launch_backward(const AttentionArgs& a) {
    launch(attention_statistics_kernel<T>,
           {dim3(static_cast<unsigned>(statistics_blocks(a.total_q, a.heads))), dim3(kStatisticsThreads), 0,
            a.stream},
           a);
    const Device& device = current_device();
    const Machine machine{device.multiprocessors, device.shared_bytes_per_block};
    const Sizes sizes = sizes_of(a);
    if constexpr (kOnTensorCores<T>) {
        if (const auto plan = plan_backward_of_sequences(sizes, machine))
            return launch_backward<T, Owner::sequence>(a, *plan);
    }
    launch_backward<T, Owner::keys>(a, plan_backward(sizes, machine, true));
    launch_backward<T, Owner::queries>(a, plan_backward(sizes, machine, false));
}

}  // namespace
}  // namespace attention

void attention_backward(const AttentionArgs& a) {
    using namespace attention;
    RK_FOR_DTYPE(a.dtype, T, launch_backward<T>(a))
}

}  // namespace rk::cuda
