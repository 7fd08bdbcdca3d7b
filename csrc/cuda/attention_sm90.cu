// Attention forward on Hopper, for the sequence lengths of RoBERTa.
//
// Idea. At 512 tokens and head dim 64 all keys and values of a head are 128 KiB and fit in the shared memory of one
// multiprocessor. So a block loads them once for a (sequence, head) and walks the 64-row query tiles over them; only
// sequences longer than the ring (640 keys at head dim 64) are streamed, once for every three query tiles. Scores come from wgmma
// with the queries in registers and the keys in shared memory; the probabilities stay in registers as the first operand
// of the second wgmma, with the values in shared memory as they came. While a warpgroup takes the exponentials of one chunk
// of 64 keys, the tensor cores multiply its previous chunk with the values, and the other warpgroups' chunks.
// The running maximum is moved only when it has grown by more than 2^8: usually it is that of the first chunk, and the
// accumulators are never rescaled. (The sums are exact in either case: maximum and log-sum-exp belong together.)
//
// Roles. One block per multiprocessor, persistent. Warpgroup 0 gives its registers away; one thread of it finds the
// block's work and has the copy engine bring queries, keys and values. The other warpgroups (three; two at head dim 128)
// each take a query tile at a time, in turn, across sequences: short sequences keep all of them busy.
// - A query tile comes through a buffer of its warpgroup, together with a Unit that says what to do with it.
// - Keys and values come through a ring of slots of 64 keys. A slot is free again when every warpgroup has released it:
//   after its last tile of that (sequence, head); for a warpgroup that has none, the producer does it.
// Rows past the end of a sequence belong to the next one and may hold anything. Queries: such rows are not stored. Keys:
// masked. Values: 0 * NaN is NaN, so they are overwritten with zeros in shared memory.
//
// Scheduling. The host never reads cu_seqlens. All (sequence, head, query tile) units in that order are weighed by
// their keys; each block takes the contiguous stretch that begins in its share of the total weight. So uneven lengths
// balance to within one unit with no counter in memory and no sorting, and all but the boundary heads are loaded by one block.
//
// Floor, for one head of n queries and keys and head dim d: 4 n n d flops, n n exponentials, 8 n d bytes (q, k, v, out at
// 2 bytes). At n = 512, d = 64: 67 Mflop (68 ns of 990 Tflop/s), 262144 exponentials (16 a clock and multiprocessor: 71 ns over
// 132 at 1.75 GHz), 256 KiB (55 ns at 4.8 TB/s). At n = 128: 4.2, 4.4 and 14 ns. So memory bounds it below some 400 tokens, and
// the exponentials as much as the products above.
//
// Shared memory at head dim 64: keys 10 x 8 KiB, values 10 x 8 KiB, queries 3 x 2 x 8 KiB, barriers, units.
// Registers: 512 threads start with 128 each; producer 32, consumers 160 (head dim 128: 384 threads, 24 and 240).
#include "csrc/cuda/attention_sm90.h"

#include <launch.cuh>
#include <ptx.cuh>
#include <ptx_sm90.cuh>
#include <tensor_map.cuh>

#include <algorithm>

#include "csrc/cuda/common.cuh"
#include "csrc/cuda/dropout.cuh"
#include "csrc/cuda/matrix_descriptor.cuh"

namespace rk::cuda {
namespace {

constexpr int kTile = 64;        // queries of a tile, keys of a chunk
constexpr int kWarpgroup = 128;  // threads
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kGrowth = 8.0f;  // in units of log2, before the running maximum is moved
constexpr int kTileWeight = 2;   // what a query tile costs besides its chunks, in chunks

template <int HeadDim>
struct Plan {
    static constexpr int kPanel = HeadDim < 64 ? HeadDim : 64;  // columns of a box: one swizzled row
    static constexpr int kPanels = HeadDim / kPanel;
    static constexpr int kRowBytes = 2 * kPanel;
    static constexpr int kPanelBytes = kTile * kRowBytes;
    static constexpr int kTileBytes = kPanels * kPanelBytes;

    static constexpr int kConsumers = HeadDim == 128 ? 2 : 3;  // warpgroups
    static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
    static constexpr int kProducerRegisters = 40;
    static constexpr int kConsumerRegisters = HeadDim == 128 ? 232 : 152;
    static constexpr int kSlots = HeadDim == 128 ? 6 : HeadDim == 64 ? 10 : 16;
    static constexpr int kQueryBuffers = HeadDim == 128 ? 1 : 2;  // for each consumer
    static constexpr int kQueries = kConsumers * kQueryBuffers;
};

// What a consumer does with a query tile.
struct alignas(16) Unit {
    int32_t rows;       // of the tile that exist; 0: no more work
    int32_t first_row;  // packed
    int32_t head;
    int32_t first_key;  // packed
    int32_t keys;       // of the sequence
    int32_t diagonal;   // query i of the tile sees the keys up to i + diagonal
    int32_t chunks;     // that some query of the tile sees
    int32_t held;       // chunks to release afterwards, seen or not; 0: another tile of this consumer needs them
    int32_t use;        // number of the first chunk, counted over all that the block loads
    int32_t padding[3];
};

template <int HeadDim>
struct Shared {
    using P = Plan<HeadDim>;
    unsigned char keys[P::kSlots][P::kTileBytes];
    unsigned char values[P::kSlots][P::kTileBytes];
    unsigned char queries[P::kQueries][P::kTileBytes];
    Unit units[P::kQueries];
    uint64_t query_full[P::kQueries], query_free[P::kQueries];
    uint64_t keys_full[P::kSlots], values_full[P::kSlots], slot_free[P::kSlots];
};

struct Problem {
    CUtensorMap q, k, v;
    const int32_t *cu_seqlens_q, *cu_seqlens_k;
    const bool* key_mask;
    int32_t batch, heads;
    float score_scale;                 // |scale| * log2(e), or 1
    uint32_t query_and, query_negate;  // what makes queries of a negative or zero scale, two a word
    bool causal;
    Dropout dropout;
    void* out;
    float* lse;
    int64_t total_q;
};

// The n-th use of one of `count` places in a row, and the parity of the barrier phases that belong to it.
struct Turn {
    int place, parity;
};
__device__ __forceinline__ Turn turn(int n, int count) {
    return {n % count, n / count & 1};
}

__device__ __forceinline__ int tiles_of(int length) {
    return (length + kTile - 1) / kTile;
}

// ------------------------------------------------------------------------------------------------ producer

struct Sequence {
    int first_q, len_q, first_k, len_k;

    __device__ int unit_weight() const { return tiles_of(len_k) + kTileWeight; }
    __device__ int weight(int heads) const { return heads * tiles_of(len_q) * unit_weight(); }
};

__device__ __forceinline__ Sequence sequence(const Problem& p, int b) {
    const int q = __ldg(p.cu_seqlens_q + b), k = __ldg(p.cu_seqlens_k + b);
    return {q, __ldg(p.cu_seqlens_q + b + 1) - q, k, __ldg(p.cu_seqlens_k + b + 1) - k};
}

// A block's share of all units: those whose weights begin in [from, to) of the running total; the first of them belongs to
// `sequence` or to one after it, whose units begin at `begin`.
struct Share {
    int from, to, begin, sequence;
};

// By a whole warp. Every block computes it for itself, from two passes over cu_seqlens.
__device__ __forceinline__ Share share_of_block(const Problem& p) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    int total = 0;
    for (int b = lane; b < p.batch; b += kWarp) total += sequence(p, b).weight(p.heads);
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
        total += __shfl_xor_sync(kAllLanes, total, distance);
    const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
    const auto start = [&](int i) { return total / blocks * i + total % blocks * i / blocks; };  // total * i / blocks
    Share share{start(block), start(block + 1), 0, p.batch};
    for (int first = 0; first < p.batch; first += kWarp) {
        const int weight = first + lane < p.batch ? sequence(p, first + lane).weight(p.heads) : 0;
        int sum = weight;  // up to and with this lane's
#pragma unroll
        for (int distance = 1; distance < kWarp; distance *= 2) {
            const int below = __shfl_up_sync(kAllLanes, sum, distance);
            if (lane >= distance) sum += below;
        }
        const unsigned reached = __ballot_sync(kAllLanes, share.begin + sum > share.from);
        if (reached != 0) {
            const int at = __ffs(static_cast<int>(reached)) - 1;
            share.begin += __shfl_sync(kAllLanes, sum - weight, at);
            share.sequence = first + at;
            break;
        }
        share.begin += __shfl_sync(kAllLanes, sum, kWarp - 1);
    }
    return share;
}

// One thread: hands tiles to the consumers and keeps the ring of keys and values full.
template <int HeadDim>
struct Producer {
    using P = Plan<HeadDim>;
    const Problem& problem;
    Shared<HeadDim>& shared;
    int loaded = 0;  // chunks, so far
    int handed = 0;  // tiles, so far: tile n goes to consumer n % kConsumers

    __device__ void load(uint32_t to, const CUtensorMap& map, int head, int row, uint32_t barrier) {
#pragma unroll
        for (int panel = 0; panel < P::kPanels; ++panel)
            ptx::copy_box(to + panel * P::kPanelBytes, &map, panel * P::kPanel, head, row, barrier);
    }

    // The next query buffer, once it is free.
    __device__ int next_buffer() {
        const int consumer = handed % P::kConsumers;
        const Turn mine = turn(handed / P::kConsumers, P::kQueryBuffers);
        const int buffer = consumer * P::kQueryBuffers + mine.place;
        ptx::mbarrier_wait(ptx::shared_address(&shared.query_free[buffer]), mine.parity ^ 1);
        handed += 1;
        return buffer;
    }

    __device__ void hand_out(const Unit& unit) {
        const int buffer = next_buffer();
        shared.units[buffer] = unit;
        const uint32_t full = ptx::shared_address(&shared.query_full[buffer]);
        ptx::mbarrier_arrive_expect_bytes(full, P::kTileBytes);
        load(ptx::shared_address(shared.queries[buffer]), problem.q, unit.head, unit.first_row, full);
    }

    __device__ void load_chunk(int head, int row, int idle_consumers) {
        const Turn mine = turn(loaded, P::kSlots);
        const uint32_t free = ptx::shared_address(&shared.slot_free[mine.place]);
        ptx::mbarrier_wait(free, mine.parity ^ 1);
        if (idle_consumers > 0) ptx::mbarrier_arrive(free, idle_consumers * (kWarpgroup / kWarp));
        const uint32_t keys_full = ptx::shared_address(&shared.keys_full[mine.place]);
        ptx::mbarrier_arrive_expect_bytes(keys_full, P::kTileBytes);
        load(ptx::shared_address(shared.keys[mine.place]), problem.k, head, row, keys_full);
        const uint32_t values_full = ptx::shared_address(&shared.values_full[mine.place]);
        ptx::mbarrier_arrive_expect_bytes(values_full, P::kTileBytes);
        load(ptx::shared_address(shared.values[mine.place]), problem.v, head, row, values_full);
        loaded += 1;
    }

    __device__ Unit unit(const Sequence& s, int head, int tile) const {
        Unit u{};
        u.rows = min(s.len_q - tile * kTile, kTile);
        u.first_row = s.first_q + tile * kTile;
        u.head = head;
        u.first_key = s.first_k;
        u.keys = s.len_k;
        u.diagonal = problem.causal ? tile * kTile + s.len_k - s.len_q : 1 << 30;
        u.chunks = tiles_of(max(min(s.len_k, u.diagonal + u.rows), 0));
        return u;
    }

    // Some query tiles of one head, over one loading of its keys and values.
    __device__ void item(const Sequence& s, int head, int first_tile, int last_tile) {
        const int tiles = last_tile - first_tile;
        const int chunks = unit(s, head, last_tile - 1).chunks;  // the last tile sees the most
        const int first_use = loaded;
        const auto hand = [&](int i) {
            Unit u = unit(s, head, first_tile + i);
            u.use = first_use;
            u.held = i + P::kConsumers >= tiles ? chunks : 0;
            hand_out(u);
        };
        // Tiles that wait for a buffer wait for these keys too: those that find one go first.
        const int at_once = min(tiles, P::kConsumers);
        for (int i = 0; i < at_once; ++i) hand(i);
        for (int c = 0; c < chunks; ++c)
            load_chunk(head, s.first_k + c * kTile, P::kConsumers - at_once);
        for (int i = at_once; i < tiles; ++i) hand(i);
    }

    __device__ void run(const Share& share) {
        int begin = share.begin;
        for (int b = share.sequence; b < problem.batch && begin < share.to; ++b) {
            const Sequence s = sequence(problem, b);
            const int tiles = tiles_of(s.len_q), weight = s.unit_weight();
            const int all = problem.heads * tiles * weight;
            // Units of this sequence that begin before a point of the running total.
            const auto units_before = [&](int at) { return (min(max(at - begin, 0), all) + weight - 1) / weight; };
            int u = units_before(share.from);
            const int last = units_before(share.to);
            const int most = tiles_of(s.len_k) > P::kSlots ? P::kConsumers : tiles;  // of an item
            while (u < last) {
                const int head = u / tiles, tile = u % tiles;
                const int count = min(min(tiles - tile, most), last - u);
                item(s, head, tile, tile + count);
                u += count;
            }
            begin += all;
        }
        for (int consumer = 0; consumer < P::kConsumers; ++consumer) {
            const int buffer = next_buffer();
            shared.units[buffer].rows = 0;
            ptx::mbarrier_arrive(ptx::shared_address(&shared.query_full[buffer]));
        }
    }
};

// ------------------------------------------------------------------------------------------------ consumers

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    const Vector<T, 2> v{{from_float<T>(low), from_float<T>(high)}};
    return *reinterpret_cast<const uint32_t*>(&v);
}

// Four registers of the four neighbouring lanes that share a row: register i of lane j becomes register j of lane i.
__device__ __forceinline__ void transpose_in_quad(uint32_t (&v)[4], int lane) {
    const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const uint32_t other = __shfl_xor_sync(kAllLanes, odd ? v[i] : v[i + 1], 1);
        (odd ? v[i] : v[i + 1]) = other;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t other = __shfl_xor_sync(kAllLanes, upper ? v[i] : v[i + 2], 2);
        (upper ? v[i] : v[i + 2]) = other;
    }
}

// One warpgroup. A thread has two rows of a tile, `row` and row + 8, and of every 8 columns the two from `column` on:
// elements [4 i + 2 r + e] of scores and output are row + 8 r, column + 8 i + e.
template <typename T, int HeadDim, bool Drops>
struct Consumer {
    using P = Plan<HeadDim>;
    static constexpr int kSteps = HeadDim / 16;

    const Problem& problem;
    Shared<HeadDim>& shared;
    const int consumer, lane, row, column;

    __device__ Consumer(const Problem& p, Shared<HeadDim>& s, int which)
        : problem(p),
          shared(s),
          consumer(which),
          lane(static_cast<int>(threadIdx.x) % kWarp),
          row(static_cast<int>(threadIdx.x) % kWarpgroup / kWarp * 16 + lane / 4),
          column(lane % 4 * 2) {}

    __device__ __forceinline__ void arrive(uint64_t& barrier) const {  // one of its 4 warps
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(ptx::shared_address(&barrier));
    }

    __device__ __forceinline__ void load_queries(uint32_t (&q)[kSteps][4], const unsigned char* tile) const {
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int d = 16 * step + column + 8 * (i / 2);
                const int at = d / P::kPanel * P::kPanelBytes + swizzled<P::kRowBytes>(row + 8 * (i % 2), d % P::kPanel * 2);
                q[step][i] = (*reinterpret_cast<const uint32_t*>(tile + at) & problem.query_and) ^ problem.query_negate;
            }
    }

    // scores = queries @ keys^T, under way.
    __device__ __forceinline__ void multiply_keys(float (&scores)[32], const uint32_t (&q)[kSteps][4], int use) const {
        const Turn mine = turn(use, P::kSlots);
        ptx::mbarrier_wait(ptx::shared_address(&shared.keys_full[mine.place]), mine.parity);
        const uint32_t keys = ptx::shared_address(shared.keys[mine.place]);
        ptx::wgmma_fence();
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const int d = 16 * step;
            const uint64_t b = matrix_descriptor<P::kRowBytes>(keys + d / P::kPanel * P::kPanelBytes + d % P::kPanel * 2);
            ptx::wgmma<T, false>(scores, q[step], b, step > 0);
        }
        ptx::wgmma_commit();
    }

    // out += probabilities @ values, under way.
    __device__ __forceinline__ void multiply_values(float (&out)[P::kPanels][P::kPanel / 2],
                                                    const uint32_t (&probabilities)[4][4], int use) const {
        const uint32_t values = ptx::shared_address(shared.values[turn(use, P::kSlots).place]);
        ptx::wgmma_fence();
#pragma unroll
        for (int step = 0; step < kTile / 16; ++step)
#pragma unroll
            for (int panel = 0; panel < P::kPanels; ++panel)
                ptx::wgmma<T, true>(out[panel], probabilities[step],
                                    matrix_descriptor<P::kRowBytes>(values + panel * P::kPanelBytes + step * 16 * P::kRowBytes), 1);
        ptx::wgmma_commit();
    }

    __device__ __forceinline__ void wait_for_values(int use) const {
        const Turn mine = turn(use, P::kSlots);
        ptx::mbarrier_wait(ptx::shared_address(&shared.values_full[mine.place]), mine.parity);
    }

    __device__ __forceinline__ void release(int use) const { arrive(shared.slot_free[turn(use, P::kSlots).place]); }

    // -inf where a query does not see a key of the chunk.
    __device__ __forceinline__ void mask(float (&scores)[32], const Unit& unit, int first) const {
        const int keys = unit.keys - first;  // of the chunk, if less than 64
        uint64_t seen = keys >= 64 ? ~0ull : (1ull << keys) - 1;
        if (problem.key_mask != nullptr) {
            const bool* at = problem.key_mask + unit.first_key + first;
            const unsigned low = __ballot_sync(kAllLanes, lane < keys && at[min(lane, keys - 1)]);
            const unsigned high = __ballot_sync(kAllLanes, lane + kWarp < keys && at[min(lane + kWarp, keys - 1)]);
            seen &= static_cast<uint64_t>(high) << 32 | low;
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int last = row + 8 * r + unit.diagonal - first;  // that the query may see
            uint64_t mine = last >= 63 ? seen : last < 0 ? 0 : seen & ((2ull << last) - 1);
            mine >>= column;
#pragma unroll
            for (int i = 0; i < 8; ++i)
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    if ((mine >> (8 * i + e) & 1) == 0) scores[4 * i + 2 * r + e] = -INFINITY;
        }
    }

    // scores become exp2(score - maximum); factor: what earlier sums must be multiplied by.
    __device__ __forceinline__ void exponentials(float (&scores)[32], float (&maximum)[2], float (&sum)[2],
                                                 float (&factor)[2], float growth) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float most = -INFINITY;
#pragma unroll
            for (int i = 0; i < 8; ++i)
#pragma unroll
                for (int e = 0; e < 2; ++e) most = fmaxf(most, scores[4 * i + 2 * r + e]);
            most = warp_max<4>(most);
            const float before = maximum[r];
            const bool grew = most > before + growth;
            if (grew) maximum[r] = most;
            factor[r] = grew ? ptx::exp2((before - most) * problem.score_scale) : 1.0f;
            const float shift = maximum[r] == -INFINITY ? 0.0f : maximum[r] * problem.score_scale;
            float chunk_sum = 0.0f;
#pragma unroll
            for (int i = 0; i < 8; ++i)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& score = scores[4 * i + 2 * r + e];
                    score = ptx::exp2(fmaf(score, problem.score_scale, -shift));
                    chunk_sum += score;
                }
            sum[r] = fmaf(sum[r], factor[r], chunk_sum);
        }
    }

    // Zeros where dropped. A group of 4 columns belongs to two lanes: the even one draws it for row, the odd one for row + 8,
    // and they swap what they found.
    __device__ __forceinline__ void drop(float (&scores)[32], const Unit& unit, int first, const PhiloxKey& key) const {
        const bool odd = lane & 1;
        const uint32_t counter_row = static_cast<uint32_t>(unit.first_row + row + (odd ? 8 : 0));
        uint32_t mine = 0;  // bit 4 i + w: word w of group i is kept
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const uint4 words = philox(key, static_cast<uint32_t>(first / 4 + 2 * i + lane % 4 / 2), counter_row,
                                       static_cast<uint32_t>(unit.head));
            const uint32_t threshold = problem.dropout.threshold;
            mine |= (static_cast<uint32_t>(words.x >= threshold) | static_cast<uint32_t>(words.y >= threshold) << 1 |
                     static_cast<uint32_t>(words.z >= threshold) << 2 | static_cast<uint32_t>(words.w >= threshold) << 3)
                    << (4 * i);
        }
        const uint32_t other = __shfl_xor_sync(kAllLanes, mine, 1);
        const uint32_t kept[2] = {(odd ? other : mine) >> (odd ? 2 : 0), (odd ? mine : other) >> (odd ? 2 : 0)};
#pragma unroll
        for (int i = 0; i < 32; ++i)
            if ((kept[i / 2 % 2] >> (i / 4 * 4 + i % 2) & 1) == 0) scores[i] = 0.0f;
    }

    // Values past the end of the sequence: zeros. Other warpgroups may be at it too, and reading: they did this before.
    __device__ __forceinline__ void clear_values(int use, int rows) const {
        unsigned char* values = shared.values[turn(use, P::kSlots).place];
        constexpr int kVectors = P::kRowBytes / 16;  // a whole row is cleared: its swizzle does not matter
        for (int panel = 0; panel < P::kPanels; ++panel)
            for (int i = rows * kVectors + static_cast<int>(threadIdx.x) % kWarpgroup; i < kTile * kVectors; i += kWarpgroup)
                *reinterpret_cast<uint4*>(values + panel * P::kPanelBytes + i * 16) = make_uint4(0, 0, 0, 0);
        ptx::fence_shared_async();
        ptx::named_barrier(1 + consumer, kWarpgroup);
    }

    __device__ __forceinline__ void store(const float (&out)[P::kPanels][P::kPanel / 2], const float (&maximum)[2],
                                          float (&sum)[2], const Unit& unit) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float total = warp_sum<4>(sum[r]);
            const float kept_scale = Drops ? problem.dropout.scale : 1.0f;
            const float inverse = total == 0.0f ? 0.0f : kept_scale / total;
            const bool exists = row + 8 * r < unit.rows;
            const int64_t token = unit.first_row + row + 8 * r;
            if (exists && lane % 4 == 0)
                problem.lse[unit.head * problem.total_q + token] =
                    total == 0.0f ? -INFINITY : (maximum[r] * problem.score_scale + log2f(total)) * kLn2;
            T* to = static_cast<T*>(problem.out) + (token * problem.heads + unit.head) * HeadDim;
#pragma unroll
            for (int panel = 0; panel < P::kPanels; ++panel)
#pragma unroll
                for (int half = 0; half < P::kPanel / 32; ++half) {
                    uint32_t v[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int at = 4 * (4 * half + i) + 2 * r;
                        v[i] = pack<T>(out[panel][at] * inverse, out[panel][at + 1] * inverse);
                    }
                    transpose_in_quad(v, lane);
                    if (exists)
                        *reinterpret_cast<uint4*>(to + panel * P::kPanel + 32 * half + 8 * (lane % 4)) =
                            make_uint4(v[0], v[1], v[2], v[3]);
                }
        }
    }

    __device__ __forceinline__ void probabilities_of(uint32_t (&probabilities)[4][4], const float (&scores)[32]) const {
#pragma unroll
        for (int i = 0; i < 16; ++i) probabilities[i / 4][i % 4] = pack<T>(scores[2 * i], scores[2 * i + 1]);
    }

    // What a chunk's scores become, but for the probabilities' rounding: masked, exponentials, dropped.
    __device__ __forceinline__ void softmax(float (&scores)[32], float (&maximum)[2], float (&sum)[2], float (&factor)[2],
                                            const Unit& unit, int chunk, float growth, const PhiloxKey& key) const {
        const int first = chunk * kTile;
        if (first + kTile > unit.keys || first + kTile - 1 > unit.diagonal || problem.key_mask != nullptr)
            mask(scores, unit, first);
        exponentials(scores, maximum, sum, factor, growth);
        if (Drops) drop(scores, unit, first, key);
    }

    __device__ __forceinline__ void tile(const Unit& unit, const uint32_t (&q)[kSteps][4], const PhiloxKey& key) const {
        const float growth = kGrowth / problem.score_scale;
        float out[P::kPanels][P::kPanel / 2];
#pragma unroll
        for (int panel = 0; panel < P::kPanels; ++panel)
#pragma unroll
            for (int i = 0; i < P::kPanel / 2; ++i) out[panel][i] = 0.0f;
        float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f}, factor[2];

        if (unit.chunks > 0) {
            float scores[32];
            uint32_t probabilities[4][4];
            multiply_keys(scores, q, unit.use);
            ptx::wgmma_wait<0>();
            softmax(scores, maximum, sum, factor, unit, 0, growth, key);
            probabilities_of(probabilities, scores);
            for (int chunk = 1; chunk < unit.chunks; ++chunk) {
                wait_for_values(unit.use + chunk - 1);
                multiply_keys(scores, q, unit.use + chunk);
                multiply_values(out, probabilities, unit.use + chunk - 1);
                ptx::wgmma_wait<1>();  // the scores; the values' product goes on
                softmax(scores, maximum, sum, factor, unit, chunk, growth, key);
                ptx::wgmma_wait<0>();
                if (chunk <= unit.held) release(unit.use + chunk - 1);
                if (__any_sync(kAllLanes, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
                    for (int panel = 0; panel < P::kPanels; ++panel)
#pragma unroll
                        for (int i = 0; i < P::kPanel / 2; ++i) out[panel][i] *= factor[i / 2 % 2];
                }
                probabilities_of(probabilities, scores);
            }
            const int last = unit.chunks - 1, rows = unit.keys - last * kTile;
            wait_for_values(unit.use + last);
            if (rows < kTile) clear_values(unit.use + last, rows);
            multiply_values(out, probabilities, unit.use + last);
            ptx::wgmma_wait<0>();
            if (unit.held > 0) release(unit.use + last);
        }
        for (int chunk = unit.chunks; chunk < unit.held; ++chunk) {
            wait_for_values(unit.use + chunk);  // it must have come before it can be released
            release(unit.use + chunk);
        }
        store(out, maximum, sum, unit);
    }

    __device__ __forceinline__ void run() const {
        PhiloxKey key{};
        if (Drops) key = philox_key(problem.dropout);
        for (int n = 0;; ++n) {
            const Turn mine = turn(n, P::kQueryBuffers);
            const int buffer = consumer * P::kQueryBuffers + mine.place;
            ptx::mbarrier_wait(ptx::shared_address(&shared.query_full[buffer]), mine.parity);
            const Unit unit = shared.units[buffer];
            if (unit.rows == 0) return;
            uint32_t q[kSteps][4];
            load_queries(q, shared.queries[buffer]);
            arrive(shared.query_free[buffer]);
            tile(unit, q, key);
        }
    }
};

template <typename T, int HeadDim, bool Drops>
__global__ void __launch_bounds__(Plan<HeadDim>::kThreads, 1)
    attention_sm90_forward_kernel(const __grid_constant__ Problem problem) {
    using P = Plan<HeadDim>;
    Shared<HeadDim>& shared = *reinterpret_cast<Shared<HeadDim>*>(shared_memory());
    if (threadIdx.x == 0) {
        constexpr int kConsumerWarps = kWarpgroup / kWarp;
        for (int i = 0; i < P::kQueries; ++i) {
            ptx::mbarrier_init(ptx::shared_address(&shared.query_full[i]), 1);
            ptx::mbarrier_init(ptx::shared_address(&shared.query_free[i]), kConsumerWarps);
        }
        for (int i = 0; i < P::kSlots; ++i) {
            ptx::mbarrier_init(ptx::shared_address(&shared.keys_full[i]), 1);
            ptx::mbarrier_init(ptx::shared_address(&shared.values_full[i]), 1);
            ptx::mbarrier_init(ptx::shared_address(&shared.slot_free[i]), P::kConsumers * kConsumerWarps);
        }
        ptx::fence_mbarrier_init();
        ptx::prefetch_tensor_map(&problem.q);
        ptx::prefetch_tensor_map(&problem.k);
        ptx::prefetch_tensor_map(&problem.v);
    }
    __syncthreads();
    const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
    if (warpgroup == 0) {
        ptx::give_registers<P::kProducerRegisters>();
        if (threadIdx.x < kWarp) {
            const Share share = share_of_block(problem);
            if (threadIdx.x == 0) Producer<HeadDim>{problem, shared}.run(share);
        }
    } else {
        ptx::take_registers<P::kConsumerRegisters>();
        Consumer<T, HeadDim, Drops>(problem, shared, warpgroup - 1).run();
    }
}

// ------------------------------------------------------------------------------------------------ host

TensorMap3d boxes(const HeadsView& view, int64_t tokens, const AttentionArgs& a) {
    // The stride between heads means nothing where there is one.
    const int64_t head_stride = a.heads == 1 ? a.head_dim : view.head_stride;
    TensorMap3d map{};
    map.data = view.data;
    map.sizes[0] = static_cast<uint64_t>(a.head_dim);
    map.sizes[1] = static_cast<uint64_t>(a.heads);
    map.sizes[2] = static_cast<uint64_t>(tokens);
    map.strides[0] = 2 * static_cast<uint64_t>(head_stride);
    map.strides[1] = 2 * static_cast<uint64_t>(tokens == 1 ? a.heads * head_stride : view.token_stride);
    map.box[0] = static_cast<uint32_t>(std::min<int64_t>(a.head_dim, 64));
    map.box[1] = 1;
    map.box[2] = kTile;
    map.bfloat16 = a.dtype == Dtype::bfloat16;
    return map;
}

// No fewer than there can be, whatever the lengths.
int64_t most_units(const AttentionArgs& a) {
    return a.heads * (a.total_q / kTile + std::min(a.batch, a.total_q));
}
int64_t most_weight(const AttentionArgs& a) {
    return (a.max_seqlen_k + kTile - 1) / kTile + kTileWeight;
}

// What cuTensorMapEncodeTiled asks for.
bool has_boxes(const HeadsView& view, int64_t tokens, const AttentionArgs& a) {
    if (tokens == 0) return true;
    const TensorMap3d map = boxes(view, tokens, a);
    const auto fits = [](uint64_t stride) { return stride % 16 == 0 && stride < uint64_t{1} << 40; };
    return reinterpret_cast<uintptr_t>(map.data) % 16 == 0 && fits(map.strides[0]) && fits(map.strides[1]) &&
           map.strides[0] >= 2 * map.sizes[0] && map.strides[1] >= map.strides[0] * map.sizes[1];
}

template <typename T, int HeadDim>
void forward(const AttentionArgs& a) {
    Problem p{};
    p.q = encode(boxes(a.q, a.total_q, a));
    // Without keys nothing is loaded through their maps, but they must be maps.
    p.k = a.total_k > 0 ? encode(boxes(a.k, a.total_k, a)) : p.q;
    p.v = a.total_k > 0 ? encode(boxes(a.v, a.total_k, a)) : p.q;
    p.cu_seqlens_q = a.cu_seqlens_q;
    p.cu_seqlens_k = a.cu_seqlens_k;
    p.key_mask = a.key_mask;
    p.batch = static_cast<int32_t>(a.batch);
    p.heads = static_cast<int32_t>(a.heads);
    // The maximum of scores is that of scaled scores if the scale is positive: its sign, or zero, goes to the queries.
    p.score_scale = a.scale == 0.0f ? 1.0f : (a.scale < 0.0f ? -a.scale : a.scale) * kLog2e;
    p.query_and = a.scale == 0.0f ? 0u : ~0u;
    p.query_negate = a.scale < 0.0f ? 0x80008000u : 0u;
    p.causal = a.causal;
    p.dropout = a.dropout;
    p.out = a.out;
    p.lse = a.lse;
    p.total_q = a.total_q;
    const int64_t blocks = std::min<int64_t>(current_device().multiprocessors, most_units(a));
    const Launch how{dim3(static_cast<unsigned>(blocks)), dim3(Plan<HeadDim>::kThreads), sizeof(Shared<HeadDim>), a.stream};
    if (a.dropout.seed != nullptr)
        launch(attention_sm90_forward_kernel<T, HeadDim, true>, how, p);
    else
        launch(attention_sm90_forward_kernel<T, HeadDim, false>, how, p);
}

template <typename T>
void forward_of(const AttentionArgs& a) {
    if (a.head_dim == 32)
        forward<T, 32>(a);
    else if (a.head_dim == 64)
        forward<T, 64>(a);
    else
        forward<T, 128>(a);
}

}  // namespace

bool attention_sm90_supports(const AttentionArgs& a) {
    return (a.dtype == Dtype::bfloat16 || a.dtype == Dtype::float16) &&
           (a.head_dim == 32 || a.head_dim == 64 || a.head_dim == 128) && most_units(a) <= INT32_MAX / 2 / most_weight(a) &&
           has_boxes(a.q, a.total_q, a) && has_boxes(a.k, a.total_k, a) &&
           has_boxes(a.v, a.total_k, a);
}

void attention_sm90_forward(const AttentionArgs& a) {
    if (a.total_q == 0 || a.heads == 0) return;
    if (a.dtype == Dtype::bfloat16)
        forward_of<__nv_bfloat16>(a);
    else
        forward_of<__half>(a);
}

}  // namespace rk::cuda
