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

// OwnsKeys: rows are keys, columns queries, and the block writes grad_k and grad_v of its keys. Else rows are
// queries, columns keys, and it writes grad_q of its queries.
template <typename T, int D, bool OwnsKeys, bool HasDropout>
__global__ void __launch_bounds__(kMostThreads)
    attention_backward_kernel(const AttentionArgs a, const int64_t row_tiles, const int slots) {
    constexpr int kColumns = (kOnTensorCores<T> ? 64 : 32) / (D > 64 ? 2 : 1);
    constexpr int kStep = kColumns < 32 ? kColumns : 32;  // columns at a time
    constexpr int kRows = 16;                             // of a warp
    const int lane = lane_index(), g = lane / 4, t = lane % 4, warp = warp_index();
    const int block_rows = static_cast<int>(blockDim.x) / kWarp * kRows;
    const int head_dim = static_cast<int>(a.head_dim);
    const HeadsView &row_first = OwnsKeys ? a.k : a.q, &row_second = OwnsKeys ? a.v : a.grad_out;
    const HeadsView &column_first = OwnsKeys ? a.q : a.k, &column_second = OwnsKeys ? a.grad_out : a.v;

    T* own = reinterpret_cast<T*>(shared_memory()) + warp * 2 * kRows * kStride<T, D>;  // this warp's
    TileRing<T, D, kColumns> ring;
    ring.memory = reinterpret_cast<T*>(shared_memory()) + 2 * block_rows * kStride<T, D>;
    ring.statistics_memory = reinterpret_cast<float2*>(ring.memory + slots * 2 * ring.kTile);
    ring.statistics = nullptr;
    ring.first_stride = column_first.token_stride;
    ring.second_stride = column_second.token_stride;
    ring.head_dim = head_dim;
    ring.slots = slots;

    const float score_scale = a.scale * kLog2e;
    PhiloxKey key{};
    if constexpr (HasDropout) key = philox_key(a.dropout);

    const int64_t pairs = a.batch * a.heads;
    for (int64_t work = blockIdx.x; work < pairs * row_tiles; work += gridDim.x) {
        const int tile = static_cast<int>(row_tiles - 1 - work / pairs);
        const int64_t head = work % pairs % a.heads;
        const Sequence s = sequence(a, work % pairs / a.heads);
        const int len_rows = OwnsKeys ? s.len_k : s.len_q;
        if (static_cast<int64_t>(tile) * block_rows >= len_rows) continue;
        const int64_t start_rows = OwnsKeys ? s.start_k : s.start_q;
        const int64_t start_columns = OwnsKeys ? s.start_q : s.start_k;
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
            if (OwnsKeys && in_rows[half] && a.key_mask != nullptr)
                in_rows[half] = a.key_mask[s.start_k + row];
        }

        float grad_first[1][D / 8][4], grad_second[1][D / 8][4];  // grad_k and grad_v, or grad_q and nothing
        set_zero(grad_first);
        set_zero(grad_second);
        for (int j = begin; j < end; ++j) {
            ring.wait_for(j);
            if (first >= len_rows) continue;
#pragma unroll 1
            for (int step = 0; step < kColumns; step += kStep) {
                const int column = j * kColumns + step;
                if (column >= ring.length) break;
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
                        bool visible =
                            OwnsKeys ? in_rows[i / 2] : (seen >> (8 * n + 2 * t + i % 2) & 1u) != 0;
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
                multiply_by_columns<T, D>(grad_first, grad_scores, first_tile);
                if (OwnsKeys) multiply_by_columns<T, D>(grad_second, weights, second_tile);
            }
        }

        const int64_t stride = a.heads * a.head_dim;
        const int64_t offset = (start_rows + first) * stride + head * a.head_dim;
        const bool valid[2] = {first + g < len_rows, first + 8 + g < len_rows};
        const float scale[2] = {a.scale, a.scale};
        store_rows<T, D>(static_cast<T*>(OwnsKeys ? a.grad_k : a.grad_q) + offset, stride, grad_first[0],
                         scale, valid, head_dim);
        if (OwnsKeys) {
            const float kept_scale[2] = {a.dropout.scale, a.dropout.scale};
            store_rows<T, D>(static_cast<T*>(a.grad_v) + offset, stride, grad_second[0], kept_scale, valid,
                             head_dim);
        }
        ptx::copy_async_wait<0>();
        __syncthreads();
    }
}

template <typename T, int D, bool OwnsKeys>
void launch_backward(const AttentionArgs& a, const BackwardPlan& plan) {
    const Launch how{dim3(static_cast<unsigned>(plan.blocks)),
                     dim3(static_cast<unsigned>(plan.warps * kWarp)), plan.shared_bytes, a.stream};
    if (a.dropout.seed != nullptr)
        launch(attention_backward_kernel<T, D, OwnsKeys, true>, how, a, plan.tiles, plan.slots);
    else
        launch(attention_backward_kernel<T, D, OwnsKeys, false>, how, a, plan.tiles, plan.slots);
}

template <typename T, bool OwnsKeys>
void launch_backward(const AttentionArgs& a) {
    const Device& device = current_device();
    const BackwardPlan plan =
        plan_backward({a.batch, a.heads, a.head_dim, a.max_seqlen_q, a.max_seqlen_k, a.dtype},
                      {device.multiprocessors, device.shared_bytes_per_block}, OwnsKeys);
    switch (plan.d) {
        case 32:
            return launch_backward<T, 32, OwnsKeys>(a, plan);
        case 64:
            return launch_backward<T, 64, OwnsKeys>(a, plan);
        case 96:
            return launch_backward<T, 96, OwnsKeys>(a, plan);
        default:
            return launch_backward<T, 128, OwnsKeys>(a, plan);
    }
}

template <typename T>
void launch_backward(const AttentionArgs& a) {
    const Launch how{dim3(static_cast<unsigned>(statistics_blocks(a.total_q, a.heads))),
                     dim3(kStatisticsThreads), 0, a.stream};
    launch(attention_statistics_kernel<T>, how, a);
    launch_backward<T, true>(a);
    launch_backward<T, false>(a);
}

}  // namespace
}  // namespace attention

void attention_backward(const AttentionArgs& a) {
    using namespace attention;
    RK_FOR_DTYPE(a.dtype, T, launch_backward<T>(a))
}

}  // namespace rk::cuda
