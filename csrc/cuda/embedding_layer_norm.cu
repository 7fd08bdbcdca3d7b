// out = dropout(layer_norm(word[id] + token_type[id] + position[id])): gather, sum, norm and dropout of a row
// in registers. The rows' layout, and what forward and backward do with them, is in layer_norm.cuh.
//
// Backward takes three steps, none of which adds floats by atomics:
//
// 1. keys_kernel writes each token's id, for each table, as a row of the tables laid end to end; torch sorts
//    all of them at once, stably. What gets no gradient (padding) is sorted behind the last row. A token-type
//    table of one row is left out: its gradient is a column sum.
// 2. The rows are gathered again; their gradients go to memory as float32 (grad_sum), the column sums as in
//    add_layer_norm.
// 3. sum_runs_kernel adds the gradients of equal keys, in token order: a warp has 32 neighbours of the sorted
//    keys, so every warp has the same work, however often an id occurs. A run that crosses such a border
//    leaves pieces, which join_pieces_kernel adds, in a fixed order. Rows that no token names keep the zeros that
//    they were allocated with.
//
// Bytes, for T tokens, H columns of E bytes, V rows in all tables, K tables that are sorted for (2 or 3); the
// floor at the rate of a copy, where no word occurs twice (repeated rows, positions and types come from L2):
//
//     forward     2 T H E + 32 T       words, out; three ids, mean and rstd
//     backward    2 T H E + 32 T       words, grad_out
//                 4 T H (1 + K)        grad_sum, written once and read for each table
//                 V H E                the dense gradients, zeros included: 77 MB for 50265 words of 768
//                                      in bfloat16, more than all the rest up to 6000 tokens
//                 K T (3 b + 8)        keys of b = 2 or 4 bytes, the sort's own passes apart
//
// About 10 flops an element forward, 20 + K backward.
#include "csrc/cuda/embedding_layer_norm.h"
#include "csrc/cuda/layer_norm.cuh"

namespace rk::cuda {
namespace {

template <int N>
__device__ inline void store_floats(float* to, const float (&from)[N]) {
    if constexpr (N % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 4)
            *reinterpret_cast<float4*>(to + i) = make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]);
    } else {
        store(to, from);
    }
}

template <typename T, bool kDropout_>
struct Embedding {
    using Element = T;
    static constexpr bool kDropout = kDropout_;
    const int64_t* ids[kTables];
    const T* table[kTables];
    int64_t table_rows[kTables];
    float* grad_sum;
    int64_t columns;
    Dropout dropout;

    explicit Embedding(const EmbeddingLayerNormArgs& a)
        : grad_sum(a.grad_sum), columns(a.hidden), dropout(a.dropout) {
        for (int t = 0; t < kTables; ++t) {
            ids[t] = a.ids[t];
            table[t] = static_cast<const T*>(a.table[t]);
            table_rows[t] = a.table_rows[t];
        }
    }

    struct Row {
        int32_t id[kTables];  // rows of the tables; negative: an id is outside of its table
        __device__ bool inside() const { return (id[0] | id[1] | id[2]) >= 0; }
    };
    template <int N>
    struct Loaded {
        Packed<T, N> values[kTables];
    };

    __device__ Row row(int64_t token) const {
        Row row;
#pragma unroll
        for (int t = 0; t < kTables; ++t) {
            const int64_t id = ids[t][token];
            row.id[t] = id >= 0 && id < table_rows[t] ? static_cast<int32_t>(id) : -1;
        }
        return row;
    }

    static constexpr int kRows = kTables;
    __device__ const T* source(const Row& at, int t) const {
        return at.inside() ? table[t] + at.id[t] * columns : nullptr;
    }

    template <int N>
    __device__ Loaded<N> load(const Row& at, int64_t column) const {
        Loaded<N> loaded = {};
        if (at.inside())
#pragma unroll
            for (int t = 0; t < kTables; ++t) loaded.values[t] = load_packed<N>(source(at, t) + column);
        return loaded;
    }
    template <int N>
    __device__ Loaded<N> loaded(const Packed<T, N> (&rows)[kRows], int64_t) const {
        return {{rows[0], rows[1], rows[2]}};
    }

    // Nothing is read for an id outside of its table; the row is nan, and so are the gradients that it is
    // part of.
    template <int N>
    __device__ void sum(float (&z)[N], const Row& at, const Loaded<N>& loaded, uint32_t) const {
        float position[N], token_type[N];
        unpack<T>(z, loaded.values[0]);
        unpack<T>(position, loaded.values[1]);
        unpack<T>(token_type, loaded.values[2]);
        const bool inside = at.inside();
#pragma unroll
        for (int i = 0; i < N; ++i)
            z[i] = inside ? z[i] + token_type[i] + position[i] : __uint_as_float(0x7fffffffu);
    }

    template <int N>
    __device__ void drop_normalised(float (&x)[N], uint32_t kept) const {
        if constexpr (kDropout) drop(x, kept, dropout.scale);
    }

    // The third column sum is that of the gradients: the gradient of a token-type table of one row.
    template <int N>
    __device__ void store_gradient(int64_t token, int64_t column, float (&z)[N], uint32_t) const {
        store_floats(grad_sum + token * columns + column, z);
    }
};

// ------------------------------------------------------------------------------------------- table gradients

struct Keys {
    const int64_t* ids[kTables];
    int64_t
        first_row[kTables + 1];  // of each table, when they are laid end to end; then: how many rows in all
    int64_t padding_idx[kTables];
    int64_t tokens, entries;
    void* keys;
    bool narrow;

    explicit Keys(const EmbeddingLayerNormArgs& a)
        : first_row{0},
          tokens(a.rows),
          entries(sorted_tables(a) * a.rows),
          keys(a.keys),
          narrow(embedding_layer_norm_narrow_keys(a)) {
        for (int t = 0; t < kTables; ++t) {
            ids[t] = a.ids[t];
            padding_idx[t] = a.padding_idx[t];
            first_row[t + 1] = first_row[t] + a.table_rows[t];
        }
    }
};

// What gets no gradient (padding, ids outside of their table) is given a key behind all rows.
__global__ void __launch_bounds__(256) keys_kernel(Keys k) {
    for (int64_t entry = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; entry < k.entries;
         entry += gridDim.x * static_cast<int64_t>(blockDim.x)) {
        int64_t key = k.first_row[kTables];
#pragma unroll
        for (int t = 0; t < kTables; ++t) {
            const int64_t token = entry - t * k.tokens;
            if (token < 0 || token >= k.tokens) continue;
            const int64_t id = k.ids[t][token];
            if (id >= 0 && id < k.first_row[t + 1] - k.first_row[t] && id != k.padding_idx[t])
                key = k.first_row[t] + id;
        }
        if (k.narrow)
            static_cast<int16_t*>(k.keys)[entry] = static_cast<int16_t>(key + INT16_MIN);
        else
            static_cast<int32_t*>(k.keys)[entry] = static_cast<int32_t>(key);
    }
}

// Keys of 16 bits are counted from -32768, as their sort has signs.
__device__ inline int32_t key_at(const void* keys, bool narrow, int64_t entry) {
    return narrow ? static_cast<const int16_t*>(keys)[entry] - INT16_MIN
                  : static_cast<const int32_t*>(keys)[entry];
}

template <typename T>
struct TableGradients {
    const void* keys;       // [entries], sorted
    bool narrow;            // they have 16 bits, else 32
    const int64_t* order;   // [entries]
    const float* grad_sum;  // [tokens, columns]
    float* pieces;          // [ceil(entries / kRun), 2, columns]
    T* grad_table[kTables];
    int32_t first_row[kTables + 1];
    int64_t tokens, entries, columns;

    explicit TableGradients(const EmbeddingLayerNormArgs& a)
        : keys(a.sorted_keys),
          narrow(embedding_layer_norm_narrow_keys(a)),
          order(a.order),
          grad_sum(a.grad_sum),
          pieces(a.pieces),
          first_row{0},
          tokens(a.rows),
          entries(sorted_tables(a) * a.rows),
          columns(a.hidden) {
        for (int t = 0; t < kTables; ++t) {
            grad_table[t] = static_cast<T*>(a.grad_table[t]);
            first_row[t + 1] = static_cast<int32_t>(first_row[t] + a.table_rows[t]);
        }
    }

    __device__ int32_t no_row() const { return first_row[kTables]; }
    __device__ int table_of(int32_t key) const { return (key >= first_row[1]) + (key >= first_row[2]); }
    __device__ T* row_of(int32_t key) const {
        const int t = table_of(key);
        T* const table = t == 0 ? grad_table[0] : t == 1 ? grad_table[1] : grad_table[2];
        return table + (key - (t == 0 ? 0 : t == 1 ? first_row[1] : first_row[2])) * columns;
    }
    __device__ int32_t key(int64_t entry) const { return key_at(keys, narrow, entry); }
    // By a warp: if a run starts in the group and goes beyond it, in how many groups it goes on, else 0. Keys are
    // sorted: each step asks for 32 of them, and leaves a 33rd of the groups.
    __device__ int64_t groups_after(int64_t group, int lane) const {
        const int64_t first = group * kRun;
        if (first + kRun >= entries) return 0;
        const int32_t here = key(first + kRun - 1);
        if (here == no_row() || key(first + kRun) != here) return 0;              // nothing goes beyond
        if (key(first) == here && first > 0 && key(first - 1) == here) return 0;  // it started before
        int64_t last = group + 1,
                end = (entries + kRun - 1) / kRun;  // it goes on in `last`, and not in `end`
        while (end - last > 1) {
            const int64_t step = (end - last + kWarp) / (kWarp + 1), probe = last + (lane + 1) * step;
            const unsigned on = __ballot_sync(kAllLanes, probe < end && key(probe * kRun) == here);
            const int64_t met = last + __popc(on) * step;
            end = min(end, met + step);
            last = met;
        }
        return last - group;
    }
    __device__ float* piece(int64_t group, bool starts_here) const {
        return pieces + (group * 2 + starts_here) * columns;
    }
};

constexpr int kAtOnce = 8;      // rows of float32 that a warp asks for before it adds them
constexpr int kGroupWarps = 4;  // of a block

// A warp has kRun neighbours among the sorted entries, and 32 * N columns of their gradients. It adds up each
// run of equal keys, in order. A run that lies within the kRun is a table row's gradient; one that goes
// beyond them is left as a piece: pieces[group][1] where it starts here, pieces[group][0] where it comes from
// before.
template <typename T, int N>
__global__ void __launch_bounds__(kGroupWarps* kWarp) sum_runs_kernel(TableGradients<T> a) {
    const int lane = threadIdx.x % kWarp;
    const int64_t group = blockIdx.x * static_cast<int64_t>(kGroupWarps) + threadIdx.x / kWarp;
    const int64_t first = group * kRun, column = (blockIdx.y * static_cast<int64_t>(kWarp) + lane) * N;
    if (first >= a.entries) return;
    const bool real = first + lane < a.entries;
    const int32_t my_key = real ? a.key(first + lane) : a.no_row();
    const int64_t my_token = real ? a.order[first + lane] - a.table_of(my_key) * a.tokens : 0;
    const int32_t before = first > 0 ? a.key(first - 1) : -1;
    const int32_t after = first + kRun < a.entries ? a.key(first + kRun) : -1;
    const int count = __popc(__ballot_sync(kAllLanes, my_key < a.no_row()));  // the others come last
    const bool inside = column < a.columns;
    bool starts_here = __shfl_sync(kAllLanes, my_key, 0) != before;
    float total[N] = {};
    for (int i = 0; i < count; i += kAtOnce) {
        float rows[kAtOnce][N] = {};
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            const int64_t token = __shfl_sync(kAllLanes, my_token, i + j);
            if (i + j < count && inside) load(rows[j], a.grad_sum + token * a.columns + column);
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            const int32_t key = __shfl_sync(kAllLanes, my_key, i + j);
            const int32_t shuffled = __shfl_sync(kAllLanes, my_key, (i + j + 1) % kRun);
            if (i + j >= count) continue;
            const int32_t next = i + j + 1 < kRun ? shuffled : after;
#pragma unroll
            for (int c = 0; c < N; ++c) total[c] += rows[j][c];
            const bool ends_here = next != key;
            if (!ends_here && i + j + 1 < kRun) continue;
            if (inside) {
                if (starts_here && ends_here)
                    store(a.row_of(key) + column, total);
                else
                    store(a.piece(group, starts_here) + column, total);
            }
            starts_here = true;
#pragma unroll
            for (int c = 0; c < N; ++c) total[c] = 0.0f;
        }
    }
}

constexpr int kJoinWarps = 16;  // of a block

// A block has as many groups as warps. Each warp finds out whether a run starts in its group that goes beyond it,
// and in how many groups it goes on; then all warps add the pieces of one such run after the other, each a
// stretch of them in order, and the first warp the stretches: so that a row which every token names, of a small
// table, does not wait for one warp. Which stretches there are depends on the run's length alone.
template <typename T, int N>
__global__ void __launch_bounds__(kJoinWarps* kWarp) join_pieces_kernel(TableGradients<T> a) {
    __shared__ int64_t lengths[kJoinWarps];
    __shared__ float stretches[kJoinWarps][kWarp * N];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int64_t column = (blockIdx.y * static_cast<int64_t>(kWarp) + lane) * N;
    const int64_t first_group = blockIdx.x * static_cast<int64_t>(kJoinWarps);
    const int64_t length = a.groups_after(first_group + warp, lane);
    if (lane == 0) lengths[warp] = length;
    __syncthreads();
    const bool inside = column < a.columns;
    for (int starts = 0; starts < kJoinWarps; ++starts) {
        const int64_t count = lengths[starts], group = first_group + starts;
        if (count == 0) continue;
        float total[N] = {};
        if (warp == 0 && inside) load(total, a.piece(group, true) + column);
        const int64_t from = count * warp / kJoinWarps, to = count * (warp + 1) / kJoinWarps;
        for (int64_t i = from; i < to; i += kAtOnce) {
            float pieces[kAtOnce][N] = {};
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j)
                if (i + j < to && inside) load(pieces[j], a.piece(group + 1 + i + j, false) + column);
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
                for (int c = 0; c < N; ++c) total[c] += pieces[j][c];
        }
#pragma unroll
        for (int c = 0; c < N; ++c) stretches[warp][c * kWarp + lane] = total[c];
        __syncthreads();
        if (warp == 0) {
            for (int other = 1; other < kJoinWarps; ++other)
#pragma unroll
                for (int c = 0; c < N; ++c) total[c] += stretches[other][c * kWarp + lane];
            if (inside) store(a.row_of(a.key(group * kRun + kRun - 1)) + column, total);
        }
        __syncthreads();
    }
}

int64_t groups_of(const EmbeddingLayerNormArgs& a) {
    return ceil_div(sorted_tables(a) * a.rows, kRun);
}

template <typename T, int N>
void table_gradients(const EmbeddingLayerNormArgs& a) {
    const Launch how{dim3(static_cast<unsigned>(ceil_div(groups_of(a), kGroupWarps)),
                          static_cast<unsigned>(ceil_div(a.hidden, kWarp * N))),
                     dim3(kGroupWarps * kWarp), 0, a.stream};
    const TableGradients<T> gradients(a);
    launch(sum_runs_kernel<T, N>, how, gradients);
    const Launch join{dim3(static_cast<unsigned>(ceil_div(groups_of(a), kJoinWarps)), how.grid.y),
                      dim3(kJoinWarps * kWarp), 0, a.stream};
    if (groups_of(a) > 1) launch(join_pieces_kernel<T, N>, join, gradients);
}

// ------------------------------------------------------------------------------------------------ launching

template <typename T>
void forward(const EmbeddingLayerNormArgs& a) {
    const LayerNormForward<T> rows{{static_cast<const T*>(a.weight), a.mean, a.rstd, a.rows, a.hidden},
                                   static_cast<const T*>(a.bias),
                                   static_cast<T*>(a.out),
                                   a.eps};
    if (a.dropout.seed != nullptr)
        layer_norm_forward(Embedding<T, true>(a), rows, a.stream);
    else
        layer_norm_forward(Embedding<T, false>(a), rows, a.stream);
}

template <typename T>
void backward(const EmbeddingLayerNormArgs& a) {
    const LayerNormBackward<T> rows{{static_cast<const T*>(a.weight), a.mean, a.rstd, a.rows, a.hidden},
                                    static_cast<const T*>(a.grad_out),
                                    a.partials};
    if (a.dropout.seed != nullptr)
        layer_norm_backward(Embedding<T, true>(a), rows, a.stream);
    else
        layer_norm_backward(Embedding<T, false>(a), rows, a.stream);
    void* const one_type = sorted_tables(a) == kTables ? nullptr : a.grad_table[2];
    const int64_t blocks = partial_rows<T>(a.rows, a.hidden, a.dropout);
    add_partials({a.partials, blocks, a.hidden, a.hidden}, {a.grad_weight, a.grad_bias, one_type}, a.dtype,
                 a.stream);
    if (a.hidden % 4 == 0)
        table_gradients<T, 4>(a);
    else
        table_gradients<T, 1>(a);
}

}  // namespace

int64_t embedding_layer_norm_partials(const EmbeddingLayerNormArgs& a) {
    int64_t floats = 0;
    RK_FOR_DTYPE(a.dtype, T, floats = kColumnSums * partial_rows<T>(a.rows, a.hidden, a.dropout) * a.hidden);
    return floats;
}

int64_t embedding_layer_norm_pieces(const EmbeddingLayerNormArgs& a) {
    return groups_of(a) * 2 * a.hidden;
}

void embedding_layer_norm_forward(const EmbeddingLayerNormArgs& a) {
    RK_FOR_DTYPE(a.dtype, T, forward<T>(a));
}

void embedding_layer_norm_keys(const EmbeddingLayerNormArgs& a) {
    const Keys keys(a);
    const int64_t blocks = ceil_div(keys.entries, 256);
    launch(keys_kernel,
           {dim3(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks)), dim3(256), 0, a.stream},
           keys);
}

void embedding_layer_norm_backward(const EmbeddingLayerNormArgs& a) {
    RK_FOR_DTYPE(a.dtype, T, backward<T>(a));
}

}  // namespace rk::cuda
