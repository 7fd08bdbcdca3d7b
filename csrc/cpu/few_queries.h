// Attention of a few queries against many keys, as a decoder has it: one query, and the keys and values of a cache.
//
// The time is that of reading K and V once, so they are read where they lie, row by row, whatever their strides: nothing
// is laid out first. Vectors run along head_dim. The sums of kLanes keys' products are added across the lanes together
// (a tree of interleaves, two of them a key), which leaves the scores with a key in each lane for the softmax. A sum over
// values keeps all of head_dim in registers.
//
// A task is up to kFewKeys of the visible keys of a (sequence, head): the largest score, the sum of the exponentials and
// what they weigh. Then these parts are put together, in the order of the keys. So a query's bits depend on it and on the
// keys that it sees: not on the other queries, hidden keys, the rest of the batch or the threads.
#pragma once
#include "csrc/cpu/attention.h"
#include "csrc/cpu/scratch.h"
#include "csrc/cpu/simd.h"
#include "csrc/cpu/util.h"

namespace rk::cpu::RK_CPU_ISA {

constexpr int64_t kFewQueries = kMostCachedQueries;
constexpr int64_t kFewKeys = 256;
constexpr int64_t kMostWidth = 128;
constexpr double kBytesOfThread = 256
                                  << 10;  // of K and V, below which waking a thread costs more than it saves

// Whether a sequence is computed here: all of cached_attention's; of the op attention those of few queries and another
// number of keys. Queries that are keys too (an encoder's, a prompt's) never are: how many of them a sequence has depends
// on its padding.
inline bool has_few_queries(const AttentionArgs& a, int64_t b) {
    const int64_t queries = a.cu_seqlens_q[b + 1] - a.cu_seqlens_q[b];
    const int64_t keys = a.cu_seqlens_k[b + 1] - a.cu_seqlens_k[b];
    const bool cached = a.k.sequence_stride >= 0;
    return queries <= kFewQueries && (cached || queries != keys) && a.bias == nullptr && !a.dropout.on;
}

// The visible keys of a sequence, by number: rows first, first + 1, ... of it, or those of `index` where they have holes.
struct VisibleKeys {
    int64_t first, count;
    const int32_t* index;

    int64_t row(int64_t n) const { return index == nullptr ? first + n : index[n]; }
    // How many of them are at or before row `last`.
    int64_t until(int64_t last) const {
        if (index == nullptr) return max64(0, min64(count, last + 1 - first));
        int64_t n = count;
        while (n > 0 && index[n - 1] > last) --n;
        return n;
    }
};

// room: for the rows of all keys.
inline VisibleKeys visible_keys(const bool* mask, int64_t length, int32_t* room) {
    if (mask == nullptr) return {0, length, nullptr};
    int64_t count = 0, first = 0, end = length;
    for (int64_t j = 0; j < length; ++j) count += mask[j] ? 1 : 0;
    if (count == 0) return {0, 0, nullptr};
    while (!mask[first]) ++first;
    while (!mask[end - 1]) --end;
    if (end - first == count) return {first, count, nullptr};
    for (int64_t j = first, n = 0; j < end; ++j)
        if (mask[j]) room[n++] = static_cast<int32_t>(j);
    return {first, count, room};
}

// Rows of K or V of one (sequence, head), from its visible key `begin` on.
template <class T>
struct KeyRows {
    const T* data;  // of the sequence's first row
    int64_t stride;
    const VisibleKeys& visible;
    int64_t begin;

    const T* at(int64_t n) const { return data + visible.row(begin + n) * stride; }
};

// Lane i: the sum of the lanes of rows[i].
RK_INLINE vf32 add_across(vf32 (&rows)[kLanes]) {
#pragma GCC unroll 4
    for (int half = kLanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i)
            rows[i] = interleave_lower(rows[i], rows[i + half]) + interleave_upper(rows[i], rows[i + half]);
    return rows[0];
}

// Scores of kLanes keys. kVectors: vectors of a row; 0: any head_dim, whose last vector may be a part of one.
template <int kVectors, class T>
RK_INLINE vf32 few_scores(const T* const (&row)[kLanes], const float* q, int64_t d) {
    vf32 sums[kLanes];
    if constexpr (kVectors > 0) {
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) {
            sums[j] = load(row[j]) * load(q);
#pragma GCC unroll 8
            for (int c = 1; c < kVectors; ++c)
                sums[j] = fma(load(row[j] + c * kLanes), load(q + c * kLanes), sums[j]);
        }
    } else {
        for (int j = 0; j < kLanes; ++j) {
            sums[j] = vf32{};
            for (int64_t c = 0; c < d; c += kLanes)
                sums[j] = fma(load_some(row[j] + c, static_cast<int>(d - c)), load(q + c), sums[j]);
        }
    }
    return add_across(sums);
}

// out += sum over `count` keys of p[n] times row n of v. Keys are taken in turns by kSets sums, which are added at the end.
template <int kVectors, class T>
RK_INLINE void add_values(const KeyRows<T>& v, const float* p, int64_t count, int64_t d, float* out) {
    if constexpr (kVectors > 0) {
        constexpr int kSets = kVectors < 4 ? 4 : kVectors < 8 ? 2 : 1;
        vf32 sums[kSets][kVectors] = {};
        int64_t n = 0;
        for (; n + kSets <= count; n += kSets)
#pragma GCC unroll 4
            for (int s = 0; s < kSets; ++s) {
                const T* row = v.at(n + s);
#pragma GCC unroll 8
                for (int c = 0; c < kVectors; ++c)
                    sums[s][c] = fma(set1(p[n + s]), load(row + c * kLanes), sums[s][c]);
            }
        for (; n < count; ++n)
#pragma GCC unroll 8
            for (int c = 0; c < kVectors; ++c)
                sums[0][c] = fma(set1(p[n]), load(v.at(n) + c * kLanes), sums[0][c]);
#pragma GCC unroll 8
        for (int c = 0; c < kVectors; ++c) {
            vf32 sum = sums[0][c];
            if constexpr (kSets > 1) sum += sums[1][c];
            if constexpr (kSets > 2) sum += sums[2][c] + sums[3][c];
            store(out + c * kLanes, sum);
        }
    } else {
        for (int64_t c = 0; c < d; c += kLanes) {
            vf32 sums[2] = {};
            for (int64_t n = 0; n < count; ++n)
                sums[n % 2] = fma(set1(p[n]), load_some(v.at(n) + c, static_cast<int>(d - c)), sums[n % 2]);
            store(out + c, sums[0] + sums[1]);
        }
    }
}

// Scores to exponentials, in place: of `count` keys, -inf from there to a whole vector.
inline void exponentials(float* p, int64_t count, float* max, float* sum) {
    vf32 top = set1(-__builtin_inff()), sums[2] = {};
    for (int64_t j = 0; j < count; j += kLanes) top = vmax(load(p + j), top);
    *max = hmax(top);
    const vf32 shift = set1(*max == -__builtin_inff() ? 0.0f : *max);
    for (int64_t j = 0; j < count; j += kLanes) {
        const vf32 e = exp(load(p + j) - shift);
        sums[j / kLanes % 2] += e;
        store(p + j, e);
    }
    *sum = hsum(sums[0] + sums[1]);
}

// Asks for the rows of kLanes keys. The processor itself looks ahead no further than the end of a page, 16 rows of 64
// float32.
constexpr int64_t kRowsAhead = 32;
template <class T>
RK_INLINE void ask_ahead(const KeyRows<T>& rows, int64_t from, int64_t end, int64_t d) {
    const int64_t last = min64(from + kLanes, end);
    for (int64_t n = from; n < last; ++n) {
        const char* row = reinterpret_cast<const char*>(rows.at(n));
        for (int64_t byte = 0; byte < d * int64_t(sizeof(T)); byte += 64)
            __builtin_prefetch(row + byte, 0, 2);
    }
}

// What a task leaves of a query, and where the sum over values begins in it: max, sum, ..., [width].
constexpr int64_t kPartHead = 16;

// Keys k.begin up to k.begin + kFewKeys for `queries` queries, scaled, `width` apart, of which query i sees the first
// seen[i]. parts: kPartHead + width for each query.
template <int kVectors, class T>
void few_queries_part(const KeyRows<T>& k, const KeyRows<T>& v, const float* q, int64_t queries,
                      const int64_t* seen, int64_t d, int64_t width, float* parts) {
    alignas(64) float p[kFewQueries * kFewKeys];
    int64_t most = 0;
    for (int64_t i = 0; i < queries; ++i) most = max64(most, seen[i]);
    for (int64_t j = 0; j < most; j += kLanes) {
        ask_ahead(k, j + kRowsAhead, most, d);
        ask_ahead(v, j, most, d);
        const T* row[kLanes];
#pragma GCC unroll 16
        for (int n = 0; n < kLanes; ++n) row[n] = k.at(min64(j + n, most - 1));
        for (int64_t i = 0; i < queries; ++i) {
            if (j >= seen[i]) continue;
            const vi32 hidden = lane_index() >= set1(static_cast<int32_t>(seen[i] - j));
            store(p + i * kFewKeys + j,
                  select(hidden, set1(-__builtin_inff()), few_scores<kVectors>(row, q + i * width, d)));
        }
    }
    for (int64_t i = 0; i < queries; ++i, parts += kPartHead + width) {
        exponentials(p + i * kFewKeys, seen[i], parts, parts + 1);
        add_values<kVectors>(v, p + i * kFewKeys, seen[i], d, parts + kPartHead);
    }
}

// All sequences of few queries. One that sees no key gets zeros.
template <class T>
class FewQueries {
  public:
    explicit FewQueries(const AttentionArgs& a) : a_(a), width_(round_up(a.head_dim, kLanes)) {
        int64_t keys = 0;
        for (int64_t b = 0; b < a.batch; ++b)
            if (has_few_queries(a, b)) keys += length(a.cu_seqlens_k, b);
        static thread_local Scratch memory;
        memory.reset(static_cast<size_t>(a.batch) * sizeof(VisibleKeys) +
                         static_cast<size_t>(a.batch + 1) * 16 +
                         (a.key_mask == nullptr ? 0 : static_cast<size_t>(keys) * 4),
                     4);
        visible_ = memory.take<VisibleKeys>(a.batch);
        first_task_ = memory.take<int64_t>(a.batch + 1);
        first_part_ = memory.take<int64_t>(a.batch + 1);
        int32_t* index = a.key_mask == nullptr ? nullptr : memory.take<int32_t>(keys);
        first_task_[0] = first_part_[0] = 0;
        for (int64_t b = 0; b < a.batch; ++b) {
            visible_[b] = {0, 0, nullptr};
            const int64_t queries = length(a.cu_seqlens_q, b), of_sequence = length(a.cu_seqlens_k, b);
            if (has_few_queries(a, b) && queries > 0) {
                const bool* mask = a.key_mask == nullptr ? nullptr : a.key_mask + a.cu_seqlens_k[b];
                visible_[b] = visible_keys(mask, of_sequence, index);
                if (index != nullptr) index += of_sequence;
            }
            const int64_t tasks = a.heads * blocks(b);
            first_task_[b + 1] = first_task_[b] + tasks;
            first_part_[b + 1] = first_part_[b] + tasks * queries;
            bytes_ += 2.0 * static_cast<double>(a.heads * visible_[b].count * a.head_dim) * sizeof(T);
        }
    }

    void run() {
        static thread_local Scratch memory;
        const int64_t tasks = first_task_[a_.batch], part = kPartHead + width_;
        float* parts = memory.words(max64(1, first_part_[a_.batch] * part));
        const int64_t threads = max64(1, min64(num_threads(), static_cast<int64_t>(bytes_ / kBytesOfThread)));
        parallel_tasks(tasks, threads, [&](int64_t task) {
            int64_t low = 0, high = a_.batch;  // the sequence whose tasks begin at or before this one
            while (high - low > 1) {
                const int64_t middle = (low + high) / 2;
                (first_task_[middle] <= task ? low : high) = middle;
            }
            const int64_t within = task - first_task_[low];
            compute(low, within / blocks(low), within % blocks(low),
                    parts + (first_part_[low] + within * length(a_.cu_seqlens_q, low)) * part);
        });
        for (int64_t b = 0; b < a_.batch; ++b)
            if (has_few_queries(a_, b))
                for (int64_t head = 0; head < a_.heads; ++head) put_together(b, head, parts);
    }

  private:
    static int64_t length(const int32_t* cu_seqlens, int64_t b) { return cu_seqlens[b + 1] - cu_seqlens[b]; }
    int64_t blocks(int64_t b) const { return ceil_div(visible_[b].count, kFewKeys); }

    void compute(int64_t b, int64_t head, int64_t block, float* parts) const {
        const int64_t queries = length(a_.cu_seqlens_q, b), d = a_.head_dim, begin = block * kFewKeys;
        alignas(64) float q[kFewQueries * kMostWidth];
        int64_t seen[kFewQueries];
        for (int64_t i = 0; i < queries; ++i) {
            const T* from = first_row(a_.q, a_.cu_seqlens_q, b, head) + i * a_.q.token_stride;
            for (int64_t c = 0; c < width_; c += kLanes)
                store(q + i * width_ + c, load_some(from + c, static_cast<int>(d - c)) * a_.scale);
            const int64_t last = i + length(a_.cu_seqlens_k, b) - queries;
            const int64_t all = a_.causal ? visible_[b].until(last) : visible_[b].count;
            seen[i] = max64(0, min64(kFewKeys, all - begin));
        }
        const KeyRows<T> k{first_row(a_.k, a_.cu_seqlens_k, b, head), a_.k.token_stride, visible_[b], begin};
        const KeyRows<T> v{first_row(a_.v, a_.cu_seqlens_k, b, head), a_.v.token_stride, visible_[b], begin};
        const auto run = [&](auto vectors) {
            few_queries_part<vectors()>(k, v, q, queries, seen, d, width_, parts);
        };
        if (d == 2 * kLanes)
            run(Vectors<2>{});
        else if (d == 4 * kLanes)
            run(Vectors<4>{});
        else if (d == 8 * kLanes)
            run(Vectors<8>{});
        else
            run(Vectors<0>{});
    }

    void put_together(int64_t b, int64_t head, const float* parts) const {
        const int64_t queries = length(a_.cu_seqlens_q, b), d = a_.head_dim, part = kPartHead + width_;
        const int64_t count = blocks(b), step = queries * part;
        const float* of_head = parts + (first_part_[b] + head * count * queries) * part;
        for (int64_t i = 0; i < queries; ++i) {
            const float* from = of_head + i * part;
            float max = -__builtin_inff(), sum = 0.0f;
            for (int64_t n = 0; n < count; ++n) max = from[n * step] > max ? from[n * step] : max;
            const float shift = max == -__builtin_inff() ? 0.0f : max;
            vf32 out[kMostWidth / kLanes] = {};
            for (int64_t n = 0; n < count; ++n, from += step) {
                const vf32 weight = exp(set1(from[0] - shift));
                sum += weight[0] * from[1];
                for (int64_t c = 0; c < width_ / kLanes; ++c)
                    out[c] = fma(weight, load(from + kPartHead + c * kLanes), out[c]);
            }
            const int64_t row = a_.cu_seqlens_q[b] + i;
            T* to = static_cast<T*>(a_.out) + (row * a_.heads + head) * d;
            const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
            for (int64_t c = 0; c < d; c += kLanes)
                store_some(to + c, out[c / kLanes] * factor, static_cast<int>(d - c));
            if (a_.lse != nullptr)
                a_.lse[head * a_.total_q + row] = sum == 0.0f ? -__builtin_inff() : max + __builtin_logf(sum);
        }
    }

    // Of a sequence.
    static const T* first_row(const HeadsView& view, const int32_t* cu_seqlens, int64_t b, int64_t head) {
        const int64_t at =
            view.sequence_stride < 0 ? cu_seqlens[b] * view.token_stride : b * view.sequence_stride;
        return static_cast<const T*>(view.data) + at + head * view.head_stride;
    }

    template <int kCount>
    struct Vectors {
        constexpr int operator()() const { return kCount; }
    };

    const AttentionArgs& a_;
    int64_t width_;
    double bytes_ = 0;
    VisibleKeys* visible_;
    int64_t *first_task_, *first_part_;  // [batch + 1]; a part is one of a query
};

}  // namespace rk::cpu::RK_CPU_ISA
