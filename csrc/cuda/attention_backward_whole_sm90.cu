// Attention backward on Hopper for sequences of up to 128 keys: all gradients of a (sequence, head) by one
// block, which reads its inputs once. Roles and scheduling: attention_sm90.cuh.
//
// Idea. As in attention_backward_sm90.cu a tile is 64 keys (k and v, in a warpgroup's registers as first
// operand), a chunk 64 queries (q, grad_out and out, in shared memory), and scores are transposed. No sequence
// has more tiles than the block has warpgroups, so all score gradients of a chunk are in the block at one
// time: they go through shared memory once, 16 bits each, and the gradient of its queries is finished on the
// spot: five products in place of seven, exponentials, random numbers and reads once in place of twice.
//   scores = k qᵀ, grad_weights = v grad_outᵀ, grad_v += pᵀ grad_out, grad_k += dsᵀ q; grad_q = ds k.
// The last has its first operand from shared memory by ldmatrix, which transposes it, and the keys as they
// came by the copy engine. So grad_q is summed over a sequence's keys in order, whoever has them, and every
// gradient has one owner: no atomics, bitwise the same result every time.
//
// Who does it. Two tiles of a head go to two consumers, partners, which take the same chunks in step: chunk c
// gives its gradient of queries to consumer c % 2, and the other goes on with the next chunk meanwhile. A head
// of one tile belongs to one consumer, and the other has another head.
//
// Score gradients pass through grad_scores[to][from], where consumer `from` puts what consumer `to` needs:
// - to == from: written by all its warps, barrier of the warpgroup, read by all of them; before they write
//   again they have met at the barrier for the next chunk's statistics.
// - to != from: grad_full[to] has an arrival of each warp of `from` after it has written; `to` waits, reads,
//   and each of its warps arrives at grad_free[to], which `from` waits for before it writes again. Both have
//   one phase for each chunk that `to` owns of heads with two tiles; one side waits for each phase in turn, so
//   nobody is more than one phase ahead.
// These bytes are stored and loaded by ordinary instructions alone: no fence between proxies.
//
// The keys of both tiles are read by both partners' wgmma. A buffer is free when both have arrived (a consumer
// alone arrives for two). A partner waits for tile_full of the other's buffer: the producer has seen both
// buffers free before it hands out either, so the phase before is over. Rows of keys and values past the end
// of the sequence are cleared by the consumer whose tile it is, and fenced, before its first arrival at
// grad_full: the partner's wgmma comes after that.
//
// What ordinary loads read of a chunk (grad_out and out, for the row sums of their products) and of a tile is
// fenced before it is released, since the copy engine writes there next.
//
// Rows of queries whose sequence has no keys have no tile that would write them: clear_rest() does.
//
// Floor, for one head of n queries and keys and head dim d: 5 products or 10 n n d flops, n n exponentials, 8
// tensors of 2 n d bytes, each once. At n = 128, d = 64, over a whole H200: 10.5 Mflop are 11 ns of 990
// Tflop/s, the exponentials 4.4 ns, 128 KiB 27 ns of 4.8 TB/s.
//
// Shared memory at head dim 64, in KiB: chunks 5 x 24, tiles 2 x 2 x 16, score gradients 2 x 16, statistics 2.
// Registers: 384 threads start with 168 each; the producer's warpgroup keeps 40, consumers get 232.
#include "csrc/cuda/attention_backward_sm90.cuh"
#include "csrc/cuda/attention_plan.h"

namespace rk::cuda {
namespace {

using namespace sm90;

template <int HeadDim>
using WholePlan = Plan<HeadDim, 2, 2, HeadDim == 64 ? 5 : 8, 2, 3, true>;

constexpr int kScoresRow = 2 * kTile;  // bytes

template <class P>
struct WholeShared : Shared<P> {
    static_assert(attention::kMostWholeKeys == P::kConsumers * kTile, "a consumer for each tile of a head");

    unsigned char grad_scores[2][2][kTile * kScoresRow];  // [to][from][key][query], swizzled as chunks are
    float2 statistics[2][2][kTile];                       // (log-sum-exp, delta) of the queries of a chunk
    uint64_t grad_full[2], grad_free[2];
};

struct Counts {  // of what a consumer has had; two of them in one register, of which there are none to spare
    int owned;   // chunks with a partner, whose gradient of queries was its own
    uint32_t given : 31;     // chunks with a partner, whose gradient of queries was the partner's
    uint32_t odd_chunk : 1;  // whether its next chunk, of all tiles, is an odd one
};

template <typename T, class P, bool Drops>
struct WholeConsumer : KeyRows<T, P> {
    using Base = KeyRows<T, P>;
    using typename Base::Fragment;
    using typename Base::Rows;
    using typename Base::Scores;
    using typename Base::Weights;

    WholeShared<P>& whole;

    __device__ WholeConsumer(const Problem& p, WholeShared<P>& s) : Base(p, s), whole(s) {}

    // Two threads share a query of a chunk: this one's.
    __device__ __forceinline__ int query() const { return this->thread / 2; }
    __device__ __forceinline__ float lse_of_chunk(const Unit& unit, int chunk) const {
        const int at = chunk * kTile + query();
        if (at >= unit.others) return INFINITY;
        return lse_of(this->problem.lse[unit.head * this->problem.total_q + unit.first_other + at]);
    }
    // The row sum of grad_out * out of that query, which both threads get. Rows past the end: anything.
    __device__ __forceinline__ float delta_of(int use) const {
        constexpr int kUnits = P::kRowBytes / 32;  // of 16 bytes, a thread
        static_assert(P::kPanels == 1, "a row of a chunk is one of the box");
        const unsigned char *grads = this->chunk(1, use), *outs = this->chunk(2, use);
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kUnits; ++i) {
            const int at = swizzled<P::kRowBytes>(query(), (this->thread % 2 * kUnits + i) * 16);
            const uint4 grad = *reinterpret_cast<const uint4*>(grads + at);
            const uint4 out = *reinterpret_cast<const uint4*>(outs + at);
            sum += product<T>(grad.x, out.x) + product<T>(grad.y, out.y);
            sum += product<T>(grad.z, out.z) + product<T>(grad.w, out.w);
        }
        return warp_sum<2>(sum);
    }

    // A tile's score gradients to [key][query]. A warp's 8 rows of 4 lanes hit all banks.
    __device__ __forceinline__ void put(unsigned char* to, const Weights& grad_scores) const {
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
            for (int r = 0; r < 2; ++r)
                *reinterpret_cast<uint32_t*>(
                    to + swizzled<kScoresRow>(this->row + 8 * r, 16 * i + 2 * this->column)) =
                    grad_scores[i / 2][i % 2 * 2 + r];
    }
    // [key][query] as the first operand [64 queries, 64 keys].
    __device__ __forceinline__ void get(Weights& to, const unsigned char* from) const {
        const int key = this->lane / 16 * 8 + this->lane % 8,
                  first_query = this->thread / kWarp * 16 + this->lane / 8 % 2 * 8;
#pragma unroll
        for (int step = 0; step < kTile / 16; ++step)
            ptx::load_matrices_transposed(to[step],
                                          from + swizzled<kScoresRow>(16 * step + key, 2 * first_query));
    }

    __device__ __forceinline__ void tile(const Unit& unit, int buffer, Counts& counts,
                                         const PhiloxKey& key) const {
        const Problem& problem = this->problem;
        const int me = this->consumer, other = 1 - me;
        const bool paired = unit.partner >= 0;
        const Turn partner = turn(max(unit.partner, 0), P::kBuffers);  // of none: not used
        unsigned char (&tiles)[2][P::kTileBytes] = this->shared.tiles[me][buffer];
        // Score gradients of rows past the end, and these keys, are multiplied with each other.
        if (unit.rows < kTile) {
            this->clear(tiles[0], unit.rows);
            this->clear(tiles[1], unit.rows);
        }
        Fragment keys, values;
        this->load_fragment(keys, tiles[0]);
        this->load_fragment(values, tiles[1]);
        ptx::fence_shared_async();  // of these loads, for when the buffer is free
        this->give_sign(keys);
        bool seen[2];
        this->seen_keys(seen, unit);

        Rows grad_keys, grad_values;
        this->zero(grad_keys);
        this->zero(grad_values);
        Weights dropped, grad_scores;
        float lse = lse_of_chunk(unit, 0);
        for (int c = 0; c < unit.chunks; ++c) {
            const int use = unit.use + c, first = c * kTile;
            Scores scores, grad_weights;
#pragma unroll
            for (int tensor = 0; tensor < P::kChunkTensors; ++tensor) this->wait_for(tensor, use);
            if (first + kTile > unit.others) {
                this->clear(0, use, unit.others - first);
                this->clear(1, use, unit.others - first);
            }
            this->multiply_transposed(scores, keys, 0, use);
            this->multiply_transposed(grad_weights, values, 1, use);

            float2(&statistics)[kTile] = whole.statistics[me][counts.odd_chunk];
            counts.odd_chunk ^= 1;
            const float delta = delta_of(use);
            ptx::fence_shared_async();  // of its loads, for when the slot is free
            if (this->thread % 2 == 0)
                statistics[query()] = make_float2(lse, first + query() < unit.others ? delta : 0.0f);
            lse = lse_of_chunk(unit, c + 1);
            this->meet();
            ptx::wgmma_wait<1>(scores);
            if (this->some_unseen(unit, first)) this->mask_keys(scores, unit, first, seen);
            uint32_t kept[4];
            if (Drops) this->kept_queries(kept, unit, unit.first_in_sequence, first, key);
#pragma unroll
            for (int i = 0; i < 8; ++i)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float of_query = statistics[8 * i + this->column + e].x;
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        float& score = scores[4 * i + 2 * r + e];
                        score = ptx::exp2(fmaf(score, problem.score_scale, -of_query));
                    }
                }
            if (Drops) {
                Scores of_kept;
#pragma unroll
                for (int i = 0; i < 32; ++i) of_kept[i] = Base::is_kept(kept, i) ? scores[i] : 0.0f;
                this->round(dropped, of_kept);
            } else {
                this->round(dropped, scores);
            }
            this->multiply(grad_values, dropped, 1, use);
            ptx::wgmma_wait<1>(grad_weights);  // the product goes on
#pragma unroll
            for (int i = 0; i < 32; ++i) {
                const float of_query = statistics[8 * (i / 4) + this->column + i % 2].y;
                float grad = grad_weights[i];
                if (Drops) grad = Base::is_kept(kept, i) ? grad * problem.dropout.scale : 0.0f;
                scores[i] *= grad - of_query;
            }
            this->round(grad_scores, scores);

            // They are stored before they are multiplied: from a wgmma to the wait for it nothing else may
            // read the registers of its first operand either.
            const bool gives = paired && c % 2 != me;
            if (gives) {
                ptx::mbarrier_wait(ptx::shared_address(&whole.grad_free[other]),
                                   static_cast<int>(counts.given) - 1);
                put(whole.grad_scores[other][me], grad_scores);
                this->arrive(whole.grad_full[other]);
                counts.given += 1;
            } else {
                put(whole.grad_scores[me][me], grad_scores);
            }
            this->multiply(grad_keys, grad_scores, 0, use);
            if (gives) {
                ptx::wgmma_wait<0>(grad_keys, grad_values);
                this->release(use);
                continue;
            }
            this->meet();
            Weights low, high;  // keys of the head's first tile, and of its second
            Rows grad_queries;
            const bool second = unit.first_in_sequence > 0;
            if (paired) {
                ptx::mbarrier_wait(ptx::shared_address(&whole.grad_full[me]), counts.owned);
                ptx::mbarrier_wait(ptx::shared_address(&this->shared.tile_full[other][partner.place]),
                                   partner.phase);
                counts.owned += 1;
            }
            get(low, whole.grad_scores[me][second ? other : me]);
            if (paired) {
                get(high, whole.grad_scores[me][second ? me : other]);
                this->arrive(whole.grad_free[me]);
            }
            const unsigned char* partners_keys = this->shared.tiles[other][partner.place][0];
            this->multiply(grad_queries, low, second ? partners_keys : tiles[0], false);
            if (paired) this->multiply(grad_queries, high, second ? tiles[0] : partners_keys, true);
            ptx::wgmma_wait<0>(grad_queries, grad_keys, grad_values);
            this->release(use);
            const float scale[2] = {problem.scale, problem.scale};
            this->store(problem.chunk_out, grad_queries, scale, unit.head, unit.first_other + first,
                        unit.others - first);
        }
        this->arrive(this->shared.tile_free[me][buffer], paired ? 1 : P::kConsumers);
        if (paired) this->arrive(this->shared.tile_free[other][partner.place]);
        const float scale[2] = {problem.scale, problem.scale};
        this->store(problem.out[0], grad_keys, scale, unit);
        const float kept_scale = Drops ? problem.dropout.scale : 1.0f;
        const float factor[2] = {kept_scale, kept_scale};
        this->store(problem.out[1], grad_values, factor, unit);
    }
};

template <typename T, int HeadDim, bool Drops>
__global__ void __launch_bounds__(WholePlan<HeadDim>::kThreads, 1)
    attention_sm90_grad_whole_kernel(const __grid_constant__ Problem problem) {
    using P = WholePlan<HeadDim>;
    WholeShared<P>& shared = *reinterpret_cast<WholeShared<P>*>(shared_memory());
    run_block<P, true>(
        problem, shared,
        [&] {
            PhiloxKey key{};
            if (Drops) key = philox_key(problem.dropout);
            const WholeConsumer<T, P, Drops> consumer(problem, shared);
            Counts counts{};
            consumer.each_tile(
                [&](const Unit& unit, int buffer) { consumer.tile(unit, buffer, counts, key); });
        },
        [&] {
            for (int i = 0; i < 2; ++i) {
                ptx::mbarrier_init(ptx::shared_address(&shared.grad_full[i]), kWarpsOfGroup);
                ptx::mbarrier_init(ptx::shared_address(&shared.grad_free[i]), kWarpsOfGroup);
            }
        });
}

template <typename T, int HeadDim>
void backward(const AttentionArgs& a) {
    Problem p = problem_of(a, true);
    p.tiles[0] = encode(boxes(a.k, a.total_k, a));
    p.tiles[1] = encode(boxes(a.v, a.total_k, a));
    // Without queries nothing is loaded through their maps, but they must be maps.
    const HeadsView out{a.out, a.heads * a.head_dim, a.head_dim};
    p.chunks[0] = a.total_q > 0 ? encode(boxes(a.q, a.total_q, a)) : p.tiles[0];
    p.chunks[1] = a.total_q > 0 ? encode(boxes(a.grad_out, a.total_q, a)) : p.tiles[0];
    p.chunks[2] = a.total_q > 0 ? encode(boxes(out, a.total_q, a)) : p.tiles[0];
    p.out[0] = a.grad_k;
    p.out[1] = a.grad_v;
    p.chunk_out = a.grad_q;
    using P = WholePlan<HeadDim>;
    const Launch how = launch_of<WholeShared<P>>(a, a.total_k, P::kThreads);
    if (a.dropout.seed != nullptr)
        launch(attention_sm90_grad_whole_kernel<T, HeadDim, true>, how, p);
    else
        launch(attention_sm90_grad_whole_kernel<T, HeadDim, false>, how, p);
}

template <typename T>
void backward_of(const AttentionArgs& a) {
    if (a.head_dim == 32)
        backward<T, 32>(a);
    else
        backward<T, 64>(a);
}

}  // namespace

void attention_sm90_backward_whole(const AttentionArgs& a) {
    if (a.dtype == Dtype::bfloat16)
        backward_of<__nv_bfloat16>(a);
    else
        backward_of<__half>(a);
}

}  // namespace rk::cuda
