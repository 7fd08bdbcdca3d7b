// Attention backward on Hopper, for the sequence lengths of RoBERTa. Roles and scheduling:
// attention_sm90.cuh. (Up to 128 keys: attention_backward_whole_sm90.cu, where attention_plan.h says so.)
//
// Idea. Two kernels, so that every gradient has one owner: no atomics, no workspace, bitwise the same result
// every time.
// - attention_sm90_grad_query_kernel: tiles of queries, chunks of keys and values, as forward. It computes
//   the probabilities again from the log-sum-exp, and sums the gradient of its queries in registers. Out
//   comes along with queries and grad_out, so the row sums of grad_out * out ("delta") cost no kernel of their
//   own; they are written for the other kernel.
// - attention_sm90_grad_key_kernel: tiles of keys and values, chunks of queries and grad_out; scores are
//   transposed. It sums the gradients of its keys and values in registers.
// In both, the tile's rows are the first operand from registers throughout, and a chunk is the second operand
// in shared memory twice, once by columns and once by rows: nothing is transposed, and nothing but the chunks
// is stored in shared memory.
//
// Floor, for one head of n queries and keys and head dim d: 7 products (5 if one kernel did it all) or 14 n n
// d flops, 2 n n exponentials; 8 tensors of 2 n d bytes, and 4 of them again from L2 for the second kernel.
// At n = 512, d = 64, over a whole H200: 235 Mflop are 237 ns of 990 Tflop/s, the exponentials 142 ns, 512
// KiB 109 ns of 4.8 TB/s.
//
// Shared memory at head dim 64, in KiB: chunks 10 x 16, tiles 2 x 24 (queries) or 2 x 16 (keys).
// Registers: 384 threads start with 168 each; the producer's warpgroup keeps 40, consumers get 232.
#include "csrc/cuda/attention_backward_sm90.cuh"
#include "csrc/cuda/attention_plan.h"

namespace rk::cuda {
namespace {

using namespace sm90;

template <int HeadDim>
using QueryPlan = Plan<HeadDim, 3, 2, HeadDim == 64 ? 10 : 16, 1>;
template <int HeadDim>
using KeyPlan = Plan<HeadDim, 2, 2, HeadDim == 64 ? 10 : 16, 1>;

// ------------------------------------------------------------------------------------------------ queries

template <typename T, class P, bool Drops>
struct QueryConsumer : Consumer<T, P> {
    using Base = Consumer<T, P>;
    using Base::Base;
    using typename Base::Fragment;
    using typename Base::Rows;
    using typename Base::Scores;
    using typename Base::Weights;

    __device__ __forceinline__ void tile(const Unit& unit, int buffer, const PhiloxKey& key) const {
        const Problem& problem = this->problem;
        Fragment queries, grads;
        float delta[2] = {0.0f, 0.0f}, lse[2];
        {
            unsigned char (&tiles)[3][P::kTileBytes] = this->shared.tiles[this->consumer][buffer];
            this->load_fragment(queries, tiles[0]);
            this->load_fragment(grads, tiles[1]);
#pragma unroll
            for (int step = 0; step < P::kSteps; ++step)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    delta[i % 2] += product<T>(
                        grads[step][i],
                        *reinterpret_cast<const uint32_t*>(tiles[2] + this->fragment_offset(step, i)));
            this->tile_read(buffer);
            this->give_sign(queries);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            delta[r] = warp_sum<4>(delta[r]);
            const bool exists = this->row + 8 * r < unit.rows;
            const int64_t at = unit.head * problem.total_q + unit.first_row + this->row + 8 * r;
            lse[r] = exists ? lse_of(problem.lse[at]) : INFINITY;
            if (exists && this->lane % 4 == 0) problem.statistics[at] = make_float2(lse[r], delta[r]);
        }

        Rows grad_queries;
        this->zero(grad_queries);
        Weights grad_scores;
        for (int c = 0; c < unit.chunks; ++c) {
            const int use = unit.use + c, first = c * kTile;
            Scores scores, grad_weights;
            this->wait_for(0, use);
            this->wait_for(1, use);
            if (first + kTile > unit.others) {
                this->clear(0, use, unit.others - first);
                this->clear(1, use, unit.others - first);
            }
            this->multiply_transposed(scores, queries, 0, use);
            this->multiply_transposed(grad_weights, grads, 1, use);
            ptx::wgmma_wait<1>(scores, grad_queries);  // the latter with the previous chunk
            if (c > 0 && unit.held > 0) this->release(use - 1);
            if (this->needs_mask(unit, first)) this->mask(scores, unit, first);
#pragma unroll
            for (int i = 0; i < 32; ++i)
                scores[i] = ptx::exp2(fmaf(scores[i], problem.score_scale, -lse[i / 2 % 2]));
            uint32_t kept[2];
            if (Drops) this->kept_keys(kept, unit, first, key);
            ptx::wgmma_wait<0>(grad_weights);
#pragma unroll
            for (int i = 0; i < 32; ++i) {
                const int r = i / 2 % 2;
                float grad = grad_weights[i];
                if (Drops) grad = kept[r] >> (i / 4 * 4 + i % 2) & 1 ? grad * problem.dropout.scale : 0.0f;
                scores[i] *= grad - delta[r];
            }
            this->round(grad_scores, scores);
            this->multiply(grad_queries, grad_scores, 0, use);
        }
        ptx::wgmma_wait<0>(grad_queries);
        if (unit.held > 0 && unit.chunks > 0) this->release(unit.use + unit.chunks - 1);
        this->release_unseen(unit, unit.chunks, unit.held);
        const float factor[2] = {problem.scale, problem.scale};
        this->store(problem.out[0], grad_queries, factor, unit);
    }
};

template <typename T, int HeadDim, bool Drops>
__global__ void __launch_bounds__(QueryPlan<HeadDim>::kThreads, 1)
    attention_sm90_grad_query_kernel(const __grid_constant__ Problem problem) {
    using P = QueryPlan<HeadDim>;
    Shared<P>& shared = *reinterpret_cast<Shared<P>*>(shared_memory());
    run_block<P, false>(problem, shared, [&] {
        PhiloxKey key{};
        if (Drops) key = philox_key(problem.dropout);
        const QueryConsumer<T, P, Drops> consumer(problem, shared);
        consumer.each_tile([&](const Unit& unit, int buffer) { consumer.tile(unit, buffer, key); });
    });
}

// ------------------------------------------------------------------------------------------- keys and values

template <class P>
struct KeyShared : Shared<P> {
    float2 statistics[P::kConsumers][2][kTile];  // as AttentionArgs::statistics, of the queries of a chunk
};

template <typename T, class P, bool Drops>
struct KeyConsumer : KeyRows<T, P> {
    using Base = KeyRows<T, P>;
    using typename Base::Fragment;
    using typename Base::Rows;
    using typename Base::Scores;
    using typename Base::Weights;

    KeyShared<P>& key_shared;

    __device__ KeyConsumer(const Problem& p, KeyShared<P>& s) : Base(p, s), key_shared(s) {}

    // Of the query of a chunk that is this thread's to fetch: half of the threads have one.
    __device__ __forceinline__ float2 statistics_of(const Unit& unit, int chunk) const {
        const int query = chunk * kTile + this->thread;
        if (this->thread >= kTile || query >= unit.others) return make_float2(INFINITY, 0.0f);
        return this->problem.statistics[unit.head * this->problem.total_q + unit.first_other + query];
    }

    // first_key: of the tile, in its sequence. count: of the chunks that this consumer has had.
    __device__ __forceinline__ void tile(const Unit& unit, int buffer, int first_key, int& count,
                                         const PhiloxKey& key) const {
        const Problem& problem = this->problem;
        Fragment keys, values;
        this->load_fragment(keys, this->shared.tiles[this->consumer][buffer][0]);
        this->load_fragment(values, this->shared.tiles[this->consumer][buffer][1]);
        this->tile_read(buffer);
        this->give_sign(keys);
        bool seen[2];
        this->seen_keys(seen, unit);
        // A tile of which no key is seen passes over all chunks: its gradients are zero.
        const bool any = problem.key_mask == nullptr || this->unmasked(unit.first_row, unit.rows) != 0;
        const int chunks = any ? unit.chunks : 0;
        this->release_unseen(unit, 0, chunks > 0 ? unit.skip : unit.skip + unit.chunks);

        Rows grad_keys, grad_values;
        this->zero(grad_keys);
        this->zero(grad_values);
        Weights dropped, grad_scores;
        float2 fetched = statistics_of(unit, unit.first_chunk);
        for (int c = 0; c < chunks; ++c) {
            const int use = unit.use + unit.skip + c, first = (unit.first_chunk + c) * kTile;
            float2(&statistics)[kTile] = key_shared.statistics[this->consumer][count++ % 2];
            if (this->thread < kTile) statistics[this->thread] = fetched;
            this->meet();
            fetched = statistics_of(unit, unit.first_chunk + c + 1);

            Scores scores, grad_weights;
            this->wait_for(0, use);
            this->wait_for(1, use);
            if (first + kTile > unit.others) {
                this->clear(0, use, unit.others - first);
                this->clear(1, use, unit.others - first);
            }
            this->multiply_transposed(scores, keys, 0, use);
            this->multiply_transposed(grad_weights, values, 1, use);
            ptx::wgmma_wait<1>(scores, grad_keys, grad_values);  // the latter with the previous chunk
            if (c > 0 && unit.held > 0) this->release(use - 1);
            if (this->some_unseen(unit, first)) this->mask_keys(scores, unit, first, seen);
            uint32_t kept[4];
            if (Drops) this->kept_queries(kept, unit, first_key, first, key);
#pragma unroll
            for (int i = 0; i < 8; ++i)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float lse = statistics[8 * i + this->column + e].x;
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        float& score = scores[4 * i + 2 * r + e];
                        score = ptx::exp2(fmaf(score, problem.score_scale, -lse));
                    }
                }
            const auto is_kept = [&](int i) { return Base::is_kept(kept, i); };
            if (Drops) {
                Scores of_kept;
#pragma unroll
                for (int i = 0; i < 32; ++i) of_kept[i] = is_kept(i) ? scores[i] : 0.0f;
                this->round(dropped, of_kept);
            } else {
                this->round(dropped, scores);
            }
            this->multiply(grad_values, dropped, 1, use);
            ptx::wgmma_wait<1>(grad_weights);  // the product goes on
#pragma unroll
            for (int i = 0; i < 32; ++i) {
                const float delta = statistics[8 * (i / 4) + this->column + i % 2].y;
                float grad = grad_weights[i];
                if (Drops) grad = is_kept(i) ? grad * problem.dropout.scale : 0.0f;
                scores[i] *= grad - delta;
            }
            this->round(grad_scores, scores);
            this->multiply(grad_keys, grad_scores, 0, use);
        }
        ptx::wgmma_wait<0>(grad_keys, grad_values);
        if (unit.held > 0 && chunks > 0) this->release(unit.use + unit.skip + chunks - 1);
        const float scale[2] = {problem.scale, problem.scale};
        this->store(problem.out[0], grad_keys, scale, unit);
        const float kept_scale = Drops ? problem.dropout.scale : 1.0f;
        const float factor[2] = {kept_scale, kept_scale};
        this->store(problem.out[1], grad_values, factor, unit);
    }
};

template <typename T, int HeadDim, bool Drops>
__global__ void __launch_bounds__(KeyPlan<HeadDim>::kThreads, 1)
    attention_sm90_grad_key_kernel(const __grid_constant__ Problem problem) {
    using P = KeyPlan<HeadDim>;
    KeyShared<P>& shared = *reinterpret_cast<KeyShared<P>*>(shared_memory());
    run_block<P, true>(problem, shared, [&] {
        PhiloxKey key{};
        if (Drops) key = philox_key(problem.dropout);
        const KeyConsumer<T, P, Drops> consumer(problem, shared);
        int count = 0;
        consumer.each_tile([&](const Unit& unit, int buffer) {
            consumer.tile(unit, buffer, unit.first_in_sequence, count, key);
        });
    });
}

// ------------------------------------------------------------------------------------------------ host

template <typename T, int HeadDim>
void backward(const AttentionArgs& a) {
    const HeadsView out{a.out, a.heads * a.head_dim, a.head_dim};
    CUtensorMap q{}, k{}, v{}, grad_out{};
    if (a.total_q > 0) {
        q = encode(boxes(a.q, a.total_q, a));
        grad_out = encode(boxes(a.grad_out, a.total_q, a));
    }
    if (a.total_k > 0) {
        k = encode(boxes(a.k, a.total_k, a));
        v = encode(boxes(a.v, a.total_k, a));
    }
    // A side without rows is never loaded, but its maps must be maps.
    if (a.total_k == 0) k = v = q;
    if (a.total_q == 0) q = grad_out = k;
    if (a.total_q > 0) {
        Problem p = problem_of(a, false);
        p.tiles[0] = q;
        p.tiles[1] = grad_out;
        p.tiles[2] = encode(boxes(out, a.total_q, a));
        p.chunks[0] = k;
        p.chunks[1] = v;
        p.out[0] = a.grad_q;
        using P = QueryPlan<HeadDim>;
        const Launch how = launch_of<Shared<P>>(a, a.total_q, P::kThreads);
        if (a.dropout.seed != nullptr)
            launch(attention_sm90_grad_query_kernel<T, HeadDim, true>, how, p);
        else
            launch(attention_sm90_grad_query_kernel<T, HeadDim, false>, how, p);
    }
    if (a.total_k > 0) {
        Problem p = problem_of(a, true);
        p.tiles[0] = k;
        p.tiles[1] = v;
        p.chunks[0] = q;
        p.chunks[1] = grad_out;
        p.out[0] = a.grad_k;
        p.out[1] = a.grad_v;
        using P = KeyPlan<HeadDim>;
        const Launch how = launch_of<KeyShared<P>>(a, a.total_k, P::kThreads);
        if (a.dropout.seed != nullptr)
            launch(attention_sm90_grad_key_kernel<T, HeadDim, true>, how, p);
        else
            launch(attention_sm90_grad_key_kernel<T, HeadDim, false>, how, p);
    }
}

template <typename T>
void backward_of(const AttentionArgs& a) {
    if (a.head_dim == 32)
        backward<T, 32>(a);
    else
        backward<T, 64>(a);
}

}  // namespace

bool attention_sm90_supports_backward(const AttentionArgs& a) {
    return (a.head_dim == 32 || a.head_dim == 64) && supports(a) && has_boxes(a.grad_out, a.total_q, a);
}

void attention_sm90_backward(const AttentionArgs& a) {
    if (a.heads == 0) return;
    if (attention::in_one_pass_sm90(a.causal, a.total_k, a.max_seqlen_k))
        return attention_sm90_backward_whole(a);
    if (a.dtype == Dtype::bfloat16)
        backward_of<__nv_bfloat16>(a);
    else
        backward_of<__half>(a);
}

}  // namespace rk::cuda
