// Attention forward on tiles (amx.h), for one head of a sequence at a time; attention.cpp says what is computed and hands
// the work out. Numbers are cut into bfloat16 parts, and products of parts taken and summed, as in tile_products.h.
//
// Scores are kept transposed, [key][query], as in attention.cpp, for one reason more: P^T with two neighbouring keys in a
// word is the right operand of O^T = V^T P^T as it comes from the softmax, with no transposition.
//
//   K         once for all queries of a task: strips of 32 keys [part][step of 32 along d][2 tiles][16 keys][32]
//   V^T       likewise: strips of 32 columns [part][step of 32 keys][2 tiles][16 columns][16 pairs of keys]
//   Q^T       a block of 48 queries: panels of 32 and 16, [part][step][2 tiles][16 pairs along d][16 queries][2]
//   S^T       the block x up to 256 keys, float32 (and at once its maximum): K Q^T; scaled when they come to the softmax
//   P^T       16 queries x these keys, parts, tile by tile: each tile's exponentials are computed in vectors while the
//             tiles before it are multiplied
//   O^T       16 queries x 64 columns, four tiles of sums, over these keys; small products first, then the large one;
//             added in vectors to what earlier keys gave, times its decay
//
// Keys hidden by key_mask are left out; those that are not there have P = 0. So a row's bits depend on its query and the
// keys that it sees, not on padding. Below kFewestKeys attention.cpp's own way is faster; which one serves depends on the
// number of keys of the sequence that may be seen, and on nothing else but what follows.
//
// Special numbers: where a float32 operand has an infinity or NaN, or a score is a NaN, the block is computed in
// attention.cpp's way, in float32 (a part that is zero would make NaNs of infinities). With bfloat16 nothing needs that.
//
// The roof, of bfloat16 at d = 64: 4 tile products of 16 cycles for 16 x 32 scores, and 32 vectors of the softmax of
// some 11 cycles each: the vectors bound it. With six products of parts (384 cycles) the tiles do.
#pragma once
#include "csrc/cpu/attention.h"
#include "csrc/cpu/tile_blocks.h"

namespace rk::cpu::RK_CPU_ISA {

constexpr int kTileQueries = 48;                    // of a block
constexpr int64_t kTileKeys = 256;                  // that are met at once
constexpr int64_t kStripFloats = 2 * kBlockFloats;  // S^T of 32 keys

template <class T, int kParts>
class TileAttention {
  public:
    static constexpr int64_t kBlocksOfTask = 4;  // K and V^T are made once for them
    static constexpr int64_t kFewestKeys =
        sizeof(T) == 2 ? 32 : 64;  // fewer are faster in attention.cpp's way

    // longest: keys of a sequence. Memory is the calling thread's.
    TileAttention(const AttentionArgs& args, int64_t longest)
        : a_(args),
          steps_(ceil_div(args.head_dim, kStepElements)),
          strip_bytes_(steps_ * kParts * kPairBytes) {
        const int64_t strips = ceil_div(longest, kGroup32), tiles = strips * strip_bytes_;
        const int64_t rows = args.key_mask == nullptr ? 0 : longest * args.head_dim;
        Scratch& memory = thread_scratch(Use::column_block);
        memory.reset(size_t(2 * tiles + 2 * strip_bytes_ + kTileKeys / kGroup32 * kStripFloats * 4 +
                            kTileKeys / kGroup32 * kParts * kTileBytes + steps_ * kBlockFloats * 6 +
                            longest * 4 + 2 * rows * int64_t(sizeof(T))),
                     9);
        k_ = memory.take<char>(tiles), v_ = memory.take<char>(tiles),
        q_ = memory.take<char>(2 * strip_bytes_);
        scores_ = memory.take<float>(kTileKeys / kGroup32 * kStripFloats);
        p_ = memory.take<char>(kTileKeys / kGroup32 * kParts * kTileBytes);
        out_ = memory.take<float>(steps_ * 3 * kTileFloats * 2);
        index_ = memory.take<int32_t>(longest);
        rows_[0] = memory.take<T>(rows), rows_[1] = memory.take<T>(rows);
    }

    // Makes the tiles of K and V^T. False: this (sequence, head) is not for tiles.
    bool bring(int64_t sequence, int64_t head) {
        sequence_ = sequence, head_ = head;
        begin_k_ = a_.cu_seqlens_k[sequence], length_k_ = a_.cu_seqlens_k[sequence + 1] - begin_k_;
        count_ = 0;
        for (int64_t j = 0; j < length_k_; ++j)
            if (a_.key_mask == nullptr || a_.key_mask[begin_k_ + j]) index_[count_++] = int32_t(j);
        if (count_ < kFewestKeys || !(a_.scale > 0.0f)) return false;
        const Rows k = kept_rows(a_.k, rows_[0]), v = kept_rows(a_.v, rows_[1]);
        const bool finite = pack_keys(k, v);
        return pack_values(v) && finite;
    }

    // The block that starts at a query. False: nothing was written, it is not for tiles.
    bool block(int64_t first_query) {
        const int64_t begin = a_.cu_seqlens_q[sequence_], length = a_.cu_seqlens_q[sequence_ + 1] - begin;
        first_row_ = begin + first_query, queries_ = int(min64(length - first_query, kTileQueries));
        T* const out = static_cast<T*>(a_.out) + (first_row_ * a_.heads + head_) * a_.head_dim;
        for (int i = 0; i < queries_; ++i) ask(out + i * a_.heads * a_.head_dim);
        if (!pack_queries()) return false;
        last_ = first_query + length_k_ - length;
        int64_t visible = count_;
        if (a_.causal)
            while (visible > 0 && index_[visible - 1] > last_ + queries_ - 1) --visible;
        const int groups = int(ceil_div(queries_, kTileSide));
        for (int i = 0; i < groups * kTileSide; ++i) max_[i] = -__builtin_inff(), sum_[i] = 0.0f;
        for (int64_t key = 0; key < visible; key += kTileKeys) {
            const int64_t keys = min64(kTileKeys, visible - key);
            score(key, keys);
            for (int group = 0; group < groups; ++group) attend(group, key, keys);
        }
        if constexpr (sizeof(T) == 4)
            for (int i = 0; i < queries_; ++i)
                if (sum_[i] != sum_[i]) return false;
        for (int group = 0; group < groups; ++group) finish(group, visible > 0);
        return true;
    }

  private:
    struct Rows {
        const T* data;
        int64_t stride;
    };
    // Of the keys that may be seen, one after the other.
    Rows kept_rows(const HeadsView& view, T* room) const {
        const T* const from =
            static_cast<const T*>(view.data) + begin_k_ * view.token_stride + head_ * view.head_stride;
        if (count_ == length_k_) return {from, view.token_stride};
        for (int64_t j = 0; j < count_; ++j)
            __builtin_memcpy(room + j * a_.head_dim, from + index_[j] * view.token_stride,
                             size_t(a_.head_dim) * sizeof(T));
        return {room, a_.head_dim};
    }

    // Asks the memory for rows of keys that will be read.
    void ask(const Rows& rows, int64_t first, int64_t count) const {
        for (int64_t r = first; r < min64(first + count, count_); ++r) ask(rows.data + r * rows.stride);
    }
    void ask(const T* row) const {
        for (int64_t i = 0; i < a_.head_dim; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + i);
    }

    // Some rows (up to 16) of one step of 32 elements, parts part_bytes apart.
    template <class E>
    static vu32 split_rows(const E* from, int64_t stride, int rows, int64_t left, char* to,
                           int64_t part_bytes) {
        vu32 largest{};
        for (int r = 0; r < rows; ++r)
            largest = larger(largest,
                             split_step<kParts>(from + r * stride, left, to + r * kTileRowBytes, part_bytes));
        if (has_special(largest))
            for (int r = 0; r < rows; ++r)
                if (split_special_step<kParts>(from + r * stride, left, to + r * kTileRowBytes, part_bytes))
                    return set1(~uint32_t{0});
        return vu32{};
    }

    // False: there is an infinity or NaN (not told of bfloat16).
    bool pack_keys(const Rows& k, const Rows& v) {
        vu32 found{};
        ask(k, 0, 2 * kTileSide);
        for (int64_t key = 0; key < count_; key += kTileSide) {
            const int rows = int(min64(kTileSide, count_ - key));
            ask(k, key + 2 * kTileSide, kTileSide), ask(v, key, kTileSide);
            for (int64_t step = 0; step < steps_; ++step) {
                char* const to = k_ + key / kGroup32 * strip_bytes_ + step * kPairBytes +
                                 key % kGroup32 / kTileSide * kTileBytes;
                if (rows < kTileSide)
                    for (int part = 0; part < kParts; ++part)
                        __builtin_memset(to + part * steps_ * kPairBytes, 0, kTileBytes);
                found |= split_rows(k.data + key * k.stride + step * kStepElements, k.stride, rows,
                                    a_.head_dim - step * kStepElements, to, steps_ * kPairBytes);
            }
        }
        return !any((vi32)found);
    }
    bool pack_values(const Rows& v) {
        const int64_t strip_bytes = key_steps() * kParts * kPairBytes, part_bytes = key_steps() * kPairBytes;
        if constexpr (sizeof(T) == 2) {  // pairs are turned as words
            for (int64_t column = 0; column < a_.head_dim; column += kGroup32)
                pack_strip_across<1>(v.data + column, int(min64(kGroup32, a_.head_dim - column)), v.stride,
                                     count_, key_steps(), v_ + column / kGroup32 * strip_bytes, nullptr);
            return true;
        }
        vu32 found{};
        for (int64_t column = 0; column < steps_ * kGroup32; column += kTileSide) {
            const T* const from = v.data + column;
            const int64_t left = a_.head_dim - column;
            char* to = v_ + column / kGroup32 * strip_bytes + column % kGroup32 / kTileSide * kTileBytes;
            for (int64_t key = 0; key < count_; key += kGroup32, to += kPairBytes) {
                alignas(64) float turned[kTileSide * kGroup32];
                for (int half = 0; half < kGroup32; half += kTileSide)
                    turn(from + (key + half) * v.stride, v.stride, count_ - key - half, left, turned + half,
                         kGroup32);
                found |= split_rows(turned, kGroup32, kTileSide, kGroup32, to, part_bytes);
            }
        }
        return !any((vi32)found);
    }
    bool pack_queries() {
        const T* const from =
            static_cast<const T*>(a_.q.data) + first_row_ * a_.q.token_stride + head_ * a_.q.head_stride;
        bool finite = true;
        for (int query = 0; query < queries_; query += kTileSide)
            for (int64_t step = 0; step < steps_; ++step) {
                char* const to = q_ + query / kGroup32 * strip_bytes_ + step * kPairBytes +
                                 query % kGroup32 / kTileSide * kTileBytes;
                if constexpr (sizeof(T) == 2) {
                    alignas(64) char rows[kTileBytes] = {};
                    split_rows(from + query * a_.q.token_stride + step * kStepElements, a_.q.token_stride,
                               int(min64(kTileSide, queries_ - query)), a_.head_dim - step * kStepElements,
                               rows, 0);
                    transpose_tile(rows, to);
                    continue;
                }
                alignas(64) float turned[kStepElements * kTileSide];
                for (int half = 0; half < kStepElements; half += kTileSide)
                    turn(from + query * a_.q.token_stride + step * kStepElements + half, a_.q.token_stride,
                         queries_ - query, a_.head_dim - step * kStepElements - half,
                         turned + half * kTileSide, kTileSide);
                interleave_step<kParts>(turned, kTileSide, kTileSide, kStepElements, to, kTileRowBytes,
                                        steps_ * kPairBytes, [&](int) { finite = false; });
            }
        return finite;
    }

    // to[column][row] of up to 16 rows and columns; what is not there is zero.
    static RK_INLINE void turn(const T* from, int64_t stride, int64_t rows, int64_t columns, float* to,
                               int64_t to_stride) {
        for (int r = 0; r < kTileSide; r += kLanes)
            for (int c = 0; c < kTileSide; c += kLanes) {
                vf32 square[kLanes];
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i)
                    square[i] = r + i < rows && c < columns
                                    ? load_some(from + (r + i) * stride + c, int(columns - c))
                                    : zero();
                transpose(square);
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i) store(to + (c + i) * to_stride + r, square[i]);
            }
    }

    int64_t key_steps() const { return ceil_div(count_, kGroup32); }

    // ---- scores ----

    // S^T of `keys` keys from `key` on, not yet scaled, hidden ones -inf; top_: the maximum of these keys.
    void score(int64_t key, int64_t keys) {
        for (int i = 0; i < kTileQueries; ++i) top_[i] = -__builtin_inff();
        for (int64_t strip = 0; strip * kGroup32 < keys; ++strip) {
            const char* const k = k_ + (key / kGroup32 + strip) * strip_bytes_;
            const int rows = int(min64(kGroup32, keys - strip * kGroup32));
            for (int panel = 0; panel * kGroup32 < queries_; ++panel) {
                float* const block = scores_ + strip * kStripFloats + panel * kBlockFloats;
                const StepsOf of{k, q_ + panel * strip_bytes_, steps_ * kPairBytes, steps_ * kPairBytes,
                                 steps_};
                const int here = queries_ - panel * kGroup32;
                here > kTileSide ? multiply_block<2>(of, block) : multiply_block<1>(of, block);
                for (int half = 0; half * kTileSide < here && half < 2; ++half)
                    look(block + half * kTileFloats, key + strip * kGroup32, rows,
                         panel * kGroup32 + half * kTileSide);
            }
        }
    }
    template <int kHalves>
    static void multiply_block(const StepsOf& of, float* block) {
        WriteAhead none;
        zero_sums<kHalves>();
        if constexpr (kParts > 1) multiply_small<kParts, kHalves>(of, &none, 0);
        multiply_large<kHalves>(of.w, of.x, of.steps);
        store_sums<kHalves>(block);
    }
    // Hides what causal attention hides of one half, whose keys lie in two tiles, and takes the maximum.
    void look(float* tiles, int64_t key, int rows, int query) {
        const bool hides = a_.causal && index_[key + rows - 1] > last_ + query;
        for (int v = 0; v < kTileSide; v += kLanes) {
            vf32 top[4];
            for (vf32& t : top) t = load(top_ + query + v);
            for (int row = 0; row < rows; ++row) {
                float* const at = block_row(tiles, row, 0) + v;
                vf32 s = load(at);
                if (hides) {
                    const vi32 hidden = lane_index() < set1(int32_t(index_[key + row] - last_ - query - v));
                    s = select(hidden, set1(-__builtin_inff()), s);
                    store(at, s);
                }
                top[row % 4] = vmax(s, top[row % 4]);
            }
            store(top_ + query + v, vmax(vmax(top[0], top[1]), vmax(top[2], top[3])));
        }
    }

    // ---- probabilities, and what they weigh ----

    // One group of 16 queries meets `keys` keys from `key` on, whose scores are there.
    void attend(int group, int64_t key, int64_t keys) {
        alignas(64) float shift[kTileSide], decay[kTileSide], sums[2][kTileSide] = {};
        const int query = group * kTileSide;
        for (int v = 0; v < kTileSide; v += kLanes) {
            const vf32 old = load(max_ + query + v), max = vmax(old, load(top_ + query + v) * a_.scale);
            const vf32 from = select(max == set1(-__builtin_inff()), vf32{}, max);
            store(max_ + query + v, max), store(shift + v, from);
            store(decay + v, exp(old - from));
        }
        const int64_t steps = ceil_div(keys, kGroup32);
        const float* const scores = scores_ + group / 2 * kBlockFloats + group % 2 * kTileFloats;
        float* const out = out_ + group * steps_ * 2 * kTileFloats;
        for (int64_t strip = 0; strip < steps_; strip += 2) {
            const bool two = strip + 1 < steps_;
            zero_out(two);
            const auto nothing = [](int) {};
            for (int64_t step = 0; step < steps; ++step) {
                const auto probabilities = [&](int quarter) {
                    exponentials(scores + step * kStripFloats, int(min64(kGroup32, keys - step * kGroup32)),
                                 quarter, shift, sums, p_ + step * kParts * kTileBytes);
                };
                // With the tiles before: these are still on their way to memory.
                if (strip > 0)
                    weigh<true>(strip, two, key / kGroup32, step, nothing);
                else if (step > 0)
                    weigh<true>(strip, two, key / kGroup32, step - 1, probabilities);
                else
                    for (int quarter = 0; quarter < 4; ++quarter) probabilities(quarter);
            }
            if (strip == 0) weigh<true>(strip, two, key / kGroup32, steps - 1, nothing);
            if constexpr (kParts > 1)
                for (int64_t step = 0; step < steps; ++step)
                    weigh<false>(strip, two, key / kGroup32, step, nothing);
            add_out(out + strip * 2 * kTileFloats, two, key == 0, decay);
        }
        for (int v = 0; v < kTileSide; v += kLanes)
            store(sum_ + query + v,
                  fma(load(sum_ + query + v), load(decay + v), load(sums[0] + v) + load(sums[1] + v)));
    }

    // A quarter of P^T of 32 keys to its tiles.
    RK_INLINE void exponentials(const float* scores, int rows, int quarter, const float* shift,
                                float (*sums)[kTileSide], char* p) const {
        for (int v = 0; v < kTileSide; v += kLanes) {
            const vf32 from = load(shift + v);
            vf32 sum[2] = {load(sums[0] + v), load(sums[1] + v)};
            for (int row = quarter * 8; row < quarter * 8 + 8; row += 2) {
                vf32 e[2] = {};
#pragma GCC unroll 2
                for (int i = 0; i < 2; ++i) {
                    if (row + i >= rows) continue;
                    e[i] = exp(fma(load(block_row(scores, row + i, 0) + v), set1(a_.scale), -from));
                    sum[i] += e[i];
                }
                char* to = p + row / 2 * kTileRowBytes + v * 4;
#pragma GCC unroll 3
                for (int part = 0; part < kParts; ++part, to += kTileBytes) {
                    const vu32 even = take_part(&e[0]), odd = take_part(&e[1]);
                    store(reinterpret_cast<float*>(to), as_float((even >> 16) | odd));
                }
            }
            store(sums[0] + v, sum[0]), store(sums[1] + v, sum[1]);
        }
    }

    // ---- tiles 0 to 3: O^T; 4 to 6: parts of P^T; 7: V^T ----

    static void zero_out(bool two) {
        tile_zero<0>(), tile_zero<1>();
        if (two) tile_zero<2>(), tile_zero<3>();
    }
    // Adds the products of one step of keys: all but the largest if there are several, or else the only one. meanwhile(i):
    // a quarter of what the vector units have to do.
    template <bool kSmall, class Meanwhile>
    RK_INLINE void weigh(int64_t strip, bool two, int64_t first_step, int64_t step,
                         const Meanwhile& meanwhile) const {
        const int64_t part_bytes = key_steps() * kPairBytes;
        const char* const v = v_ + strip * kParts * part_bytes + (first_step + step) * kPairBytes;
        const char* const p = p_ + step * kParts * kTileBytes;
        tile_load<4>(p);
        if constexpr (kSmall && kParts > 1) tile_load<5>(p + kTileBytes);
        if constexpr (kSmall && kParts > 2) tile_load<6>(p + 2 * kTileBytes);
        meanwhile(0), weigh_tile<0, kSmall>(v, part_bytes);
        meanwhile(1), weigh_tile<1, kSmall>(v + kTileBytes, part_bytes);
        const char* const next = v + kParts * part_bytes;
        meanwhile(2);
        if (two) weigh_tile<2, kSmall>(next, part_bytes);
        meanwhile(3);
        if (two) weigh_tile<3, kSmall>(next + kTileBytes, part_bytes);
    }
    template <int kTile, bool kSmall>
    static RK_INLINE void weigh_tile(const char* v, int64_t part_bytes) {
        if constexpr (!kSmall || kParts == 1) {
            tile_load<7>(v), tile_dot_bf16<kTile, 7, 4>();
        } else {
            if constexpr (kParts == 3) tile_load<7>(v + 2 * part_bytes), tile_dot_bf16<kTile, 7, 4>();
            tile_load<7>(v + part_bytes), tile_dot_bf16<kTile, 7, 4>();
            if constexpr (kParts == 3) tile_dot_bf16<kTile, 7, 5>();
            tile_load<7>(v), tile_dot_bf16<kTile, 7, 5>();
            if constexpr (kParts == 3) tile_dot_bf16<kTile, 7, 6>();
        }
    }
    static void add_out(float* out, bool two, bool first, const float* decay) {
        alignas(64) float sums[4 * kTileFloats];
        float* const to = first ? out : sums;
        tile_store<0>(to), tile_store<1>(to + kTileFloats);
        if (two) tile_store<2>(to + 2 * kTileFloats), tile_store<3>(to + 3 * kTileFloats);
        if (first) return;
        for (int i = 0; i < (two ? 4 : 2) * kTileFloats; i += kLanes)
            store(out + i, fma(load(out + i), load(decay + i % kTileSide), load(sums + i)));
    }

    // ---- results ----

    void finish(int group, bool sees) const {
        const int query = group * kTileSide, rows = min64(kTileSide, queries_ - query);
        alignas(64) float factor[kTileSide] = {};
        float* const lse = a_.lse + head_ * a_.total_q + first_row_ + query;
        for (int i = 0; i < rows; ++i) {
            const float sum = sum_[query + i];
            const bool blind = !sees || sum == 0.0f;
            lse[i] = blind ? -__builtin_inff() : max_[query + i] + __builtin_logf(sum);
            factor[i] = blind ? 0.0f : 1.0f / sum;
        }
        T* const out = static_cast<T*>(a_.out) + ((first_row_ + query) * a_.heads + head_) * a_.head_dim;
        const float* const from = out_ + group * steps_ * 2 * kTileFloats;
        for (int64_t column = 0; column < a_.head_dim; column += kLanes)
            for (int v = 0; v < rows; v += kLanes) {
                const vf32 scale = load(factor + v);
                vf32 square[kLanes];
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i)
                    square[i] = sees ? load(from + (column + i) * kTileSide + v) * scale : zero();
                transpose(square);
                for (int i = 0; i < min64(kLanes, rows - v); ++i)
                    store_some(out + (v + i) * a_.heads * a_.head_dim + column, square[i],
                               int(a_.head_dim - column));
            }
    }

    const AttentionArgs& a_;
    const int64_t steps_;        // along head_dim; strips of its columns
    const int64_t strip_bytes_;  // of K, and of a panel of queries
    char *k_, *v_, *q_, *p_;
    float *scores_, *out_;  // [strips][2 panels][block]; [3 groups][columns][16]
    int32_t* index_;        // a kept key's place in its sequence
    T* rows_[2];
    int64_t sequence_, head_, begin_k_, length_k_, count_ = 0, first_row_, last_;
    int queries_;
    alignas(64) float max_[kTileQueries], top_[kTileQueries], sum_[kTileQueries];
    const TileUse use_;
};

}  // namespace rk::cpu::RK_CPU_ISA
