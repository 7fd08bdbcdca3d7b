// Attention forward on Hopper, for the sequence lengths of RoBERTa. Roles and scheduling: attention_sm90.cuh.
//
// Idea. At 512 tokens and head dim 64 all keys and values of a head are 128 KiB and fit in the shared memory
// of one multiprocessor, so a block loads them once for a (sequence, head) and walks its 64-row query tiles
// over them. Scores come from wgmma with the queries in registers and the keys in shared memory; the
// probabilities stay in registers as the first operand of the second wgmma, with the values in shared memory
// as they came. While a warpgroup takes the exponentials of one chunk of 64 keys, the tensor cores multiply
// its previous chunk with the values, and the chunks of the other two. The running maximum is moved only when
// it has grown by more than a factor 2^8: usually it is that of the first chunk, and the accumulators are
// never rescaled. (Nothing is lost by it: maximum and sums belong together, whatever the maximum.)
//
// Floor, for one head of n queries and keys and head dim d: 4 n n d flops, n n exponentials, 8 n d bytes (q,
// k, v, out at 2 bytes). At n = 512, d = 64, over a whole H200: 67 Mflop are 68 ns of 990 Tflop/s, 262144
// exponentials are 71 ns (16 a clock and multiprocessor), 256 KiB are 55 ns of 4.8 TB/s. At n = 128: 4.2, 4.4
// and 14 ns. So memory bounds it below some 400 tokens, above it the exponentials as much as the products.
//
// Shared memory at head dim 64, in KiB: keys 10 x 8, values 10 x 8, queries 3 x 2 x 8.
// Registers: 512 threads start with 128 each; the producer's warpgroup keeps 40, consumers get 152.
#include "csrc/cuda/attention_sm90.cuh"

namespace rk::cuda {
namespace {

using namespace sm90;

template <int HeadDim>
using ForwardPlan = Plan<HeadDim, 1, HeadDim == 128 ? 2 : 3,
                         HeadDim == 128  ? 6
                         : HeadDim == 64 ? 10
                                         : 16,
                         HeadDim == 128 ? 1 : 2>;

template <typename T, class P, bool Drops>
struct ForwardConsumer : Consumer<T, P> {
    using Base = Consumer<T, P>;
    using Base::Base;
    using typename Base::Fragment;
    using typename Base::Rows;
    using typename Base::Scores;
    using typename Base::Weights;

    // scores become exp2(score - maximum); factor: what earlier sums must be multiplied by.
    __device__ __forceinline__ void exponentials(Scores& scores, float (&maximum)[2], float (&sum)[2],
                                                 float (&factor)[2]) const {
        const float scale = this->problem.score_scale;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float most = -INFINITY;
#pragma unroll
            for (int i = 0; i < 8; ++i)
#pragma unroll
                for (int e = 0; e < 2; ++e) most = fmaxf(most, scores[4 * i + 2 * r + e]);
            most = warp_max<4>(most);
            const float before = maximum[r];
            const bool grew = most > before + this->problem.growth;
            if (grew) maximum[r] = most;
            factor[r] = grew ? ptx::exp2((before - most) * scale) : 1.0f;
            const float shift = maximum[r] == -INFINITY ? 0.0f : maximum[r] * scale;
            float chunk_sum = 0.0f;
#pragma unroll
            for (int i = 0; i < 8; ++i)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& score = scores[4 * i + 2 * r + e];
                    score = ptx::exp2(fmaf(score, scale, -shift));
                    chunk_sum += score;
                }
            sum[r] = fmaf(sum[r], factor[r], chunk_sum);
        }
    }

    // What the scores of chunk c of the tile become, but for their rounding: masked, exponentials, dropped.
    __device__ __forceinline__ void softmax(Scores& scores, float (&maximum)[2], float (&sum)[2],
                                            float (&factor)[2], const Unit& unit, int c,
                                            const PhiloxKey& key) const {
        const int first = c * kTile;
        if (this->needs_mask(unit, first)) this->mask(scores, unit, first);
        exponentials(scores, maximum, sum, factor);
        if (Drops) {
            uint32_t kept[2];
            this->kept_keys(kept, unit, first, key);
#pragma unroll
            for (int i = 0; i < 32; ++i)
                if ((kept[i / 2 % 2] >> (i / 4 * 4 + i % 2) & 1) == 0) scores[i] = 0.0f;
        }
    }

    __device__ __forceinline__ void tile(const Unit& unit, int buffer, const PhiloxKey& key) const {
        Fragment queries;
        this->load_fragment(queries, this->shared.tiles[this->consumer][buffer][0]);
        this->tile_read(buffer);
        this->give_sign(queries);

        Rows out;
        this->zero(out);
        float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f}, factor[2];
        if (unit.chunks > 0) {
            Scores scores;
            Weights probabilities;
            this->wait_for(0, unit.use);
            this->multiply_transposed(scores, queries, 0, unit.use);
            ptx::wgmma_wait<0>(scores);
            softmax(scores, maximum, sum, factor, unit, 0, key);
            this->round(probabilities, scores);
            for (int c = 1; c < unit.chunks; ++c) {
                const int use = unit.use + c;
                this->wait_for(0, use);
                this->multiply_transposed(scores, queries, 0, use);
                this->wait_for(1, use - 1);
                this->multiply(out, probabilities, 1, use - 1);
                ptx::wgmma_wait<1>(scores);  // the product with the values goes on
                softmax(scores, maximum, sum, factor, unit, c, key);
                // A sum is never negative. Since the vote asks, the exponentials come before it and the wait,
                // under the product: the compiler would take half of them after.
                const bool moved = __any_sync(
                    kAllLanes, factor[0] != 1.0f || factor[1] != 1.0f || sum[0] < 0.0f || sum[1] < 0.0f);
                ptx::wgmma_wait<0>(out);
                if (unit.held > 0) this->release(use - 1);
                if (moved) {
#pragma unroll
                    for (int panel = 0; panel < P::kPanels; ++panel)
#pragma unroll
                        for (int i = 0; i < P::kPanel / 2; ++i) out[panel][i] *= factor[i / 2 % 2];
                }
                this->round(probabilities, scores);
            }
            const int last = unit.use + unit.chunks - 1, rows = unit.others - (unit.chunks - 1) * kTile;
            this->wait_for(1, last);
            if (rows < kTile) this->clear(1, last, rows);
            this->multiply(out, probabilities, 1, last);
            ptx::wgmma_wait<0>(out);
            if (unit.held > 0) this->release(last);
        }
        this->release_unseen(unit, unit.chunks, unit.held);

        float inverse[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float total = warp_sum<4>(sum[r]);
            inverse[r] = total == 0.0f ? 0.0f : (Drops ? this->problem.dropout.scale : 1.0f) / total;
            if (this->row + 8 * r < unit.rows && this->lane % 4 == 0)
                this->problem.lse[unit.head * this->problem.total_q + unit.first_row + this->row + 8 * r] =
                    total == 0.0f ? -INFINITY
                                  : (maximum[r] * this->problem.score_scale + log2f(total)) * kLn2;
        }
        this->store(this->problem.out[0], out, inverse, unit);
    }
};

template <typename T, int HeadDim, bool Drops>
__global__ void __launch_bounds__(ForwardPlan<HeadDim>::kThreads, 1)
    attention_sm90_forward_kernel(const __grid_constant__ Problem problem) {
    using P = ForwardPlan<HeadDim>;
    Shared<P>& shared = *reinterpret_cast<Shared<P>*>(shared_memory());
    run_block<P, false>(problem, shared, [&] {
        PhiloxKey key{};
        if (Drops) key = philox_key(problem.dropout);
        const ForwardConsumer<T, P, Drops> consumer(problem, shared);
        consumer.each_tile([&](const Unit& unit, int buffer) { consumer.tile(unit, buffer, key); });
    });
}

template <typename T, int HeadDim>
void forward(const AttentionArgs& a) {
    Problem p = problem_of(a, false);
    p.clears_lse = true;
    p.tiles[0] = encode(boxes(a.q, a.total_q, a));
    // Without keys nothing is loaded through their maps, but they must be maps.
    p.chunks[0] = a.total_k > 0 ? encode(boxes(a.k, a.total_k, a)) : p.tiles[0];
    p.chunks[1] = a.total_k > 0 ? encode(boxes(a.v, a.total_k, a)) : p.tiles[0];
    p.out[0] = a.out;
    const Launch how = launch_of<Shared<ForwardPlan<HeadDim>>>(a, a.total_q, ForwardPlan<HeadDim>::kThreads);
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
    return (a.head_dim == 32 || a.head_dim == 64 || a.head_dim == 128) && supports(a);
}

void attention_sm90_forward(const AttentionArgs& a) {
    if (a.total_q == 0 || a.heads == 0) return;
    if (a.dtype == Dtype::bfloat16)
        forward_of<__nv_bfloat16>(a);
    else
        forward_of<__half>(a);
}

}  // namespace rk::cuda
