// What the Hopper attention kernels share: how a block finds its work, brings it into shared memory, and
// multiplies.
//
// A kernel has tiles and chunks, of 64 rows each. A tile belongs to one warpgroup, which keeps its rows in
// registers as the first operand of wgmma; chunks are what it walks over, in shared memory as the second
// operand, and are shared by all warpgroups of the block. Forward and the gradient of the queries have tiles
// of queries and chunks of keys and values; the gradients of keys and values have it the other way around.
//
// Roles. One block per multiprocessor, persistent. Warpgroup 0 gives its registers away; one thread of it,
// the producer, walks the block's work and has the copy engine bring tiles and chunks. The other warpgroups,
// the consumers, take a tile at a time, in turn, across heads and sequences: short sequences keep all of them
// busy.
// - A tile comes through a buffer of its consumer, together with a Unit that says what to do with it.
// - Chunks come through a ring of slots. Those of one (sequence, head) stay as long as the block has tiles of
//   it: they are loaded once where they fit in the ring, else once for every round of tiles. A slot is free
//   when every consumer has released it: after its last tile of that (sequence, head); for a consumer that has
//   none, the producer does it.
// Rows past the end of a sequence belong to the next one and may hold anything. In tiles such rows are not
// stored; scores of such chunk rows are masked; where 0 * NaN would be NaN, they are overwritten with zeros
// in shared memory.
//
// Scheduling. The host never reads cu_seqlens. All (sequence, head, tile) units in that order are weighed by
// their chunks; each block takes the contiguous stretch that begins in its share of the total weight. So
// uneven lengths balance to within one unit, with no counter in memory and no sorting, and only the chunks of
// heads on a boundary are loaded by two blocks.
#pragma once
#include <algorithm>
#include <launch.cuh>
#include <ptx.cuh>
#include <ptx_sm90.cuh>
#include <tensor_map.cuh>

#include "csrc/cuda/attention_sm90.h"
#include "csrc/cuda/common.cuh"
#include "csrc/cuda/dropout.cuh"
#include "csrc/cuda/matrix_descriptor.cuh"

namespace rk::cuda::sm90 {

constexpr int kTile = 64;        // rows of tiles and chunks
constexpr int kWarpgroup = 128;  // threads
constexpr int kWarpsOfGroup = kWarpgroup / kWarp;
constexpr int kTileWeight = 2;  // what a tile costs besides its chunks, in chunks
// Of a multiprocessor: 64 K registers, and what a block may take of its shared memory. The swizzled layouts
// repeat every 8 rows of 128 bytes, where wgmma's matrices must begin.
constexpr int kRegisters = 65536, kMostShared = 227 * 1024, kPattern = 1024;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kGrowth = 8.0f;  // of forward's maximum before it is moved, in units of log2

// TileTensors, ChunkTensors: how many tensors a tile and a chunk are rows of. Consumers: warpgroups. Buffers:
// for tiles, of each consumer. Whole: a (sequence, head) has no more tiles than there are consumers, which
// work on them at the same time, together. Registers of 65536: the producer's warpgroup has 40 a thread.
template <int HeadDim, int TileTensors, int Consumers, int Slots, int Buffers, int ChunkTensors = 2,
          bool Whole = false>
struct Plan {
    static constexpr int kHeadDim = HeadDim, kTileTensors = TileTensors, kConsumers = Consumers,
                         kSlots = Slots;
    static constexpr int kBuffers = Buffers, kChunkTensors = ChunkTensors;
    static constexpr bool kWhole = Whole;
    static constexpr int kPanel = HeadDim < 64 ? HeadDim : 64;  // columns of a box: one swizzled row
    static constexpr int kPanels = HeadDim / kPanel;
    static constexpr int kRowBytes = 2 * kPanel;
    static constexpr int kPanelBytes = kTile * kRowBytes;
    static constexpr int kTileBytes = kPanels * kPanelBytes;
    static constexpr int kSteps = HeadDim / 16;
    static constexpr int kThreads = (1 + Consumers) * kWarpgroup;
    static constexpr int kProducerRegisters = 40;
    static constexpr int kConsumerRegisters = Consumers == 2 ? 232 : 152;
    static constexpr int kEntryRegisters = kRegisters / kThreads / 8 * 8;

    static_assert(kPanelBytes % kPattern == 0, "every panel begins where the swizzle's pattern does");
    static_assert(kPanels * kPanel == HeadDim && kSteps * 16 == HeadDim, "whole panels and steps");
    static_assert(kProducerRegisters <= kEntryRegisters && kConsumerRegisters >= kEntryRegisters,
                  "setmaxnreg.dec gives, .inc takes");
    static_assert(kProducerRegisters + Consumers * kConsumerRegisters <= (1 + Consumers) * kEntryRegisters,
                  "the block has no more registers than it was launched with");
    static_assert(TileTensors * kTileBytes < 1 << 20, "bytes that a phase of an mbarrier can expect");
    static_assert(!Whole || Consumers == 2, "a consumer has one partner, or none");
};

// What a consumer does with a tile.
struct alignas(16) Unit {
    int32_t rows;       // of the tile that exist; 0: no more work
    int32_t first_row;  // of the tile, packed
    int32_t head;
    int32_t first_other;  // first row of the sequence on the chunks' side, packed
    int32_t others;       // rows of the sequence on the chunks' side
    int32_t diagonal;  // row i of the tile and row j on the chunks' side see each other if j <= i + diagonal
                       // (>= for keys)
    int32_t first_chunk;  // of those that some row of the tile sees
    int32_t chunks;
    int32_t use;   // number of the first chunk that was loaded for this tile and others, counted over all of
                   // the block
    int32_t skip;  // chunks between that one and first_chunk
    int32_t held;  // chunks to release, seen or not; 0: another tile of this consumer needs them
    int32_t first_in_sequence;  // row of the tile
    int32_t partner;  // Whole: which of the other consumer's tiles belongs to the same head; -1: none
};

template <class P>
struct alignas(kPattern) Shared {
    unsigned char chunks[P::kChunkTensors][P::kSlots][P::kTileBytes];
    unsigned char tiles[P::kConsumers][P::kBuffers][P::kTileTensors][P::kTileBytes];
    Unit units[P::kConsumers][P::kBuffers];
    uint64_t tile_full[P::kConsumers][P::kBuffers], tile_free[P::kConsumers][P::kBuffers];
    uint64_t chunk_full[P::kChunkTensors][P::kSlots], slot_free[P::kSlots];
};

struct Problem {  // an argument of the kernels: maps must lie in parameter space
    CUtensorMap tiles[3], chunks[3];
    const int32_t *tile_seqlens, *chunk_seqlens;  // cu_seqlens of either side
    const bool* key_mask;
    int32_t batch, heads;
    int32_t tile_rows, chunk_rows;    // of the tensors on either side
    int32_t most_tiles, most_chunks;  // rows of a sequence: more belong to none
    float score_scale;                // |scale| * log2(e), or 1 where the scale is 0
    float growth;                     // of the largest score before the running maximum is moved
    uint32_t and_bits,
        negative_bits;  // what gives one factor of the scores the sign of the scale, or makes it 0
    bool causal;
    Dropout dropout;
    float scale;
    float* lse;
    bool clears_lse;  // forward, which writes it
    float2* statistics;
    int64_t total_q;
    void* out[2];     // [T, heads, head_dim], of the tiles' rows
    void* chunk_out;  // likewise of the chunks' rows, or null
};

// The n-th use of one of `count` places in a row, and the phase of the place's barriers that belongs to it.
struct Turn {
    int place, phase;
};
__device__ __forceinline__ Turn turn(int n, int count) {
    return {n % count, n / count};
}

__device__ __forceinline__ int tiles_of(int length) {
    return (length + kTile - 1) / kTile;
}

// ------------------------------------------------------------------------------------------------ producer

struct Sequence {
    int first_tile_row, tile_rows, first_chunk_row, chunk_rows;

    __device__ int tile_weight() const { return tiles_of(chunk_rows) + kTileWeight; }
    __device__ int weight(int heads) const { return heads * tiles_of(tile_rows) * tile_weight(); }
};

__device__ __forceinline__ Sequence sequence(const Problem& p, int b) {
    const int t = __ldg(p.tile_seqlens + b), c = __ldg(p.chunk_seqlens + b);
    return {t, min(__ldg(p.tile_seqlens + b + 1) - t, p.most_tiles), c,
            min(__ldg(p.chunk_seqlens + b + 1) - c, p.most_chunks)};
}

// By the producer's warpgroup but for its first warp: rows of one side's outputs that no tile writes, from
// from_of(sequence) up to the next one or the last row, become zeros, and their log-sum-exp -inf. Blocks take
// rows in turn.
template <int HeadDim, typename FromOf>
__device__ __forceinline__ void clear_side(const Problem& p, const int32_t* seqlens, int rows,
                                           void* first_out, void* second_out, bool clears_lse,
                                           const FromOf& from_of) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp - 1;
    for (int first = warp * kWarp; first < p.batch; first += (kWarpsOfGroup - 1) * kWarp) {
        int from = 0, end = 0;
        if (const int b = first + lane; b < p.batch) {
            from = from_of(sequence(p, b));
            end = b + 1 == p.batch ? rows : __ldg(seqlens + b + 1);
        }
        for (unsigned left = __ballot_sync(kAllLanes, from < end); left != 0; left &= left - 1) {
            const int at = __ffs(static_cast<int>(left)) - 1;
            const int last = __shfl_sync(kAllLanes, end, at), pieces = p.heads * HeadDim / 8;
            int row = __shfl_sync(kAllLanes, from, at) + static_cast<int>(blockIdx.x);
            for (; row < last; row += static_cast<int>(gridDim.x)) {
                for (void* out : {first_out, second_out})
                    for (int i = lane; out != nullptr && i < pieces; i += kWarp)
                        static_cast<uint4*>(out)[int64_t{row} * pieces + i] = make_uint4(0, 0, 0, 0);
                for (int head = lane; clears_lse && head < p.heads; head += kWarp)
                    p.lse[head * p.total_q + row] = -INFINITY;
            }
        }
    }
}

// Rows that belong to no sequence: past the most rows of one, or past the last one. Of the chunks' side also
// those of a sequence without tiles, whose chunks nobody walks over.
template <int HeadDim>
__device__ __forceinline__ void clear_rest(const Problem& p) {
    clear_side<HeadDim>(p, p.tile_seqlens, p.tile_rows, p.out[0], p.out[1], p.clears_lse,
                        [](const Sequence& s) { return s.first_tile_row + s.tile_rows; });
    if (p.chunk_out != nullptr)
        clear_side<HeadDim>(
            p, p.chunk_seqlens, p.chunk_rows, p.chunk_out, nullptr, false,
            [](const Sequence& s) { return s.first_chunk_row + (s.tile_rows > 0 ? s.chunk_rows : 0); });
}

// A block's share of all units: those whose weights begin in [from, to) of the running total; the first of
// them belongs to `sequence` or to one after it, whose units begin at `begin`.
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
    const auto start = [&](int i) {
        return total / blocks * i + total % blocks * i / blocks;
    };  // total * i / blocks
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

// One thread: hands tiles to the consumers and keeps the ring of chunks full. OfKeys: tiles are of keys, else
// of queries.
template <class P, bool OfKeys>
struct Producer {
    const Problem& problem;
    Shared<P>& shared;
    int loaded = 0;    // chunks, so far
    int unwaited = 0;  // of those before this one, some may have a consumer that did not wait for them
    int handed = 0;    // tiles, so far: tile n goes to consumer n % kConsumers

    __device__ void load(unsigned char* to, const CUtensorMap& map, int head, int row, uint32_t barrier) {
#pragma unroll
        for (int panel = 0; panel < P::kPanels; ++panel)
            ptx::copy_box(ptx::shared_address(to + panel * P::kPanelBytes), &map, panel * P::kPanel, head,
                          row, barrier);
    }

    // Waits for the buffer of tile n.
    __device__ void await_buffer(int n) {
        const Turn its = turn(n / P::kConsumers, P::kBuffers);
        ptx::mbarrier_wait(ptx::shared_address(&shared.tile_free[n % P::kConsumers][its.place]),
                           its.phase - 1);
    }

    // Waits for the next buffer, gives it the unit, and the tile if there is one.
    __device__ void hand_out(const Unit& unit) {
        const int consumer = handed % P::kConsumers;
        const Turn mine = turn(handed / P::kConsumers, P::kBuffers);
        await_buffer(handed);
        handed += 1;
        shared.units[consumer][mine.place] = unit;
        const uint32_t full = ptx::shared_address(&shared.tile_full[consumer][mine.place]);
        if (unit.rows == 0) {
            ptx::mbarrier_arrive(full);
            return;
        }
        ptx::mbarrier_arrive_expect_bytes(full, P::kTileTensors * P::kTileBytes);
#pragma unroll
        for (int i = 0; i < P::kTileTensors; ++i)
            load(shared.tiles[consumer][mine.place][i], problem.tiles[i], unit.head, unit.first_row, full);
    }

    __device__ void load_chunk(int head, int row, int idle_consumers) {
        const Turn mine = turn(loaded, P::kSlots);
        loaded += 1;
        const uint32_t free = ptx::shared_address(&shared.slot_free[mine.place]);
        ptx::mbarrier_wait(free, mine.phase - 1);
        if (idle_consumers > 0) ptx::mbarrier_arrive(free, idle_consumers * kWarpsOfGroup);
#pragma unroll
        for (int i = 0; i < P::kChunkTensors; ++i) {
            const uint32_t full = ptx::shared_address(&shared.chunk_full[i][mine.place]);
            ptx::mbarrier_arrive_expect_bytes(full, P::kTileBytes);
            load(shared.chunks[i][mine.place], problem.chunks[i], head, row, full);
        }
    }

    // Invariant: no waiter is more than one phase ahead of a barrier, since a wait knows its phase by parity
    // alone. Everyone who waits for each phase in turn keeps it. A consumer without a tile in an item does
    // not: it may wait for the next load of a slot while the load before is still under way, and would go on
    // at once. So it gets no tile whose chunks go where such loads are: those before them are over. (All
    // earlier ones are, since the slot was free again.) Where every consumer had a tile, nobody waits here.
    __device__ void await_unwaited(int chunks) {
        for (int use = max(loaded - P::kSlots, 0); use < min(unwaited, loaded + chunks - P::kSlots); ++use) {
            const Turn before = turn(use, P::kSlots);
            for (int i = 0; i < P::kChunkTensors; ++i)
                ptx::mbarrier_wait(ptx::shared_address(&shared.chunk_full[i][before.place]), before.phase);
        }
    }

    __device__ Unit unit(const Sequence& s, int head, int tile) const {
        Unit u{};
        u.rows = min(s.tile_rows - tile * kTile, kTile);
        u.first_row = s.first_tile_row + tile * kTile;
        u.first_in_sequence = tile * kTile;
        u.head = head;
        u.first_other = s.first_chunk_row;
        u.others = s.chunk_rows;
        const int all = tiles_of(s.chunk_rows);
        if (P::kWhole || !problem.causal) {
            u.diagonal = OfKeys ? -(1 << 30) : 1 << 30;
            u.chunks = all;
        } else {
            // Query i sees the keys up to i + len_k - len_q.
            u.diagonal = tile * kTile + s.chunk_rows - s.tile_rows;  // of keys: chunk rows are the queries
            if (OfKeys) u.first_chunk = min(max(u.diagonal, 0) / kTile, all);
            u.chunks =
                (OfKeys ? all : tiles_of(max(min(s.chunk_rows, u.diagonal + u.rows), 0))) - u.first_chunk;
        }
        return u;
    }

    // Some tiles of one head, over one loading of its chunks.
    __device__ void item(const Sequence& s, int head, int first_tile, int tiles) {
        // Of keys, the first tile sees the most; of queries, the last.
        const Unit most = unit(s, head, OfKeys ? first_tile : first_tile + tiles - 1);
        const int use = loaded;
        const auto hand = [&](int i) {
            Unit u = unit(s, head, first_tile + i);
            u.use = use;
            u.skip = u.first_chunk - most.first_chunk;
            u.held = P::kWhole || i + P::kConsumers >= tiles ? most.chunks : 0;
            if constexpr (P::kWhole)
                u.partner = tiles == 2 ? (handed + (i == 0 ? 1 : -1)) / P::kConsumers : -1;
            hand_out(u);
        };
        // A consumer that has its tile of a head waits for the load of its partner's too. By the invariant
        // above the load before that must be over: so both buffers are free before either is handed out.
        if constexpr (P::kWhole)
            for (int i = 0; i < tiles; ++i) await_buffer(handed + i);
        // A tile after the first of its consumer waits for that to be done with, and so for the chunks.
        const int at_once = min(tiles, P::kConsumers);
        await_unwaited(most.chunks);
        for (int i = 0; i < at_once; ++i) hand(i);
        for (int c = 0; c < most.chunks; ++c)
            load_chunk(head, s.first_chunk_row + (most.first_chunk + c) * kTile, P::kConsumers - at_once);
        if (at_once < P::kConsumers) unwaited = loaded;
        if constexpr (!P::kWhole)
            for (int i = at_once; i < tiles; ++i) hand(i);
    }

    __device__ void run(const Share& share) {
        int begin = share.begin;
        for (int b = share.sequence; b < problem.batch && begin < share.to; ++b) {
            const Sequence s = sequence(problem, b);
            // A unit is a tile; or, where its tiles stay together, a head.
            const int tiles = tiles_of(s.tile_rows);
            const int weight = (P::kWhole ? max(tiles, 1) : 1) * s.tile_weight();
            const int all = problem.heads * (P::kWhole ? min(tiles, 1) : tiles) * weight;
            // Units of this sequence that begin before a point of the running total.
            const auto units_before = [&](int at) {
                return (min(max(at - begin, 0), all) + weight - 1) / weight;
            };
            int u = units_before(share.from);
            const int last = units_before(share.to);
            if constexpr (P::kWhole) {
                for (; u < last; ++u) item(s, u, 0, tiles);
            } else {
                const int at_most =
                    tiles_of(s.chunk_rows) > P::kSlots ? P::kConsumers : tiles;  // tiles of an item
                while (u < last) {
                    const int head = u / tiles, tile = u % tiles;
                    const int count = min(min(tiles - tile, at_most), last - u);
                    item(s, head, tile, count);
                    u += count;
                }
            }
            begin += all;
        }
        for (int consumer = 0; consumer < P::kConsumers; ++consumer) hand_out(Unit{});
    }
};

// ------------------------------------------------------------------------------------------------ consumers

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    const Vector<T, 2> pair{{from_float<T>(low), from_float<T>(high)}};
    uint32_t bits;
    memcpy(&bits, &pair, sizeof(bits));
    return bits;
}

// Four registers of the four neighbouring lanes that share a row: register i of lane j becomes register j of
// lane i.
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

// One warpgroup. A thread has two rows of a tile, `row` and row + 8, and of every 8 columns the two from
// `column` on: elements [4 i + 2 r + e] of an accumulator are row + 8 r, column + 8 i + e.
template <typename T, class P>
struct Consumer {
    using Fragment = uint32_t[P::kSteps][4];        // a tile, as first operand
    using Scores = float[kTile / 2];                // [64, 64]
    using Weights = uint32_t[kTile / 16][4];        // the same, rounded, as first operand
    using Rows = float[P::kPanels][P::kPanel / 2];  // [64, head_dim]

    const Problem& problem;
    Shared<P>& shared;
    const int consumer, thread, lane, row, column;

    __device__ Consumer(const Problem& p, Shared<P>& s)
        : problem(p),
          shared(s),
          consumer(static_cast<int>(threadIdx.x) / kWarpgroup - 1),
          thread(static_cast<int>(threadIdx.x) % kWarpgroup),
          lane(thread % kWarp),
          row(thread / kWarp * 16 + lane / 4),
          column(lane % 4 * 2) {}

    // One of its 4 warps. As: for how many consumers.
    __device__ __forceinline__ void arrive(uint64_t& barrier, int as = 1) const {
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(ptx::shared_address(&barrier), as);
    }

    // Calls tile(unit, buffer) for every tile of this consumer, until the producer says that there are no
    // more. `tile` frees the buffer when it has read it: tile_read(), where nobody else reads it.
    template <typename Tile>
    __device__ __forceinline__ void each_tile(const Tile& tile) const {
        for (int n = 0;; ++n) {
            const Turn mine = turn(n, P::kBuffers);
            ptx::mbarrier_wait(ptx::shared_address(&shared.tile_full[consumer][mine.place]), mine.phase);
            const Unit unit = shared.units[consumer][mine.place];
            if (unit.rows == 0) return;
            tile(unit, mine.place);
        }
    }
    // The loads were ordinary ones, and a bulk copy is what overwrites the buffer: another proxy, which the
    // barrier alone does not hold back.
    __device__ __forceinline__ void tile_read(int buffer) const {
        ptx::fence_shared_async();
        arrive(shared.tile_free[consumer][buffer]);
    }

    // Where register i of a step of a fragment lies in a tile: rows are 16-byte units, swizzled by their
    // number, so that only bits 4 to 6 depend on the unit.
    __device__ __forceinline__ int fragment_offset(int step, int i) const {
        const int d = 16 * step + 8 * (i / 2), panel = d / P::kPanel,
                  first = swizzled<P::kRowBytes>(row, 2 * column);
        return (first ^ d % P::kPanel * 2) + i % 2 * 8 * P::kRowBytes + panel * P::kPanelBytes;
    }
    __device__ __forceinline__ void load_fragment(Fragment& to, const unsigned char* tile) const {
#pragma unroll
        for (int step = 0; step < P::kSteps; ++step)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                to[step][i] = *reinterpret_cast<const uint32_t*>(tile + fragment_offset(step, i));
    }
    // The factor of the scores that carries the sign of the scale.
    __device__ __forceinline__ void give_sign(Fragment& of) const {
#pragma unroll
        for (int step = 0; step < P::kSteps; ++step)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                of[step][i] = (of[step][i] & problem.and_bits) ^ problem.negative_bits;
    }

    __device__ __forceinline__ void wait_for(int tensor, int use) const {
        const Turn mine = turn(use, P::kSlots);
        ptx::mbarrier_wait(ptx::shared_address(&shared.chunk_full[tensor][mine.place]), mine.phase);
    }
    __device__ __forceinline__ void release(int use) const {
        arrive(shared.slot_free[turn(use, P::kSlots).place]);
    }
    // For chunks that were loaded and are of no use to this tile, numbered from the first that was: if they are
    // to be released, they must have come before.
    __device__ __forceinline__ void release_unseen(const Unit& unit, int from, int to) const {
        for (int use = unit.use + from; use < unit.use + min(to, unit.held); ++use) {
            for (int tensor = 0; tensor < P::kChunkTensors; ++tensor) wait_for(tensor, use);
            release(use);
        }
    }

    __device__ __forceinline__ unsigned char* chunk(int tensor, int use) const {
        return shared.chunks[tensor][turn(use, P::kSlots).place];
    }

    // scores = tile @ chunk^T, under way.
    __device__ __forceinline__ void multiply_transposed(Scores& scores, Fragment& tile, int tensor,
                                                        int use) const {
        const uint32_t rows = ptx::shared_address(chunk(tensor, use));
        ptx::wgmma_fence(tile);
#pragma unroll
        for (int step = 0; step < P::kSteps; ++step) {
            const int d = 16 * step;
            const uint32_t at = rows + d / P::kPanel * P::kPanelBytes + d % P::kPanel * 2;
            ptx::wgmma<T, false>(scores, tile[step], matrix_descriptor<P::kRowBytes>(at), step > 0);
        }
        ptx::wgmma_commit();
    }

    // out += weights @ chunk, under way.
    __device__ __forceinline__ void multiply(Rows& out, Weights& weights, int tensor, int use) const {
        multiply(out, weights, chunk(tensor, use), true);
    }
    // The same with any 64 rows, which are added or not.
    __device__ __forceinline__ void multiply(Rows& out, Weights& weights, const unsigned char* box,
                                             bool adds) const {
        const uint32_t rows = ptx::shared_address(box);
        ptx::wgmma_fence(out, weights);
#pragma unroll
        for (int step = 0; step < kTile / 16; ++step)
#pragma unroll
            for (int panel = 0; panel < P::kPanels; ++panel) {
                const uint32_t at = rows + panel * P::kPanelBytes + step * 16 * P::kRowBytes;
                ptx::wgmma<T, true>(out[panel], weights[step], matrix_descriptor<P::kRowBytes>(at),
                                    adds || step > 0);
            }
        ptx::wgmma_commit();
    }

    // Rows of a chunk from `rows` on, past the end of the sequence, become zeros. Other consumers may be at
    // it too, or read them already: each has done it before it read, so nothing changes for it.
    __device__ __forceinline__ void clear(int tensor, int use, int rows) const {
        clear(chunk(tensor, use), rows);
    }
    __device__ __forceinline__ void clear(unsigned char* to, int rows) const {
        constexpr int kVectors = P::kRowBytes / 16;  // whole rows: the swizzle does not matter
        for (int panel = 0; panel < P::kPanels; ++panel)
            for (int i = rows * kVectors + thread; i < kTile * kVectors; i += kWarpgroup)
                *reinterpret_cast<uint4*>(to + panel * P::kPanelBytes + i * 16) = make_uint4(0, 0, 0, 0);
        ptx::fence_shared_async();
        meet();
    }
    __device__ __forceinline__ void meet() const { ptx::named_barrier(1 + consumer, kWarpgroup); }

    static __device__ __forceinline__ void zero(Rows& rows) {
#pragma unroll
        for (int panel = 0; panel < P::kPanels; ++panel)
#pragma unroll
            for (int i = 0; i < P::kPanel / 2; ++i) rows[panel][i] = 0.0f;
    }
    static __device__ __forceinline__ void round(Weights& to, const Scores& from) {
#pragma unroll
        for (int i = 0; i < kTile / 4; ++i) to[i / 4][i % 4] = pack<T>(from[2 * i], from[2 * i + 1]);
    }

    // Which of 64 rows on the keys' side from `first` on, of which `count` are there, key_mask lets be seen. All
    // lanes get the same.
    __device__ __forceinline__ uint64_t unmasked(int first, int count) const {
        const bool* at = problem.key_mask + first;
        const unsigned low = __ballot_sync(kAllLanes, lane < count && at[min(lane, count - 1)]);
        const unsigned high =
            __ballot_sync(kAllLanes, lane + kWarp < count && at[min(lane + kWarp, count - 1)]);
        return static_cast<uint64_t>(high) << 32 | low;
    }

    // Tiles of queries: whether some row of the tile does not see some key of a chunk.
    __device__ __forceinline__ bool needs_mask(const Unit& unit, int first) const {
        return first + kTile > unit.others || first + kTile - 1 > unit.diagonal ||
               problem.key_mask != nullptr;
    }
    // Tiles of queries: -inf where a query does not see a key of the chunk that begins at key `first`.
    __device__ __forceinline__ void mask(Scores& scores, const Unit& unit, int first) const {
        const int count = unit.others - first;  // of the chunk, if less than 64
        uint64_t keys = count >= kTile ? ~0ull : (1ull << count) - 1;
        if (problem.key_mask != nullptr) keys &= unmasked(unit.first_other + first, count);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int last = row + 8 * r + unit.diagonal - first;  // that the query may see
            uint64_t mine = last >= kTile - 1 ? keys : last < 0 ? 0 : keys & ((2ull << last) - 1);
            mine >>= column;
#pragma unroll
            for (int i = 0; i < 8; ++i)
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    if ((mine >> (8 * i + e) & 1) == 0) scores[4 * i + 2 * r + e] = -INFINITY;
        }
    }

    // Four bits: which words of a group are kept.
    __device__ __forceinline__ uint32_t kept_words(const PhiloxKey& key, int group, int counter_row,
                                                   int head) const {
        const uint4 words = philox(key, static_cast<uint32_t>(group), static_cast<uint32_t>(counter_row),
                                   static_cast<uint32_t>(head));
        const uint32_t threshold = problem.dropout.threshold;
        return static_cast<uint32_t>(words.x >= threshold) |
               static_cast<uint32_t>(words.y >= threshold) << 1 |
               static_cast<uint32_t>(words.z >= threshold) << 2 |
               static_cast<uint32_t>(words.w >= threshold) << 3;
    }

    // Tiles of queries: bit 4 i + e of kept[r] tells whether element [4 i + 2 r + e] of a chunk's weights is
    // kept. A group of 4 keys belongs to two lanes: the even one draws it for row, the odd one for row + 8,
    // and they swap what they found.
    __device__ __forceinline__ void kept_keys(uint32_t (&kept)[2], const Unit& unit, int first,
                                              const PhiloxKey& key) const {
        const bool odd = lane & 1;
        uint32_t mine = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i)
            mine |= kept_words(key, first / 4 + 2 * i + lane % 4 / 2, unit.first_row + row + (odd ? 8 : 0),
                               unit.head)
                    << (4 * i);
        const uint32_t other = __shfl_xor_sync(kAllLanes, mine, 1);
        kept[0] = (odd ? other : mine) >> (odd ? 2 : 0);
        kept[1] = (odd ? mine : other) >> (odd ? 2 : 0);
    }

    // Rows of the tile that exist go to out [T, heads, head_dim], times factor[r]. Lanes first swap what they
    // have, so that each stores 16 bytes.
    __device__ __forceinline__ void store(void* out, const Rows& rows, const float (&factor)[2],
                                          const Unit& unit) const {
        store(out, rows, factor, unit.head, unit.first_row, unit.rows);
    }
    // The same for the first `count` of 64 rows, that of token `first` and those after it.
    __device__ __forceinline__ void store(void* out, const Rows& rows, const float (&factor)[2], int head,
                                          int first, int count) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const bool exists = row + 8 * r < count;
            const int64_t token = first + row + 8 * r;
            T* to = static_cast<T*>(out) + (token * problem.heads + head) * P::kHeadDim;
#pragma unroll
            for (int panel = 0; panel < P::kPanels; ++panel)
#pragma unroll
                for (int half = 0; half < P::kPanel / 32; ++half) {
                    uint32_t v[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int at = 4 * (4 * half + i) + 2 * r;
                        v[i] = pack<T>(rows[panel][at] * factor[r], rows[panel][at + 1] * factor[r]);
                    }
                    transpose_in_quad(v, lane);
                    if (exists)
                        *reinterpret_cast<uint4*>(to + panel * P::kPanel + 32 * half + 8 * (lane % 4)) =
                            make_uint4(v[0], v[1], v[2], v[3]);
                }
        }
    }
};

// ------------------------------------------------------------------------------------------------ kernel

struct NoMore {
    __device__ void operator()() const {}
};

// The body of a kernel: what every thread of a block does. consume() is run by the consumers; init_more(), by
// one thread, initialises barriers that only this kernel has.
template <class P, bool OfKeys, typename Consume, typename InitMore = NoMore>
__device__ __forceinline__ void run_block(const Problem& problem, Shared<P>& shared, const Consume& consume,
                                          const InitMore& init_more = {}) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < P::kConsumers; ++i)
            for (int j = 0; j < P::kBuffers; ++j) {
                ptx::mbarrier_init(ptx::shared_address(&shared.tile_full[i][j]), 1);
                ptx::mbarrier_init(ptx::shared_address(&shared.tile_free[i][j]),
                                   (P::kWhole ? P::kConsumers : 1) * kWarpsOfGroup);
            }
        for (int i = 0; i < P::kSlots; ++i) {
            for (int j = 0; j < P::kChunkTensors; ++j)
                ptx::mbarrier_init(ptx::shared_address(&shared.chunk_full[j][i]), 1);
            ptx::mbarrier_init(ptx::shared_address(&shared.slot_free[i]), P::kConsumers * kWarpsOfGroup);
        }
        init_more();
        ptx::fence_mbarrier_init();
        for (int i = 0; i < P::kTileTensors; ++i) ptx::prefetch_tensor_map(&problem.tiles[i]);
        for (int i = 0; i < P::kChunkTensors; ++i) ptx::prefetch_tensor_map(&problem.chunks[i]);
    }
    __syncthreads();
    if (threadIdx.x < kWarpgroup) {
        ptx::give_registers<P::kProducerRegisters>();
        if (threadIdx.x < kWarp) {
            const Share share = share_of_block(problem);
            if (threadIdx.x == 0) Producer<P, OfKeys>{problem, shared}.run(share);
        } else {
            clear_rest<P::kHeadDim>(problem);
        }
    } else {
        ptx::take_registers<P::kConsumerRegisters>();
        consume();
    }
}

// ------------------------------------------------------------------------------------------------ host

inline TensorMap3d boxes(const HeadsView& view, int64_t tokens, const AttentionArgs& a) {
    // Strides along a dimension of one mean nothing.
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

// What cuTensorMapEncodeTiled asks for, and heads within their token's row.
inline bool has_boxes(const HeadsView& view, int64_t tokens, const AttentionArgs& a) {
    if (tokens == 0) return true;
    const TensorMap3d map = boxes(view, tokens, a);
    const auto fits = [](uint64_t stride) { return stride % 16 == 0 && stride < uint64_t{1} << 40; };
    return reinterpret_cast<uintptr_t>(map.data) % 16 == 0 && fits(map.strides[0]) && fits(map.strides[1]) &&
           map.strides[0] >= 2 * map.sizes[0] && map.strides[1] >= map.strides[0] * map.sizes[1];
}

// No fewer tiles than there can be, whatever the lengths.
inline int64_t most_units(const AttentionArgs& a, int64_t tokens) {
    return a.heads * (tokens / kTile + std::min(a.batch, tokens));
}
// Sums of weights must fit in 32 bits.
inline bool weights_fit(const AttentionArgs& a, int64_t tokens, int64_t longest_other) {
    return most_units(a, tokens) <= INT32_MAX / 2 / (longest_other / kTile + 1 + kTileWeight);
}

inline bool supports(const AttentionArgs& a) {
    return (a.dtype == Dtype::bfloat16 || a.dtype == Dtype::float16) && has_boxes(a.q, a.total_q, a) &&
           has_boxes(a.k, a.total_k, a) && has_boxes(a.v, a.total_k, a) &&
           weights_fit(a, a.total_q, a.max_seqlen_k) && weights_fit(a, a.total_k, a.max_seqlen_q);
}

// The tiles are of keys, or of queries.
inline Problem problem_of(const AttentionArgs& a, bool of_keys) {
    Problem p{};
    p.tile_seqlens = of_keys ? a.cu_seqlens_k : a.cu_seqlens_q;
    p.chunk_seqlens = of_keys ? a.cu_seqlens_q : a.cu_seqlens_k;
    p.tile_rows = static_cast<int32_t>(of_keys ? a.total_k : a.total_q);
    p.chunk_rows = static_cast<int32_t>(of_keys ? a.total_q : a.total_k);
    p.most_tiles = static_cast<int32_t>(of_keys ? a.max_seqlen_k : a.max_seqlen_q);
    p.most_chunks = static_cast<int32_t>(of_keys ? a.max_seqlen_q : a.max_seqlen_k);
    p.key_mask = a.key_mask;
    p.batch = static_cast<int32_t>(a.batch);
    p.heads = static_cast<int32_t>(a.heads);
    // The largest score is the largest scaled one if the scale is positive; that it be negative or zero is
    // left to a factor.
    p.score_scale = a.scale == 0.0f ? 1.0f : (a.scale < 0.0f ? -a.scale : a.scale) * kLog2e;
    p.growth = kGrowth / p.score_scale;
    p.and_bits = a.scale == 0.0f ? 0u : ~0u;
    p.negative_bits = a.scale < 0.0f ? 0x80008000u : 0u;
    p.causal = a.causal;
    p.dropout = a.dropout;
    p.scale = a.scale;
    p.lse = a.lse;
    p.statistics = a.statistics;
    p.total_q = a.total_q;
    return p;
}

template <class S>
Launch launch_of(const AttentionArgs& a, int64_t tokens, int threads) {
    static_assert(sizeof(S) <= kMostShared && alignof(S) == kPattern, "shared memory of a block");
    const int64_t blocks = std::min<int64_t>(current_device().multiprocessors, most_units(a, tokens));
    return {dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), sizeof(S), a.stream};
}

}  // namespace rk::cuda::sm90
