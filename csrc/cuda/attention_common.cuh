// What the attention kernels share: a sequence's place, tiles on their way to shared memory, products of
// tiles, dropout bits, stores.
//
// Every kernel gives a warp 16 * Groups rows of a score matrix and walks along its columns. Whatever the
// dtype, a lane holds the scores that mma.m16n8k16 gives it: with g = lane / 4 and t = lane % 4 those of rows
// g and g + 8 and columns 2t and 2t + 1 of each 16 x 8 piece. float32 products run on the FMA units with that
// same layout (TF32 would not keep the promise), so what is between the products is written once.
//
// Shared memory: a row lies 16 bytes further than it is long, so the eight rows that ldmatrix, or float32's
// 16-byte loads, touch at a time start in different banks for every head dim here (a swizzle would save the
// 16 bytes, and would need another pattern for each head dim). Columns from head_dim up to the template's D
// are zeros, and so are rows past the end of a sequence: they add nothing.
#pragma once
#include <launch.cuh>
#include <ptx.cuh>

#include "csrc/cuda/attention.h"
#include "csrc/cuda/attention_plan.h"
#include "csrc/cuda/common.cuh"
#include "csrc/cuda/dropout.cuh"

namespace rk::cuda::attention {

constexpr float kLog2e = 1.4426950408889634f;  // scores are exponentiated in base 2
constexpr float kLn2 = 0.6931471805599453f;
constexpr int kMostForwardThreads = 32 * kMostForwardWarps;
constexpr int kMostBackwardThreads = 32 * kMostBackwardWarps;

template <typename T>
constexpr bool kOnTensorCores = sizeof(T) == 2;

// Elements from a row in shared memory to the next.
template <typename T, int D>
constexpr int kStride = D + 16 / static_cast<int>(sizeof(T));

__device__ inline int lane_index() {
    return static_cast<int>(threadIdx.x) % kWarp;
}
__device__ inline int warp_index() {
    return static_cast<int>(threadIdx.x) / kWarp;
}

__device__ inline float negative_infinity() {
    return __int_as_float(static_cast<int>(0xff800000u));
}

// One sequence: its first packed rows, its lengths; query i sees key j <= i + shift when causal. Rows after
// it, up to end_q and end_k, belong to no sequence: it is longer than max_seqlen, or it is the last one.
struct Sequence {
    int start_q, start_k, len_q, len_k, shift, end_q, end_k;
};

__device__ inline Sequence sequence(const AttentionArgs& a, int64_t b) {
    const int start_q = a.cu_seqlens_q[b], start_k = a.cu_seqlens_k[b];
    const int next_q = a.cu_seqlens_q[b + 1], next_k = a.cu_seqlens_k[b + 1];
    const int len_q = min(next_q - start_q, static_cast<int>(a.max_seqlen_q));
    const int len_k = min(next_k - start_k, static_cast<int>(a.max_seqlen_k));
    const bool last = b + 1 == a.batch;
    return {start_q,
            start_k,
            len_q,
            len_k,
            len_k - len_q,
            last ? static_cast<int>(a.total_q) : next_q,
            last ? static_cast<int>(a.total_k) : next_k};
}

// By a block, `part` of `parts` that share the work: rows from `from` up to `end` of one head of a contiguous
// [T, heads, head_dim] become zeros. There are none where a call keeps to its max_seqlen and has no room left.
template <typename T>
__device__ inline void clear_rows(const AttentionArgs& a, void* tensor, int from, int end, int head, int part,
                                  int parts) {
    if (from >= end) return;
    constexpr int kElements = 16 / static_cast<int>(sizeof(T));
    const int pieces = static_cast<int>(a.head_dim) / kElements, threads = static_cast<int>(blockDim.x);
    for (int64_t i = part * threads + static_cast<int>(threadIdx.x); i < int64_t{end - from} * pieces;
         i += parts * threads) {
        T* row = static_cast<T*>(tensor) + ((from + i / pieces) * a.heads + head) * a.head_dim;
        reinterpret_cast<uint4*>(row)[i % pieces] = make_uint4(0, 0, 0, 0);
    }
}

// One past the last key that any of the queries before `end_q` sees.
__device__ inline int end_of_keys(const Sequence& s, int64_t end_q, bool causal) {
    if (!causal) return s.len_k;
    const int64_t end = end_q + s.shift;
    return end < 0 ? 0 : end < s.len_k ? static_cast<int>(end) : s.len_k;
}

// Row `row` of one head.
template <typename T>
__device__ inline const T* row_of(const HeadsView& view, int64_t row, int64_t head) {
    return static_cast<const T*>(view.data) + row * view.token_stride + head * view.head_stride;
}

// ------------------------------------------------------------------------------- global to shared memory

// Starts copying `rows` rows from `first` on to shared memory, by threads 0 ... threads - 1; rows from `end`
// on and columns from head_dim on become zeros.
template <typename T, int D>
__device__ inline void copy_rows(T* to, const T* from, int64_t token_stride, int first, int end, int rows,
                                 int head_dim, int thread, int threads) {
    constexpr int kElements = 16 / static_cast<int>(sizeof(T)), kPieces = D / kElements;
#pragma unroll 1
    for (int i = thread; i < rows * kPieces; i += threads) {
        const int row = i / kPieces, column = i % kPieces * kElements;
        const bool valid = first + row < end && column < head_dim;
        ptx::copy_async_16(to + row * kStride<T, D> + column,
                           valid ? from + (first + row) * token_stride + column : from, valid);
    }
}

// Waits until at most `pending` of this thread's youngest copy groups are under way (or fewer: the
// instruction takes constants).
__device__ inline void wait_for_all_but(int pending) {
    switch (pending) {
        case 0:
            ptx::copy_async_wait<0>();
            break;
        case 1:
            ptx::copy_async_wait<1>();
            break;
        case 2:
            ptx::copy_async_wait<2>();
            break;
        case 3:
            ptx::copy_async_wait<3>();
            break;
        case 4:
            ptx::copy_async_wait<4>();
            break;
        case 5:
            ptx::copy_async_wait<5>();
            break;
        case 6:
            ptx::copy_async_wait<6>();
            break;
        default:
            ptx::copy_async_wait<7>();
            break;
    }
}

// The rows of two tensors (keys and values, or queries and their gradients) on their way through shared
// memory, in tiles of `Rows`. There are `slots` tiles of room. Where they all fit, each is copied once, and
// stays; else a tile gives its room to the one `slots` further on as soon as all warps are through with it.
template <typename T, int D, int Rows>
struct TileRing {
    static constexpr int kTile = Rows * kStride<T, D>;  // elements
    // Shared memory of a slot; `Statistics`: with the row statistics of queries.
    static constexpr size_t slot_bytes(bool statistics) {
        return 2 * kTile * sizeof(T) + (statistics ? Rows * sizeof(float2) : 0);
    }

    T* memory;                  // [slots][2][Rows][kStride]
    float2* statistics_memory;  // [slots][Rows]
    const T *first, *second;    // of the sequence
    const float2* statistics;   // of the sequence, or null
    int64_t first_stride, second_stride;
    int length, head_dim, slots;
    int issued, ready, end;  // tiles: copies started, all copies arrived, where to stop

    __device__ static int tiles(int rows) { return (rows + Rows - 1) / Rows; }

    // Starts over with the tiles from `begin` up to `stop`. No warp may be reading tiles, and no copy under
    // way.
    __device__ void start(int begin, int stop) {
        issued = ready = begin;
        end = stop;
        const int now = stop - begin < slots ? stop : begin + slots;
        while (issued < now) issue();
    }

    __device__ void issue() {
        const int slot = issued % slots, row = issued * Rows;
        T* to = memory + slot * 2 * kTile;
        const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
        copy_rows<T, D>(to, first, first_stride, row, length, Rows, head_dim, thread, threads);
        copy_rows<T, D>(to + kTile, second, second_stride, row, length, Rows, head_dim, thread, threads);
        if (statistics != nullptr)
            for (int i = thread; i < Rows; i += threads) {
                const bool valid = row + i < length;
                ptx::copy_async_8(statistics_memory + slot * Rows + i, statistics + (valid ? row + i : 0),
                                  valid);
            }
        ptx::copy_async_commit();
        ++issued;
    }

    // To be called by the whole block, before tile j is read. All warps have left tile j - 1 behind by then,
    // which makes room for the next.
    __device__ void wait_for(int j) {
        if (j < ready) return;
        wait_for_all_but(issued - j - 1);
        __syncthreads();
        ready = j + 1;
        if (issued < end && issued < j + slots) issue();
    }

    __device__ const T* first_tile(int j) const { return memory + j % slots * 2 * kTile; }
    __device__ const T* second_tile(int j) const { return first_tile(j) + kTile; }
    __device__ const float2* statistics_tile(int j) const { return statistics_memory + j % slots * Rows; }
};

// ------------------------------------------------------------------------------- products

// Two numbers rounded to 16 bits, the first in the low half.
template <typename T>
__device__ inline uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<__nv_bfloat16>(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, 4);
    return bits;
}
template <>
__device__ inline uint32_t pack<__half>(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, 4);
    return bits;
}

// A warp's 16 * Groups rows of queries or keys as the left operand of a product, from rows in shared memory.
// InRegisters: read once and kept (float32 always reads again: a lane needs whole rows).
template <typename T, int D, int Groups, bool InRegisters>
struct LeftOperand;

template <typename T, int D, int Groups>
struct LeftOperand<T, D, Groups, false> {
    const T* rows;
    __device__ void load(const T* shared) { rows = shared; }
    __device__ void fragment(uint32_t (&to)[4], int group, int k) const {
        const int lane = lane_index();
        ptx::load_matrices(to, rows + (group * 16 + lane % 16) * kStride<T, D> + k * 16 + lane / 16 * 8);
    }
};

template <typename T, int D, int Groups>
struct LeftOperand<T, D, Groups, true> {
    uint32_t kept[Groups][D / 16][4];
    __device__ void load(const T* shared) {
        LeftOperand<T, D, Groups, false> from{shared};
#pragma unroll
        for (int group = 0; group < Groups; ++group)
#pragma unroll
            for (int k = 0; k < D / 16; ++k) from.fragment(kept[group][k], group, k);
    }
    __device__ void fragment(uint32_t (&to)[4], int group, int k) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) to[i] = kept[group][k][i];
    }
};

// scores += a * bᵀ: b is [8 * Pieces, D] in shared memory.
template <typename T, int D, int Groups, int Pieces, typename Left>
__device__ inline void multiply_by_rows(float (&scores)[Groups][Pieces][4], const Left& a, const T* b) {
    const int lane = lane_index();
    if constexpr (kOnTensorCores<T>) {
        const T* row = b + (lane / 16 * 8 + lane % 8) * kStride<T, D> + lane / 8 % 2 * 8;
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            uint32_t left[Groups][4];
#pragma unroll
            for (int group = 0; group < Groups; ++group) a.fragment(left[group], group, k);
#pragma unroll
            for (int n = 0; n < Pieces / 2; ++n) {
                uint32_t right[4];
                ptx::load_matrices(right, row + n * 16 * kStride<T, D> + k * 16);
#pragma unroll
                for (int group = 0; group < Groups; ++group) {
                    ptx::multiply_add<T>(scores[group][2 * n], left[group], right[0], right[1]);
                    ptx::multiply_add<T>(scores[group][2 * n + 1], left[group], right[2], right[3]);
                }
            }
        }
    } else {
        const T* left_row = a.rows + lane / 4 * kStride<T, D>;
        const T* right_row = b + lane % 4 * 2 * kStride<T, D>;
#pragma unroll 1
        for (int k = 0; k < D; k += 4) {
            float4 left[2 * Groups];
#pragma unroll
            for (int i = 0; i < 2 * Groups; ++i)
                left[i] = *reinterpret_cast<const float4*>(left_row + i * 8 * kStride<T, D> + k);
#pragma unroll
            for (int n = 0; n < Pieces; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float4 right =
                        *reinterpret_cast<const float4*>(right_row + (n * 8 + e) * kStride<T, D> + k);
#pragma unroll
                    for (int i = 0; i < 2 * Groups; ++i) {
                        float& sum = scores[i / 2][n][i % 2 * 2 + e];
                        sum = fmaf(left[i].x, right.x, sum);
                        sum = fmaf(left[i].y, right.y, sum);
                        sum = fmaf(left[i].z, right.z, sum);
                        sum = fmaf(left[i].w, right.w, sum);
                    }
                }
        }
    }
}

// sums += a * b: a in the layout of scores (its 16-bit copy is the left operand as it stands), b is
// [8 * Pieces, D] in shared memory.
template <typename T, int D, int Groups, int Pieces>
__device__ inline void multiply_by_columns(float (&sums)[Groups][D / 8][4],
                                           const float (&a)[Groups][Pieces][4], const T* b) {
    const int lane = lane_index();
    if constexpr (kOnTensorCores<T>) {
        const T* row = b + lane % 16 * kStride<T, D> + lane / 16 * 8;
#pragma unroll
        for (int k = 0; k < Pieces / 2; ++k) {
            uint32_t left[Groups][4];
#pragma unroll
            for (int group = 0; group < Groups; ++group)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float (&from)[4] = a[group][2 * k + i / 2];
                    left[group][i] = pack<T>(from[i % 2 * 2], from[i % 2 * 2 + 1]);
                }
#pragma unroll
            for (int n = 0; n < D / 16; ++n) {
                uint32_t right[4];
                ptx::load_matrices_transposed(right, row + k * 16 * kStride<T, D> + n * 16);
#pragma unroll
                for (int group = 0; group < Groups; ++group) {
                    ptx::multiply_add<T>(sums[group][2 * n], left[group], right[0], right[1]);
                    ptx::multiply_add<T>(sums[group][2 * n + 1], left[group], right[2], right[3]);
                }
            }
        }
    } else {
        const T* row = b + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < Pieces; ++n)
#pragma unroll
            for (int i = 0; i < 8;
                 ++i) {  // column n * 8 + i is held by lane i / 2 of the four that share a row
                float left[2 * Groups];
#pragma unroll
                for (int r = 0; r < 2 * Groups; ++r)
                    left[r] = __shfl_sync(kAllLanes, a[r / 2][n][r % 2 * 2 + i % 2], i / 2, 4);
#pragma unroll
                for (int d = 0; d < D / 8; ++d) {
                    const float2 right =
                        *reinterpret_cast<const float2*>(row + (n * 8 + i) * kStride<T, D> + d * 8);
#pragma unroll
                    for (int r = 0; r < 2 * Groups; ++r) {
                        sums[r / 2][d][r % 2 * 2] = fmaf(left[r], right.x, sums[r / 2][d][r % 2 * 2]);
                        sums[r / 2][d][r % 2 * 2 + 1] = fmaf(left[r], right.y, sums[r / 2][d][r % 2 * 2 + 1]);
                    }
                }
            }
    }
}

template <int Groups, int N>
__device__ inline void set_zero(float (&to)[Groups][N][4]) {
#pragma unroll
    for (int group = 0; group < Groups; ++group)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) to[group][n][i] = 0.0f;
}

// ------------------------------------------------------------------------------- which keys are seen

// Bit i: key first + i of the sequence is there and not masked. The same for all lanes.
__device__ inline uint32_t seen_keys(const bool* key_mask, const Sequence& s, int first) {
    const int key = first + lane_index();
    bool seen = key < s.len_k;
    if (seen && key_mask != nullptr) seen = key_mask[s.start_k + key];
    return __ballot_sync(kAllLanes, seen);
}

// ------------------------------------------------------------------------------- dropout

__device__ inline uint32_t kept_words(const Dropout& dropout, const PhiloxKey& key, uint32_t group,
                                      uint32_t row, uint32_t head) {
    const uint4 words = philox(key, group, row, head);
    return (words.x >= dropout.threshold ? 1u : 0u) | (words.y >= dropout.threshold ? 2u : 0u) |
           (words.z >= dropout.threshold ? 4u : 0u) | (words.w >= dropout.threshold ? 8u : 0u);
}

// For a 16 x 8 piece of scores whose rows are queries: bit i tells whether this lane's element i is kept.
// Philox gives four neighbouring keys of a query at a time, which two lanes share: one of them draws for row
// g, the other for row g + 8.
__device__ inline uint32_t kept_along_keys(const Dropout& dropout, const PhiloxKey& key, uint32_t first_query,
                                           uint32_t first_key, uint32_t head) {
    const uint32_t lane = static_cast<uint32_t>(lane_index()), odd = lane & 1u;
    const uint32_t mine =
        kept_words(dropout, key, first_key / 4 + (lane >> 1 & 1u), first_query + lane / 4 + 8 * odd, head);
    const uint32_t other = __shfl_xor_sync(kAllLanes, mine, 1);
    return odd ? other >> 2 | (mine >> 2) << 2 : (mine & 3u) | (other & 3u) << 2;
}

// The same where rows are keys and columns queries: four lanes hold four neighbouring keys of 2 x 2 places,
// and each of them draws for one place.
__device__ inline uint32_t kept_along_queries(const Dropout& dropout, const PhiloxKey& key,
                                              uint32_t first_query, uint32_t first_key, uint32_t head) {
    const uint32_t lane = static_cast<uint32_t>(lane_index());
    const uint32_t g = lane / 4, t = lane % 4, place = g % 4;
    uint32_t bits = kept_words(dropout, key, (first_key + place / 2 * 8 + g / 4 * 4) / 4,
                               first_query + 2 * t + place % 2, head)
                    << 4 * place;
    bits |= __shfl_xor_sync(kAllLanes, bits, 4);
    bits |= __shfl_xor_sync(kAllLanes, bits, 8);
    bits >>= place;
    return (bits & 1u) | (bits >> 3 & 2u) | (bits >> 6 & 4u) | (bits >> 9 & 8u);
}

// ------------------------------------------------------------------------------- shared to global memory

// Lane t of each four gives words[i] to lane i and gets lane i's words[t] in its place.
__device__ inline void transpose_among_four(uint32_t (&words)[4]) {
    const bool odd = lane_index() & 1, high = lane_index() & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const uint32_t got = __shfl_xor_sync(kAllLanes, odd ? words[i] : words[i + 1], 1);
        words[i] = odd ? got : words[i];
        words[i + 1] = odd ? words[i + 1] : got;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t got = __shfl_xor_sync(kAllLanes, high ? words[i] : words[i + 2], 2);
        words[i] = high ? got : words[i];
        words[i + 2] = high ? words[i + 2] : got;
    }
}

// Stores the 16 rows of a group, times a factor each, where `valid` (index 0: row g, 1: row g + 8), as whole
// 32-byte sectors. `to` is where row g = 0 begins.
template <typename T, int D>
__device__ inline void store_rows(T* to, int64_t row_stride, const float (&rows)[D / 8][4],
                                  const float (&factor)[2], const bool (&valid)[2], int head_dim) {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        T* row = to + (g + 8 * half) * row_stride;
        const float f = factor[half];
        if constexpr (kOnTensorCores<T>) {
#pragma unroll
            for (int n = 0; n < D / 32; ++n) {
                uint32_t words[4];
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    words[i] = pack<T>(rows[4 * n + i][2 * half] * f, rows[4 * n + i][2 * half + 1] * f);
                transpose_among_four(words);
                const int column = 32 * n + 8 * t;
                if (valid[half] && column < head_dim)
                    *reinterpret_cast<uint4*>(row + column) =
                        make_uint4(words[0], words[1], words[2], words[3]);
            }
        } else {
#pragma unroll
            for (int n = 0; n < D / 8; ++n)
                if (valid[half] && 8 * n < head_dim)
                    *reinterpret_cast<float2*>(row + 8 * n + 2 * t) =
                        make_float2(rows[n][2 * half] * f, rows[n][2 * half + 1] * f);
        }
    }
}

// ------------------------------------------------------------------------------- launching

// Where there are rows there are blocks, though it be to clear them.
inline Sizes sizes_of(const AttentionArgs& a) {
    const auto longest = [](int64_t most, int64_t total) { return most < 1 && total > 0 ? 1 : most; };
    return {a.batch,
            a.heads,
            a.head_dim,
            longest(a.max_seqlen_q, a.total_q),
            longest(a.max_seqlen_k, a.total_k),
            a.dtype,
            a.causal,
            a.dropout.seed != nullptr};
}

// Launches blocks for all of a plan's work. kernel(a, first, ...): its block i does piece first + i of the
// work.
template <typename Plan, typename Kernel, typename... More>
void launch_all(Kernel* kernel, const AttentionArgs& a, const Plan& plan, More... more) {
    for (int64_t first = 0; first < plan.work; first += kMostBlocks) {
        const int64_t blocks = plan.work - first < kMostBlocks ? plan.work - first : kMostBlocks;
        launch(kernel,
               {dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(plan.warps * kWarp)),
                plan.shared_bytes, a.stream},
               a, first, more...);
    }
}

}  // namespace rk::cuda::attention
