// out = dropout(layer_norm(word[id] + position[id] + token_type[id])): gather, sum and norm with the row in
// L1.
//
// Backward gathers again; the gradient of the sum, [T, H] float32, is then added up per table row. The
// binding has grouped the tokens by id, so each row of a dense table gradient is written exactly once, as a
// sum in token order or as zeros, by whichever thread takes its block: no atomics, no separate zero fill (154
// MB for a [50265, 768] table, and most of the time), the same bits for any number of threads. Blocks are 64
// table rows, of small tables also 128 columns, so that one token type for all tokens still is work for
// several threads.
#include "csrc/cpu/embedding_layer_norm.h"

#include "csrc/cpu/layer_norm.h"

namespace rk::cpu::RK_CPU_ISA {
namespace {

constexpr int64_t kBlockRows = 64;
constexpr int64_t kBlockColumns = 128;
constexpr int64_t kSmallTable = 2048;

// The sum of a token's three rows.
template <class T>
struct Sum {
    const T *word, *position, *token_type;

    Sum(const EmbeddingLayerNormArgs& a, int64_t token)
        : word(static_cast<const T*>(a.table[0]) + a.ids[0][token] * a.hidden),
          position(static_cast<const T*>(a.table[1]) + a.ids[1][token] * a.hidden),
          token_type(static_cast<const T*>(a.table[2]) + a.ids[2][token] * a.hidden) {}
    RK_INLINE vf32 operator()(int64_t c, int count) const {
        return load_some(word + c, count) + load_some(token_type + c, count) + load_some(position + c, count);
    }
};

// Asks for the next token's word row, which lies anywhere in the table, while this one is worked on.
template <class T>
RK_INLINE void prefetch_word(const EmbeddingLayerNormArgs& a, int64_t token) {
    if (token >= a.rows) return;
    const T* word = static_cast<const T*>(a.table[0]) + a.ids[0][token] * a.hidden;
    for (int64_t c = 0; c < a.hidden; c += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(word + c);
}

// Plain stores: on memory that is touched for the first time, as a fresh gradient is, memset's string
// instructions took half as long again. The empty asm keeps the compiler from making a memset of it.
template <class T>
void fill_zero(T* to, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        store(to + i, vf32{});
        __asm__ volatile("" ::: "memory");
    }
    for (; i < count; ++i) store1(to + i, 0.0f);
}

template <class T>
void forward(const EmbeddingLayerNormArgs& a) {
    parallel_for(0, a.rows, row_grain(a.hidden), [&](int64_t begin, int64_t end) {
        static thread_local Scratch memory;
        memory.reset(static_cast<size_t>(a.hidden) * 4, 1);
        float* sum = memory.take<float>(a.hidden);
        const T *weight = static_cast<const T*>(a.weight), *bias = static_cast<const T*>(a.bias);
        for (int64_t row = begin; row < end; ++row) {
            const Sum<T> gather(a, row);
            prefetch_word<T>(a, row + 1);
            const float total = sum_vectors(a.hidden, [&](int64_t c, int count) {
                const vf32 y = gather(c, count);
                store_some(sum + c, y, count);
                return y;
            });
            const RowStatistics s = row_statistics(sum, a.hidden, total, a.eps);
            T* out = static_cast<T*>(a.out) + row * a.hidden;
            if (a.dropout.on)
                for_vectors_dropout(
                    a.hidden, a.dropout, row, [&](int64_t c, int count, vf32 multiplier, int) {
                        store_some(out + c, normalised(sum, s, weight, bias, c, count) * multiplier, count);
                    });
            else
                for_vectors(a.hidden, [&](int64_t c, int count) {
                    store_some(out + c, normalised(sum, s, weight, bias, c, count), count);
                });
            a.mean[row] = s.mean;
            a.rstd[row] = s.rstd;
        }
    });
}

// to = the sum over tokens of grad_sum[token][columns], in the given order, in runs of 64 tokens whose sums
// are added.
template <class T>
void sum_tokens(const EmbeddingLayerNormArgs& a, const int32_t* tokens, int64_t count, int64_t column,
                int64_t columns, T* to) {
    constexpr int64_t kRun = 64;
    for (int64_t c = 0; c < columns; c += 4 * kLanes) {
        vf32 total[4] = {};
        int counts[4];
        for (int i = 0; i < 4; ++i) {
            const int64_t left = columns - c - i * kLanes;
            counts[i] = left <= 0 ? 0 : left < kLanes ? static_cast<int>(left) : kLanes;
        }
        for (int64_t t0 = 0; t0 < count; t0 += kRun) {
            vf32 sum[4] = {};
            for (int64_t t = t0; t < count && t < t0 + kRun; ++t) {
                const float* p = a.grad_sum + tokens[t] * a.hidden + column + c;
                if (counts[3] == kLanes) {
#pragma GCC unroll 4
                    for (int i = 0; i < 4; ++i) sum[i] += load(p + i * kLanes);
                } else {
                    for (int i = 0; i < 4; ++i)
                        if (counts[i] > 0) sum[i] += load_some(p + i * kLanes, counts[i]);
                }
            }
            for (int i = 0; i < 4; ++i) total[i] += sum[i];
        }
        for (int i = 0; i < 4; ++i)
            if (counts[i] > 0) store_some(to + c + i * kLanes, total[i], counts[i]);
    }
}

template <class T>
void table_block(const EmbeddingLayerNormArgs& a, int t, int64_t first, int64_t end, int64_t column,
                 int64_t columns) {
    int64_t group = 0;  // the first whose id is at least `first`
    for (int64_t high = a.unique_count[t]; group < high;) {
        const int64_t middle = (group + high) / 2;
        if (a.unique[t][middle] < first)
            group = middle + 1;
        else
            high = middle;
    }
    T* const table = static_cast<T*>(a.grad_table[t]);
    for (int64_t row = first; row < end;) {
        const bool more = group < a.unique_count[t] && a.unique[t][group] < end;
        const int64_t next = more ? a.unique[t][group] : end;
        if (columns == a.hidden)
            fill_zero(table + row * a.hidden, (next - row) * a.hidden);
        else
            for (; row < next; ++row) fill_zero(table + row * a.hidden + column, columns);
        row = next;
        if (!more) break;
        T* to = table + row * a.hidden + column;
        if (row == a.padding_idx[t])
            fill_zero(to, columns);
        else
            sum_tokens(a, a.order[t] + a.start[t][group], a.start[t][group + 1] - a.start[t][group], column,
                       columns, to);
        ++group;
        ++row;
    }
}

template <class T>
void backward(const EmbeddingLayerNormArgs& a) {
    const RowChunks chunks(a.rows);
    static thread_local Scratch shared;
    shared.reset(static_cast<size_t>(chunks.count * 2 * a.hidden) * 4, 1);
    float* const partial = shared.take<float>(chunks.count * 2 * a.hidden);
    parallel_for(
        0, chunks.count, 1 + row_grain(a.hidden) / chunks.chunk_rows, [&](int64_t begin, int64_t end) {
            static thread_local Scratch memory;
            memory.reset(static_cast<size_t>(3 * a.hidden) * 4, 3);
            float *unit = memory.take<float>(a.hidden), *g = memory.take<float>(a.hidden),
                  *undropped = memory.take<float>(a.hidden);
            const T* weight = static_cast<const T*>(a.weight);
            for (int64_t chunk = begin; chunk < end; ++chunk) {
                float *grad_weight = partial + chunk * 2 * a.hidden, *grad_bias = grad_weight + a.hidden;
                for (int64_t c = 0; c < 2 * a.hidden; ++c) grad_weight[c] = 0.0f;
                for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
                    const RowStatistics s{a.mean[row], a.rstd[row]};
                    prefetch_word<T>(a, row + 1);
                    const T* grad_out = static_cast<const T*>(a.grad_out) + row * a.hidden;
                    float* grad_sum = a.grad_sum + row * a.hidden;
                    const auto sink = [&](int64_t c, int count, vf32 value) {
                        store_some(grad_sum + c, value, count);
                    };
                    if (a.dropout.on) {
                        for_vectors_dropout(
                            a.hidden, a.dropout, row, [&](int64_t c, int count, vf32 multiplier, int) {
                                store_some(undropped + c, load_some(grad_out + c, count) * multiplier, count);
                            });
                        layer_norm_row_backward(
                            a.hidden, s, weight, Sum<T>(a, row),
                            [&](int64_t c, int count) { return load_some(undropped + c, count); }, unit, g,
                            grad_weight, grad_bias, sink);
                    } else {
                        layer_norm_row_backward(
                            a.hidden, s, weight, Sum<T>(a, row),
                            [&](int64_t c, int count) { return load_some(grad_out + c, count); }, unit, g,
                            grad_weight, grad_bias, sink);
                    }
                }
            }
        });
    void* const to[2] = {a.grad_weight, a.grad_bias};
    reduce_chunks<T>(partial, chunks.count, 2, a.hidden, to);

    int64_t column_blocks[kTables], first_task[kTables + 1] = {0};
    for (int t = 0; t < kTables; ++t) {
        const int64_t row_blocks = ceil_div(a.table_rows[t], kBlockRows);
        column_blocks[t] = a.table_rows[t] < kSmallTable ? ceil_div(a.hidden, kBlockColumns) : 1;
        first_task[t + 1] = first_task[t] + row_blocks * column_blocks[t];
    }
    const int64_t work = (a.table_rows[0] + a.table_rows[1] + a.table_rows[2] + 3 * a.rows) * a.hidden;
    const int64_t threads = work < 1 << 17 ? 1 : num_threads();
    parallel_tasks(first_task[kTables], threads, [&](int64_t task) {
        int t = 0;
        while (task >= first_task[t + 1]) ++t;
        const int64_t within = task - first_task[t];
        const int64_t first = within / column_blocks[t] * kBlockRows;
        const int64_t end = min64(first + kBlockRows, a.table_rows[t]);
        const int64_t column = within % column_blocks[t] * kBlockColumns;
        table_block<T>(a, t, first, end, column,
                       column_blocks[t] == 1 ? a.hidden : min64(a.hidden - column, kBlockColumns));
    });
}

}  // namespace

void embedding_layer_norm_forward(const EmbeddingLayerNormArgs& a) {
    a.bf16 ? forward<bf16>(a) : forward<float>(a);
}

void embedding_layer_norm_backward(const EmbeddingLayerNormArgs& a) {
    a.bf16 ? backward<bf16>(a) : backward<float>(a);
}

}  // namespace rk::cpu::RK_CPU_ISA
