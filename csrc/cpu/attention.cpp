// Attention over packed sequences, online softmax (Milakov and Gimelshein 2018; Dao et al. 2022), no [S, S]
// in memory.
//
// Scores are kept transposed, [key][query], with queries in the vector lanes. So the softmax needs no sum
// across lanes (maximum, exp and sum run down the keys, lane by lane), a ragged number of keys needs no mask
// (a key is a row), a dropout word of Philox is a vector, and neither K nor V is ever transposed: in S^T = K
// Q^T elements of K are broadcast against vectors of Q^T, in O = P V elements of P^T against vectors of V.
// Only the block of 48 queries is transposed, once. Keys hidden by key_mask are left out when K and V of a
// (sequence, head) are gathered as float32, and cost nothing.
//
// A block is 48 queries x 64 keys: P^T (12 KB) and V (16 KB at head_dim 64) stay in L1 between the two
// products. 4 S^2 head_dim flops forward; backward recomputes P from the log-sum-exp and does 10 S^2
// head_dim, one task per (sequence, head), which owns its dq, dk and dv: no races, no order that depends on
// threads. With a bias on the scores one task is a head with all its sequences, in order, as its gradient is
// a sum over them.
//
// Sequences of few queries and another number of keys, as a decoder has them, go another way (few_queries.h).
#include "csrc/cpu/attention.h"

#include "csrc/cpu/few_queries.h"
#include "csrc/cpu/key_dropout.h"
#include "csrc/cpu/scratch.h"
#include "csrc/cpu/simd.h"
#include "csrc/cpu/small_gemm.h"
#include "csrc/cpu/util.h"
#if defined(RK_CPU_ISA_AMX)
#    include "csrc/cpu/tile_attention.h"
#    include "csrc/cpu/tile_attention_backward.h"
#    include "csrc/cpu/tile_layers.h"
#endif

namespace rk::cpu::RK_CPU_ISA {
namespace {

constexpr int kQueries = 48;
constexpr int kKeys = 64;
constexpr int kQueryVectors = kQueries / kLanes;
constexpr int64_t kParallelWork =
    1 << 20;  // multiply-adds below which waking a thread costs more than it saves
constexpr float kInf = __builtin_inff();

// rows x columns of T, as float32 times factor; columns up to `width` (a multiple of kLanes) are zero.
template <class T>
void copy_rows(const T* from, int64_t from_stride, int64_t rows, int64_t columns, float factor, float* to,
               int64_t width) {
    const int64_t whole = columns / kLanes * kLanes;
    for (int64_t r = 0; r < rows; ++r, from += from_stride, to += width) {
        int64_t c = 0;
        for (; c < whole; c += kLanes) store(to + c, load(from + c) * factor);
        if (c < width) store(to + c, load_partial(from + c, static_cast<int>(columns - c)) * factor);
    }
}

// The same, transposed: to[column][row], rows padded with zeros to whole vectors.
template <class T>
void copy_transposed(const T* from, int64_t from_stride, int64_t rows, int64_t columns, float factor,
                     float* to) {
    for (int64_t r = 0; r < rows; r += kLanes)
        for (int64_t c = 0; c < columns; c += kLanes) {
            const int width = static_cast<int>(min64(columns - c, kLanes));
            vf32 square[kLanes];
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) {
                square[i] = vf32{};
                if (r + i < rows) {
                    const T* row = from + (r + i) * from_stride + c;
                    square[i] = (width == kLanes ? load(row) : load_partial(row, width)) * factor;
                }
            }
            transpose(square);
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i)
                if (i < width) store(to + (c + i) * kQueries + r, square[i]);
        }
}

template <class T>
void store_row(T* to, const float* from, int64_t columns, float factor) {
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) store(to + c, load(from + c) * factor);
    if (c < columns) store_partial(to + c, load(from + c) * factor, static_cast<int>(columns - c));
}

template <class T>
struct View {
    const T* data;
    int64_t token_stride, head_stride;

    explicit View(const HeadsView& v)
        : data(static_cast<const T*>(v.data)), token_stride(v.token_stride), head_stride(v.head_stride) {}
    const T* at(int64_t token, int64_t head) const {
        return data + token * token_stride + head * head_stride;
    }
};

// K and V of one (sequence, head) as float32 rows, without the keys that key_mask hides.
struct Keys {
    const float *k, *v;
    int64_t k_stride, v_stride;
    const int32_t* index;  // a kept key's place in its sequence
    int64_t count;

    // How many of the first keys a query may see under `j <= last`.
    int64_t visible(int64_t last) const {
        int64_t n = count;
        while (n > 0 && index[n - 1] > last) --n;
        return n;
    }
};

template <class T>
const float* as_floats(const T* p) {
    return reinterpret_cast<const float*>(p);
}

// Room for gathered keys; reused for the same (sequence, head).
struct KeyBuffer {
    float *k, *v;
    int32_t* index;
};

template <class T>
Keys gather_keys(const AttentionArgs& a, int64_t sequence, int64_t head, bool in_place,
                 const KeyBuffer& buffer) {
    const int64_t begin = a.cu_seqlens_k[sequence], length = a.cu_seqlens_k[sequence + 1] - begin;
    const int64_t d = a.head_dim, width = round_up(d, kLanes);
    const View<T> k(a.k), v(a.v);
    Keys keys{buffer.k, buffer.v, width, width, buffer.index, 0};
    if (a.key_mask == nullptr) {
        for (int64_t j = 0; j < length; ++j) buffer.index[j] = static_cast<int32_t>(j);
        keys.count = length;
        if (in_place) {
            keys.k = as_floats(k.at(begin, head)), keys.k_stride = k.token_stride;
            keys.v = as_floats(v.at(begin, head)), keys.v_stride = v.token_stride;
            return keys;
        }
        copy_rows(k.at(begin, head), k.token_stride, length, d, 1.0f, buffer.k, width);
        copy_rows(v.at(begin, head), v.token_stride, length, d, 1.0f, buffer.v, width);
        return keys;
    }
    for (int64_t j = 0; j < length; ++j) {
        if (!a.key_mask[begin + j]) continue;
        const int64_t n = keys.count++;
        buffer.index[n] = static_cast<int32_t>(j);
        copy_rows(k.at(begin + j, head), 0, 1, d, 1.0f, buffer.k + n * width, width);
        copy_rows(v.at(begin + j, head), 0, 1, d, 1.0f, buffer.v + n * width, width);
    }
    return keys;
}

// -inf where causal attention hides a key: query lane i (of all vectors) sees key index[j] when it is <= last
// + i.
void hide_later_keys(float* scores, const int32_t* index, int64_t keys, int64_t vectors, int64_t last) {
    for (int64_t j = 0; j < keys; ++j)
        for (int64_t n = 0; n < vectors; ++n) {
            float* p = scores + j * kQueries + n * kLanes;
            const vi32 hidden = lane_index() < set1(static_cast<int32_t>(index[j] - last - n * kLanes));
            store(p, select(hidden, set1(-kInf), load(p)));
        }
}

// The bias of `count` keys for a block of queries, as scores lie: to[key][query], zeros beyond the last query.
// The products are then added to it.
template <class T>
void start_with_bias(const AttentionArgs& a, const int32_t* index, int64_t count, int64_t head,
                     int64_t first_query, int64_t queries, float* to) {
    const T* from = static_cast<const T*>(a.bias) + (head * a.bias_rows + first_query) * a.bias_columns;
    if (index[count - 1] - index[0] == count - 1)
        return copy_transposed(from + index[0], a.bias_columns, queries, count, 1.0f, to);
    for (int64_t j = 0; j < count; ++j, to += kQueries)
        for (int64_t i = 0; i < round_up(queries, kLanes); ++i)
            to[i] = i < queries ? load1(from + i * a.bias_columns + index[j]) : 0.0f;
}

struct ForwardScratch {
    float *q_t, *p_t, *out, *max, *sum, *decay;
};

// One block of queries against all keys of its sequence.
template <class T>
void forward_block(const AttentionArgs& a, const ForwardScratch& s, const Keys& keys, int64_t sequence,
                   int64_t head, int64_t first_query) {
    const int64_t d = a.head_dim, width = round_up(d, kLanes);
    const int64_t begin = a.cu_seqlens_q[sequence], length = a.cu_seqlens_q[sequence + 1] - begin;
    const int64_t length_k = a.cu_seqlens_k[sequence + 1] - a.cu_seqlens_k[sequence];
    const int64_t queries = min64(length - first_query, kQueries);
    const int64_t vectors = ceil_div(queries, kLanes), row = begin + first_query;
    const View<T> q(a.q);
    copy_transposed(q.at(row, head), q.token_stride, queries, d, a.scale, s.q_t);
    for (int64_t n = 0; n < vectors; ++n) {
        store(s.max + n * kLanes, set1(-kInf));
        store(s.sum + n * kLanes, vf32{});
    }
    const int64_t last =
        first_query + length_k - length;  // the last key that the first query sees, if causal
    const int64_t visible = a.causal ? keys.visible(last + queries - 1) : keys.count;

    for (int64_t j0 = 0; j0 < visible; j0 += kKeys) {
        const int64_t count = min64(visible - j0, kKeys);
        if (a.bias != nullptr)
            start_with_bias<T>(a, keys.index + j0, count, head, first_query, queries, s.p_t);
        small_gemm<false>({keys.k + j0 * keys.k_stride, keys.k_stride, s.q_t, kQueries, s.p_t, kQueries, d,
                           nullptr, a.bias == nullptr ? Start::zero : Start::accumulate},
                          count, vectors * kLanes);
        if (a.causal && keys.index[j0 + count - 1] > last)
            hide_later_keys(s.p_t, keys.index + j0, count, vectors, last);
        for (int64_t n = 0; n < vectors; ++n) {
            float* p = s.p_t + n * kLanes;
            const vf32 old_max = load(s.max + n * kLanes);
            vf32 top[4] = {old_max, old_max, old_max, old_max};
            int64_t j = 0;
            for (; j + 4 <= count; j += 4)
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) top[i] = vmax(load(p + (j + i) * kQueries), top[i]);
            for (; j < count; ++j) top[0] = vmax(load(p + j * kQueries), top[0]);
            const vf32 max = vmax(vmax(top[0], top[1]), vmax(top[2], top[3]));
            const vf32 shift = select(max == set1(-kInf), vf32{}, max);
            vf32 sum[2] = {};
            j = 0;
            for (; j + 2 <= count; j += 2)
#pragma GCC unroll 2
                for (int i = 0; i < 2; ++i) {
                    const vf32 e = exp(load(p + (j + i) * kQueries) - shift);
                    sum[i] += e;
                    store(p + (j + i) * kQueries, e);
                }
            if (j < count) {
                const vf32 e = exp(load(p + j * kQueries) - shift);
                sum[0] += e;
                store(p + j * kQueries, e);
            }
            const vf32 decay = exp(old_max - shift);
            store(s.max + n * kLanes, max);
            store(s.decay + n * kLanes, decay);
            store(s.sum + n * kLanes, fma(load(s.sum + n * kLanes), decay, sum[0] + sum[1]));
            if (a.dropout.on) {
                KeyDropout keep(a.dropout, row + n * kLanes, head);
                for (j = 0; j < count; ++j)
                    store(p + j * kQueries, load(p + j * kQueries) * keep.multiplier(keys.index[j0 + j]));
            }
        }
        small_gemm<true>({s.p_t, kQueries, keys.v + j0 * keys.v_stride, keys.v_stride, s.out, width, count,
                          s.decay, j0 == 0 ? Start::zero : Start::scale},
                         queries, width);
    }

    T* out = static_cast<T*>(a.out) + (row * a.heads + head) * d;
    float* lse = a.lse + head * a.total_q + row;
    for (int64_t i = 0; i < queries; ++i, out += a.heads * d) {
        const bool blind = visible == 0 || s.sum[i] == 0.0f;
        lse[i] = blind ? -kInf : s.max[i] + __builtin_logf(s.sum[i]);
        if (visible == 0)
            for (int64_t c = 0; c < d; ++c) store1(out + c, 0.0f);
        else
            store_row(out, s.out + i * width, d, blind ? 0.0f : 1.0f / s.sum[i]);
    }
}

// Work is cut into contiguous runs of tasks of about equal cost, a few per thread, which threads take in
// turn. What a task computes does not depend on who runs it.
struct Plan {
    int64_t* first_task;  // [batch + 1]
    double* cost_before;  // [batch + 1]
    int64_t batch, runs;

    // The task at which run r starts.
    int64_t run_begin(int64_t r) const {
        if (r >= runs) return first_task[batch];
        const double cost = cost_before[batch] * static_cast<double>(r) / static_cast<double>(runs);
        int64_t low = 0, high = batch;  // the last sequence that starts at or before cost
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (cost_before[middle] <= cost ? low : high) = middle;
        }
        const double share = cost_before[low + 1] - cost_before[low];
        const int64_t tasks = first_task[low + 1] - first_task[low];
        if (!(share > 0)) return first_task[low];
        const int64_t within =
            static_cast<int64_t>((cost - cost_before[low]) / share * static_cast<double>(tasks));
        return first_task[low] + min64(within, tasks);
    }
};

// run(task begin, task end) over all tasks; tasks_of(sequence) and cost_of(sequence) describe a sequence.
template <class Tasks, class Cost, class Run>
void run_balanced(const AttentionArgs& a, const Tasks& tasks_of, const Cost& cost_of, const Run& run) {
    static thread_local Scratch memory;
    memory.reset(static_cast<size_t>(a.batch + 1) * 16, 2);
    Plan plan{memory.take<int64_t>(a.batch + 1), memory.take<double>(a.batch + 1), a.batch, 1};
    plan.first_task[0] = 0, plan.cost_before[0] = 0;
    for (int64_t b = 0; b < a.batch; ++b) {
        plan.first_task[b + 1] = plan.first_task[b] + tasks_of(b);
        plan.cost_before[b + 1] = plan.cost_before[b] + cost_of(b);
    }
    const int64_t tasks = plan.first_task[a.batch];
    const double cost = plan.cost_before[a.batch];
    const int64_t threads = cost < 2.0 * kParallelWork ? 1 : num_threads();
    if (threads == 1) {
        if (tasks > 0) run(plan, int64_t{0}, tasks);
        return;
    }
    plan.runs = min64(8 * threads, static_cast<int64_t>(cost / (kParallelWork / 4)));
    parallel_tasks(plan.runs, threads, [&](int64_t r) {
        const int64_t begin = plan.run_begin(r), end = plan.run_begin(r + 1);
        if (begin < end) run(plan, begin, end);
    });
}

int64_t longest_sequence(const int32_t* cu_seqlens, int64_t batch) {
    int64_t longest = 0;
    for (int64_t b = 0; b < batch; ++b) longest = max64(longest, cu_seqlens[b + 1] - cu_seqlens[b]);
    return longest;
}

int64_t query_blocks(const AttentionArgs& a, int64_t b) {
    return ceil_div(a.cu_seqlens_q[b + 1] - a.cu_seqlens_q[b], kQueries);
}

double score_work(const AttentionArgs& a, int64_t b) {
    return static_cast<double>(a.cu_seqlens_q[b + 1] - a.cu_seqlens_q[b]) *
           static_cast<double>(a.cu_seqlens_k[b + 1] - a.cu_seqlens_k[b]) *
           static_cast<double>(a.heads * a.head_dim);
}

// What computes no block in another way (tile_attention.h does).
struct NoTiles {
    static constexpr int64_t kBlocksOfTask = 1;
    NoTiles(const AttentionArgs&, int64_t) {}
    bool bring(int64_t, int64_t) { return false; }
    bool block(int64_t) { return false; }
    bool run(int64_t, int64_t) { return false; }
};

// A task is up to kBlocksOfTask blocks of queries of a head.
template <class T, class Tiles = NoTiles>
void forward(const AttentionArgs& a) {
    const int64_t d = a.head_dim, width = round_up(d, kLanes);
    const int64_t longest = longest_sequence(a.cu_seqlens_k, a.batch);
    const auto tasks_of_head = [&](int64_t b) {
        return has_few_queries(a, b) ? 0 : ceil_div(query_blocks(a, b), Tiles::kBlocksOfTask);
    };
    run_balanced(
        a, [&](int64_t b) { return a.heads * tasks_of_head(b); },
        [&](int64_t b) { return has_few_queries(a, b) ? 0.0 : 2 * score_work(a, b) + 1.0; },
        [&](const Plan& plan, int64_t task, int64_t end) {
            static thread_local Scratch memory;
            memory.reset(static_cast<size_t>(d * kQueries + kKeys * kQueries + kQueries * width +
                                             3 * kQueries + longest * (2 * width + 1)) *
                             4,
                         9);
            ForwardScratch s{memory.take<float>(d * kQueries),     memory.take<float>(kKeys * kQueries),
                             memory.take<float>(kQueries * width), memory.take<float>(kQueries),
                             memory.take<float>(kQueries),         memory.take<float>(kQueries)};
            KeyBuffer buffer{memory.take<float>(longest * width), memory.take<float>(longest * width),
                             memory.take<int32_t>(longest)};
            Tiles tiles(a, longest);
            int64_t sequence = 0;
            while (task < end) {
                while (plan.first_task[sequence + 1] <= task) ++sequence;
                const int64_t tasks = tasks_of_head(sequence), within = task - plan.first_task[sequence];
                const int64_t head = within / tasks, last = min64(within % tasks + end - task, tasks);
                const int64_t blocks = min64(query_blocks(a, sequence), last * Tiles::kBlocksOfTask);
                const int64_t length = a.cu_seqlens_q[sequence + 1] - a.cu_seqlens_q[sequence];
                const bool in_place = sizeof(T) == 4 && d % kLanes == 0 && length <= kQueries / 2;
                const bool on_tiles = tiles.bring(sequence, head);
                Keys keys{};
                for (int64_t block = within % tasks * Tiles::kBlocksOfTask; block < blocks; ++block) {
                    if (on_tiles && tiles.block(block * kQueries)) continue;
                    if (keys.index == nullptr) keys = gather_keys<T>(a, sequence, head, in_place, buffer);
                    forward_block<T>(a, s, keys, sequence, head, block * kQueries);
                }
                task += last - within % tasks;
            }
        });
}

struct BackwardScratch {
    float *q, *q_t, *grad_out, *grad_out_t, *grad_q, *lse;
    float *p_t, *ds_t;       // [keys, kQueries]
    float *grad_k, *grad_v;  // [keys, width]
    float* grad_bias;        // [keys, bias_width], a sum over sequences; or null
    int64_t bias_width;
};

struct RowSums {
    vf32 p{}, p_dp{};
};

// e^(score - lse) (in place of the scores, negative where dropout drops it) and dP with its dropout factor,
// of one vector of queries and `count` keys; adds to the row sums.
void probabilities(const AttentionArgs& a, float* p, float* dp, const int32_t* index, int64_t count, vf32 lse,
                   int64_t row, int64_t head, RowSums& sums) {
    if (!a.dropout.on) {
        for (int64_t j = 0; j < count; ++j, p += kQueries, dp += kQueries) {
            const vf32 e = exp(load(p) - lse);
            sums.p += e;
            sums.p_dp = fma(e, load(dp), sums.p_dp);
            store(p, e);
        }
        return;
    }
    KeyDropout keep(a.dropout, row, head);
    for (int64_t j = 0; j < count; ++j, p += kQueries, dp += kQueries) {
        const vf32 multiplier = keep.multiplier(index[j]);
        const vf32 e = exp(load(p) - lse), g = load(dp) * multiplier;
        sums.p += e;
        sums.p_dp = fma(e, g, sums.p_dp);
        store(p, select(multiplier == vf32{}, -e, e));
        store(dp, g);
    }
}

// dS = P (dP - delta) in place of dP, and what multiplies grad_out, P with its dropout factor, in place of P.
void score_gradients(const AttentionArgs& a, float* p, float* dp, int64_t count, vf32 inverse, vf32 delta) {
    if (!a.dropout.on) {
        for (int64_t j = 0; j < count; ++j, p += kQueries, dp += kQueries) {
            const vf32 e = load(p) * inverse;
            store(p, e);
            store(dp, e * (load(dp) - delta));
        }
        return;
    }
    for (int64_t j = 0; j < count; ++j, p += kQueries, dp += kQueries) {
        const vf32 e = load(p) * inverse;
        store(dp, vabs(e) * (load(dp) - delta));
        store(p, select(e < vf32{}, vf32{}, e * a.dropout.scale));
    }
}

// Everything of one (sequence, head). delta, the row sum of P dP, is taken from P and dP themselves and not
// from grad_out * out: then dP - delta cancels exactly where one key has all the weight. P is divided by its
// own row sum, so that the rounding of the log-sum-exp, large when scores are, leaves it. So e^(score - lse)
// and dP of 48 queries and all keys are kept (in L2 up to a thousand keys or so) before the products that
// need the sums.
template <class T>
void backward_head(const AttentionArgs& a, const BackwardScratch& s, const Keys& keys, int64_t sequence,
                   int64_t head) {
    const int64_t d = a.head_dim, width = round_up(d, kLanes);
    const int64_t begin = a.cu_seqlens_q[sequence], length = a.cu_seqlens_q[sequence + 1] - begin;
    const int64_t begin_k = a.cu_seqlens_k[sequence], length_k = a.cu_seqlens_k[sequence + 1] - begin_k;
    const View<T> q(a.q), grad_out(a.grad_out);
    for (int64_t i = 0; i < keys.count * width; i += kLanes) {
        store(s.grad_k + i, vf32{});
        store(s.grad_v + i, vf32{});
    }
    for (int64_t q0 = 0; q0 < length; q0 += kQueries) {
        const int64_t queries = min64(length - q0, kQueries);
        const int64_t vectors = ceil_div(queries, kLanes), columns = vectors * kLanes, row = begin + q0;
        copy_rows(q.at(row, head), q.token_stride, queries, d, a.scale, s.q, width);
        copy_rows(grad_out.at(row, head), grad_out.token_stride, queries, d, 1.0f, s.grad_out, width);
        copy_transposed(s.q, width, queries, d, 1.0f, s.q_t);
        copy_transposed(s.grad_out, width, queries, d, 1.0f, s.grad_out_t);
        for (int64_t i = 0; i < columns; ++i) {
            // +inf for a row that sees no key, and for lanes beyond the last query: their P is zero
            const float lse = i < queries ? a.lse[head * a.total_q + row + i] : -kInf;
            s.lse[i] = lse == -kInf ? kInf : lse;
        }
        RowSums sums[kQueryVectors];
        const int64_t last = q0 + length_k - length;
        const int64_t visible = a.causal ? keys.visible(last + queries - 1) : keys.count;
        for (int64_t j0 = 0; j0 < visible; j0 += kKeys) {
            const int64_t count = min64(visible - j0, kKeys);
            float *p = s.p_t + j0 * kQueries, *dp = s.ds_t + j0 * kQueries;
            if (a.bias != nullptr) start_with_bias<T>(a, keys.index + j0, count, head, q0, queries, p);
            small_gemm<false>({keys.k + j0 * keys.k_stride, keys.k_stride, s.q_t, kQueries, p, kQueries, d,
                               nullptr, a.bias == nullptr ? Start::zero : Start::accumulate},
                              count, columns);
            small_gemm<false>({keys.v + j0 * keys.v_stride, keys.v_stride, s.grad_out_t, kQueries, dp,
                               kQueries, d, nullptr, Start::zero},
                              count, columns);
            if (a.causal && keys.index[j0 + count - 1] > last)
                hide_later_keys(p, keys.index + j0, count, vectors, last);
            for (int64_t n = 0; n < vectors; ++n)
                probabilities(a, p + n * kLanes, dp + n * kLanes, keys.index + j0, count,
                              load(s.lse + n * kLanes), row + n * kLanes, head, sums[n]);
        }
        for (RowSums& of : sums) {
            of.p = select(of.p == vf32{}, vf32{}, 1.0f / of.p);
            of.p_dp *= of.p;
        }
        for (int64_t j0 = 0; j0 < visible; j0 += kKeys) {
            const int64_t count = min64(visible - j0, kKeys);
            float *p = s.p_t + j0 * kQueries, *ds = s.ds_t + j0 * kQueries;
            for (int64_t n = 0; n < vectors; ++n)
                score_gradients(a, p + n * kLanes, ds + n * kLanes, count, sums[n].p, sums[n].p_dp);
            for (int64_t j = 0; j < count && s.grad_bias != nullptr; ++j) {
                float* to = s.grad_bias + keys.index[j0 + j] * s.bias_width + q0;
                for (int64_t i = 0; i < columns; i += kLanes)
                    store(to + i, load(to + i) + load(ds + j * kQueries + i));
            }
            small_gemm<false>({p, kQueries, s.grad_out, width, s.grad_v + j0 * width, width, queries, nullptr,
                               Start::accumulate},
                              count, width);
            small_gemm<false>(
                {ds, kQueries, s.q, width, s.grad_k + j0 * width, width, queries, nullptr, Start::accumulate},
                count, width);
            small_gemm<true>({ds, kQueries, keys.k + j0 * keys.k_stride, keys.k_stride, s.grad_q, width,
                              count, nullptr, j0 == 0 ? Start::zero : Start::accumulate},
                             queries, width);
        }
        T* grad_q = static_cast<T*>(a.grad_q) + (row * a.heads + head) * d;
        for (int64_t i = 0; i < queries; ++i, grad_q += a.heads * d) {
            if (visible == 0)
                for (int64_t c = 0; c < d; ++c) store1(grad_q + c, 0.0f);
            else
                store_row(grad_q, s.grad_q + i * width, d, a.scale);
        }
    }
    T* grad_k = static_cast<T*>(a.grad_k) + (begin_k * a.heads + head) * d;
    T* grad_v = static_cast<T*>(a.grad_v) + (begin_k * a.heads + head) * d;
    for (int64_t j = 0, n = 0; j < length_k; ++j, grad_k += a.heads * d, grad_v += a.heads * d) {
        if (n < keys.count && keys.index[n] == j) {
            store_row(grad_k, s.grad_k + n * width, d, 1.0f);
            store_row(grad_v, s.grad_v + n * width, d, 1.0f);
            ++n;
        } else {
            for (int64_t c = 0; c < d; ++c) store1(grad_k + c, 0.0f), store1(grad_v + c, 0.0f);
        }
    }
}

// A head's sum, [keys, queries], as the gradient of its bias: [bias_rows, bias_columns].
template <class T>
void store_grad_bias(const AttentionArgs& a, const BackwardScratch& s, int64_t head, int64_t keys) {
    T* to = static_cast<T*>(a.grad_bias) + head * a.bias_rows * a.bias_columns;
    for (int64_t i = 0; i < a.bias_rows; i += kLanes)
        for (int64_t j = 0; j < a.bias_columns; ++j)
            for (int64_t row = i; row < min64(i + kLanes, a.bias_rows); ++row)
                store1(to + row * a.bias_columns + j,
                       j < keys && row < s.bias_width ? s.grad_bias[j * s.bias_width + row] : 0.0f);
}

// Memory of the calling thread for backward_head: KeyBuffer and BackwardScratch.
struct BackwardMemory {
    KeyBuffer keys;
    BackwardScratch s;

    BackwardMemory(const AttentionArgs& a, int64_t longest) {
        const int64_t d = a.head_dim, width = round_up(d, kLanes);
        s.bias_width = a.bias == nullptr ? 0 : round_up(longest_sequence(a.cu_seqlens_q, a.batch), kLanes);
        static thread_local Scratch memory;
        memory.reset(static_cast<size_t>(3 * kQueries * width + 2 * d * kQueries + kQueries +
                                         longest * (4 * width + 2 * kQueries + 1 + s.bias_width)) *
                         4,
                     15);
        s.q = memory.take<float>(kQueries * width);
        s.q_t = memory.take<float>(d * kQueries);
        s.grad_out = memory.take<float>(kQueries * width);
        s.grad_out_t = memory.take<float>(d * kQueries);
        s.p_t = memory.take<float>(longest * kQueries);
        s.ds_t = memory.take<float>(longest * kQueries);
        s.grad_q = memory.take<float>(kQueries * width);
        s.lse = memory.take<float>(kQueries);
        s.grad_k = memory.take<float>(longest * width);
        s.grad_v = memory.take<float>(longest * width);
        s.grad_bias = a.bias == nullptr ? nullptr : memory.take<float>(longest * s.bias_width);
        keys = {memory.take<float>(longest * width), memory.take<float>(longest * width),
                memory.take<int32_t>(longest)};
    }
};

template <class T, class Tiles = NoTiles>
void backward(const AttentionArgs& a) {
    const int64_t longest = longest_sequence(a.cu_seqlens_k, a.batch);
    const auto cost = [&](int64_t b) { return 5 * score_work(a, b) + 1.0; };
    if (a.bias != nullptr) {
        double work = 0;
        for (int64_t b = 0; b < a.batch; ++b) work += cost(b);
        parallel_tasks(a.heads, work < 2.0 * kParallelWork ? 1 : num_threads(), [&](int64_t head) {
            const BackwardMemory memory(a, longest);
            for (int64_t i = 0; i < longest * memory.s.bias_width; i += kLanes)
                store(memory.s.grad_bias + i, vf32{});
            for (int64_t b = 0; b < a.batch; ++b)
                backward_head<T>(a, memory.s, gather_keys<T>(a, b, head, false, memory.keys), b, head);
            store_grad_bias<T>(a, memory.s, head, longest);
        });
        return;
    }
    run_balanced(
        a, [&](int64_t) { return a.heads; }, cost,
        [&](const Plan& plan, int64_t task, int64_t end) {
            const BackwardMemory memory(a, longest);
            Tiles tiles(a, longest);
            int64_t sequence = 0;
            for (; task < end; ++task) {
                while (plan.first_task[sequence + 1] <= task) ++sequence;
                const int64_t head = task - plan.first_task[sequence];
                if (tiles.run(sequence, head)) continue;
                const Keys keys = gather_keys<T>(a, sequence, head, false, memory.keys);
                backward_head<T>(a, memory.s, keys, sequence, head);
            }
        });
}

}  // namespace

void cached_attention(const AttentionArgs& a) {
    if (a.bf16)
        FewQueries<bf16>(a).run();
    else
        FewQueries<float>(a).run();
}

void attention_forward(const AttentionArgs& a) {
    cached_attention(a);  // the sequences that it has
#if defined(RK_CPU_ISA_AMX)
    static_assert(kQueries == kTileQueries, "the blocks of tile_attention.h");
    if (!a.dropout.on && a.bias == nullptr)  // neither is for tiles
        return on_parts(a.bf16, [&](auto parts, auto element) {
            using T = decltype(element);
            forward<T, TileAttention<T, parts()>>(a);
        });
#endif
    if (a.bf16)
        forward<bf16>(a);
    else
        forward<float>(a);
}

void attention_backward(const AttentionArgs& a) {
#if defined(RK_CPU_ISA_AMX)
    if (a.bias == nullptr)
        return a.bf16 ? backward<bf16, TileAttentionBackward<bf16>>(a)
                      : backward<float, TileAttentionBackward<float>>(a);
#endif
    if (a.bf16)
        backward<bf16>(a);
    else
        backward<float>(a);
}

}  // namespace rk::cpu::RK_CPU_ISA
