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
#include "csrc/cpu/tile_heads.h"

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
        keys_.index = memory.take<int32_t>(longest);
        rows_[0] = memory.take<T>(rows), rows_[1] = memory.take<T>(rows);
    }

    // Makes the tiles of K and V^T. False: this (sequence, head) is not for tiles.
    bool bring(int64_t sequence, int64_t head) {
        sequence_ = sequence, head_ = head;
        keys_.find(a_, sequence);
        if (keys_.count < kFewestKeys || !(a_.scale > 0.0f)) return false;
        const Rows k = keys_.rows(a_.k, head, a_.head_dim, rows_[0]);
        const Rows v = keys_.rows(a_.v, head, a_.head_dim, rows_[1]);
        const bool finite = pack_keys(k, v);
        return pack_columns<kParts>(v, v_) && finite;
    }

    // The block that starts at a query. False: nothing was written, it is not for tiles.
    bool block(int64_t first_query) {
        const int64_t begin = a_.cu_seqlens_q[sequence_], length = a_.cu_seqlens_q[sequence_ + 1] - begin;
        first_row_ = begin + first_query, queries_ = int(min64(length - first_query, kTileQueries));
        T* const out = static_cast<T*>(a_.out) + (first_row_ * a_.heads + head_) * a_.head_dim;
        for (int i = 0; i < queries_; ++i) Rows::ask_row(out + i * a_.heads * a_.head_dim, a_.head_dim);
        if (!pack_queries()) return false;
        last_ = first_query + keys_.length - length;
        const int64_t visible = a_.causal ? keys_.visible(last_ + queries_ - 1) : keys_.count;
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
    using Rows = HeadRows<T>;

    bool pack_keys(const Rows& k, const Rows& v) {
        vu32 found{};
        k.ask(0, 2 * kTileSide);
        for (int64_t key = 0; key < keys_.count; key += kTileSide) {
            k.ask(key + 2 * kTileSide, kTileSide), v.ask(key, kTileSide);
            found |= pack_rows<kParts>(k, key, k_);
        }
        return !any((vi32)found);
    }
    bool pack_queries() {
        const Rows q = head_rows<T>(a_.q, first_row_, queries_, head_, a_.head_dim);
        bool finite = true;
        for (int query = 0; query < queries_; query += kTileSide)
            finite &= pack_rows_turned<kParts>(
                q.some(query, kTileSide),
                q_ + query / kGroup32 * strip_bytes_ + query % kGroup32 / kTileSide * kTileBytes);
        return finite;
    }

    int64_t key_steps() const { return ceil_div(keys_.count, kGroup32); }

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
                here > kTileSide ? multiply_steps<kParts, 2>(of, block, false)
                                 : multiply_steps<kParts, 1>(of, block, false);
                for (int half = 0; half * kTileSide < here && half < 2; ++half)
                    look(block + half * kTileFloats, key + strip * kGroup32, rows,
                         panel * kGroup32 + half * kTileSide);
            }
        }
    }
    // Hides what causal attention hides of one half, whose keys lie in two tiles, and takes the maximum.
    void look(float* tiles, int64_t key, int rows, int query) {
        const bool hides = a_.causal && keys_.index[key + rows - 1] > last_ + query;
        for (int v = 0; v < kTileSide; v += kLanes) {
            vf32 top[4];
            for (vf32& t : top) t = load(top_ + query + v);
            for (int row = 0; row < rows; ++row) {
                float* const at = block_row(tiles, row, 0) + v;
                vf32 s = load(at);
                if (hides) {
                    const vi32 hidden =
                        lane_index() < set1(int32_t(keys_.index[key + row] - last_ - query - v));
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
        float* const from = out_ + group * steps_ * 2 * kTileFloats;
        if (!sees) __builtin_memset(from, 0, size_t(steps_ * 2 * kTileFloats) * 4);
        store_turned(from, factor, rows, a_.head_dim, out, a_.heads * a_.head_dim);
    }

    const AttentionArgs& a_;
    const int64_t steps_;        // along head_dim; strips of its columns
    const int64_t strip_bytes_;  // of K, and of a panel of queries
    char *k_, *v_, *q_, *p_;
    float *scores_, *out_;  // [strips][2 panels][block]; [3 groups][columns][16]
    SeenKeys keys_;
    T* rows_[2];
    int64_t sequence_, head_, first_row_, last_;
    int queries_;
    alignas(64) float max_[kTileQueries], top_[kTileQueries], sum_[kTileQueries];
    const TileUse use_;
};

}  // namespace rk::cpu::RK_CPU_ISA
