// Attention backward on tiles (amx.h), for one head of a sequence at a time; attention.cpp says what is computed, and takes
// the row sums likewise: from P and dP themselves. Numbers are cut into bfloat16 parts, always all of them.
//
// Each product is of a strip (left operand, 32 rows) and a panel (right operand, 32 columns), summed over steps of 32.
// Scores are kept transposed, [key][query]: then the strips and panels made of them come out of the vectors with no
// transposition, neighbouring queries side by side in a row, or neighbouring keys in a word.
//
//   S^T   = K Q^T       strips of 32 keys      panels of 32 queries   over head_dim
//   dP^T  = V dO^T      strips of 32 keys      panels of 32 queries   over head_dim
//   dQ^T  = K^T dS^T    strips of 32 columns   panels of 32 queries   over keys
//   dV    = P^T dO      strips of 32 keys      panels of 32 columns   over queries
//   dK    = dS^T Q      strips of 32 keys      panels of 32 columns   over queries
//
// K, V and K^T are laid out once. A block is up to kBlockPanels panels of queries. First come S^T and dP^T of all keys
// (float32), with the exponentials and the row sums while a strip's are in the first-level cache; then strip by strip P^T and
// dS^T as parts, and at once what they add to dV and dK; then dQ. dV and dK are summed in tiles over the queries of a block,
// and block by block in float32. Two panels: with four what a block keeps (12 bytes a score with six products) and the
// operands leave the second-level cache at 512 keys, and float32 takes a sixth longer.
//
// Which way a (sequence, head) takes depends on head_dim and its numbers of queries and of keys that may be seen. In
// attention.cpp's way is also computed one of which an operand in float32 has an infinity or NaN, or where dS is NaN or would
// round to infinity.
#pragma once
#include "csrc/cpu/key_dropout.h"
#include "csrc/cpu/tile_heads.h"

namespace rk::cpu::RK_CPU_ISA {

template <class T>
class TileAttentionBackward {
  public:
    // longest: keys of a sequence. Memory is the calling thread's.
    TileAttentionBackward(const AttentionArgs& args, int64_t longest)
        : a_(args),
          steps_(ceil_div(args.head_dim, kStepElements)),
          group_bytes_(steps_ * kParts * kPairBytes) {
        const int64_t strips = ceil_div(longest, kGroup32), tiles = strips * group_bytes_;
        const int64_t rows = args.key_mask == nullptr ? 0 : longest * args.head_dim;
        const int64_t scores = strips * kBlockPanels * kBlockFloats, sums = strips * steps_ * kBlockFloats;
        const int64_t p = kBlockPanels * kParts * kPairBytes, block = kBlockPanels * group_bytes_;
        Scratch& memory = thread_scratch(Use::column_block);
        memory.reset(size_t(3 * tiles + 4 * block + 2 * p + strips * p +
                            4 * (2 * scores + 2 * sums + longest) + 2 * rows * int64_t(sizeof(T))),
                     17);
        k_ = memory.take<char>(tiles), v_ = memory.take<char>(tiles), k_turned_ = memory.take<char>(tiles);
        q_turned_ = memory.take<char>(block), grad_out_turned_ = memory.take<char>(block);
        q_ = memory.take<char>(block), grad_out_ = memory.take<char>(block);
        scores_ = memory.take<float>(scores), grad_p_ = memory.take<float>(scores);
        p_ = memory.take<char>(p), ds_ = memory.take<char>(p), ds_turned_ = memory.take<char>(strips * p);
        grad_k_ = memory.take<float>(sums), grad_v_ = memory.take<float>(sums);
        keys_.index = memory.take<int32_t>(longest);
        room_[0] = memory.take<T>(rows), room_[1] = memory.take<T>(rows);
    }

    // All gradients of one (sequence, head). False: it is not for tiles, and what was written is of no use.
    bool run(int64_t sequence, int64_t head) {
        head_ = head, begin_ = a_.cu_seqlens_q[sequence], length_ = a_.cu_seqlens_q[sequence + 1] - begin_;
        keys_.find(a_, sequence);
        if (min64(length_, keys_.count) < kFewest || a_.head_dim < kLeastHeadDim || !(a_.scale > 0.0f))
            return false;
        const Rows k = keys_.rows(a_.k, head, a_.head_dim, room_[0]);
        const Rows v = keys_.rows(a_.v, head, a_.head_dim, room_[1]);
        if (!pack_keys(k, v)) return false;
        summed_strips_ = 0;
        for (int64_t query = 0; query < length_; query += kBlockPanels * kGroup32)
            if (!block(query)) return false;
        clear_hidden();
        return true;
    }

  private:
    using Rows = HeadRows<T>;
    static constexpr int kParts = sizeof(T) == 2 ? 1 : 3;
    // Fewer queries or keys, or shorter ones, are faster in attention.cpp's way.
    static constexpr int64_t kFewest = sizeof(T) == 2 ? 40 : 64, kLeastHeadDim = sizeof(T) == 2 ? 16 : 64;
    static constexpr int64_t kBlockPanels = 2;
    static constexpr int64_t kChunk = 8;  // steps whose small and large products share sums

    bool pack_keys(const Rows& k, const Rows& v) {
        vu32 found{};
        k.ask(0, 2 * kTileSide), v.ask(0, 2 * kTileSide);
        for (int64_t key = 0; key < round_up(keys_.count, kGroup32); key += kTileSide) {
            k.ask(key + 2 * kTileSide, kTileSide), v.ask(key + 2 * kTileSide, kTileSide);
            found |= pack_rows<kParts>(k, key, k_) | pack_rows<kParts>(v, key, v_);
        }
        return pack_columns<kParts>(k, k_turned_) && !any((vi32)found);
    }

    // Some queries, and what they add to the gradients of keys.
    bool block(int64_t first) {
        const int64_t queries = min64(length_ - first, kBlockPanels * kGroup32);
        panels_ = ceil_div(queries, kGroup32), first_ = first;
        last_ = first + keys_.length - length_;  // the last key that the first query sees, if causal
        seen_ = a_.causal ? keys_.visible(last_ + queries - 1) : keys_.count;
        strips_ = ceil_div(seen_, kGroup32);
        const Rows q = head_rows<T>(a_.q, begin_ + first, queries, head_, a_.head_dim);
        const Rows grad_out = head_rows<T>(a_.grad_out, begin_ + first, queries, head_, a_.head_dim);
        for (int64_t panel = 0; panel < panels_; ++panel)
            if (!pack_panel(q, panel, q_turned_, q_) ||
                !pack_panel(grad_out, panel, grad_out_turned_, grad_out_))
                return false;
        const bool last = first + queries == length_;
        a_.dropout.on ? products<true>(last) : products<false>(last);
        summed_strips_ = strips_;
        return !has_special(largest_);
    }

    template <bool kDropout>
    void products(bool last) {
        start_sums();
        const int64_t part_bytes = steps_ * kPairBytes;
        for (int64_t strip = 0; strip < strips_; ++strip) {
            for (int64_t panel = 0; panel < panels_; ++panel) {
                const int64_t from = strip * group_bytes_, to = panel * group_bytes_;
                multiply({k_ + from, q_turned_ + to, part_bytes, part_bytes, steps_}, scores(panel, strip),
                         false, width_of(panel));
                multiply({v_ + from, grad_out_turned_ + to, part_bytes, part_bytes, steps_},
                         grad_p(panel, strip), false, width_of(panel));
            }
            for (int64_t panel = 0; panel < panels_; ++panel) probabilities<kDropout>(strip, panel);
        }
        finish_sums();
        for (int64_t strip = 0; strip < strips_; ++strip) {
            for (int64_t panel = 0; panel < panels_; ++panel) score_gradients<kDropout>(strip, panel);
            gradient_of_keys(p_, grad_out_, strip, grad_v_, last, a_.grad_v, 1.0f);
            gradient_of_keys(ds_, q_, strip, grad_k_, last, a_.grad_k, a_.scale);
        }
        for (int64_t panel = 0; panel < panels_; ++panel) gradient_of_queries(panel);
    }

    // ---- of queries ----

    void start_sums() {
        const int64_t rows = min64(length_ - first_, kBlockPanels * kGroup32);
        const float* const lse = a_.lse + head_ * a_.total_q + begin_ + first_;
        for (int64_t i = 0; i < panels_ * kGroup32; ++i) {
            // +inf for a row that sees no key, and for lanes beyond the last query: their P is zero
            lse_[i] = i < rows ? lse[i] : -__builtin_inff();
            if (lse_[i] == -__builtin_inff()) lse_[i] = __builtin_inff();
            sum_p_[i] = sum_p_dp_[i] = 0.0f;
        }
        largest_ = vu32{};
    }
    void finish_sums() {
        for (int64_t v = 0; v < panels_ * kGroup32; v += kLanes) {
            const vf32 sum = load(sum_p_ + v), inverse = select(sum == vf32{}, vf32{}, 1.0f / sum);
            store(sum_p_ + v, inverse), store(sum_p_dp_ + v, load(sum_p_dp_ + v) * inverse);
        }
    }

    // 32 queries as a panel to be summed over columns, and as a step of the panels that are summed over queries.
    bool pack_panel(const Rows& all, int64_t panel, char* turned, char* panels) const {
        bool finite = true;
        const Rows from = all.some(panel * kGroup32, kGroup32);
        all.ask((panel + 1) * kGroup32, kGroup32);
        for (int half = 0; half < kGroup32; half += kTileSide)
            finite &= pack_rows_turned<kParts>(from.some(half, kTileSide),
                                               turned + panel * group_bytes_ + half / kTileSide * kTileBytes);
        for (int64_t column = 0; column < steps_ * kGroup32; column += kTileSide)
            interleave_step<kParts>(from.at(0, column), from.stride, int(max64(0, from.columns - column)),
                                    from.count,
                                    panels + column / kGroup32 * panels_ * kParts * kPairBytes +
                                        panel * kPairBytes + column % kGroup32 / kTileSide * kTileBytes,
                                    kTileRowBytes, panels_ * kPairBytes, [&](int) { finite = false; });
        return finite;
    }

    // block (+)= a strip by a panel, of which `width` columns are needed.
    static void multiply(const StepsOf& of, float* block, bool add, int width) {
        const int64_t chunk = kParts == 1 ? of.steps : kChunk;
        for (int64_t step = 0; step < of.steps; step += chunk) {
            const StepsOf part{of.w + step * kPairBytes, of.x + step * kPairBytes, of.w_part, of.x_part,
                               min64(chunk, of.steps - step)};
            width > kTileSide ? multiply_steps<kParts, 2>(part, block, add || step > 0)
                              : multiply_steps<kParts, 1>(part, block, add || step > 0);
        }
    }

    // Of a panel's tiles, those that have queries.
    int width_of(int64_t panel) const { return queries_of(panel) > kTileSide ? kGroup32 : kTileSide; }
    float* scores(int64_t panel, int64_t strip) const {
        return scores_ + (strip * panels_ + panel) * kBlockFloats;
    }
    float* grad_p(int64_t panel, int64_t strip) const {
        return grad_p_ + (strip * panels_ + panel) * kBlockFloats;
    }
    int queries_of(int64_t panel) const { return int(min64(kGroup32, length_ - first_ - panel * kGroup32)); }
    int keys_of(int64_t strip) const { return int(min64(kGroup32, seen_ - strip * kGroup32)); }
    // Where a vector of queries of a key of a strip is, in a block of floats.
    static RK_INLINE int64_t place(int key, int query) {
        return key / kTileSide * 2 * kTileFloats + query / kTileSide * kTileFloats +
               key % kTileSide * kTileSide + query % kTileSide;
    }

    // Hides what causal attention hides: a score of -inf.
    void hide(float* s, int64_t strip, int64_t panel) const {
        const int32_t* const index = keys_.index + strip * kGroup32;
        const int64_t last = last_ + panel * kGroup32;
        for (int key = 0; key < keys_of(strip); ++key)
            for (int v = 0; v < width_of(panel); v += kLanes) {
                const vi32 hidden = lane_index() < set1(int32_t(index[key] - last - v));
                float* const at = s + place(key, v);
                store(at, select(hidden, set1(-__builtin_inff()), load(at)));
            }
    }

    // e^(score - lse) in place of the scores, negative where dropout drops it, and dP with its dropout factor; adds to
    // the row sums.
    template <bool kDropout>
    void probabilities(int64_t strip, int64_t panel) {
        float *const s = scores(panel, strip), *const dp = grad_p(panel, strip);
        if (a_.causal) hide(s, strip, panel);
        const int32_t* const index = keys_.index + strip * kGroup32;
        const int keys = keys_of(strip);
        for (int v = 0; v < width_of(panel); v += kLanes) {
            const int64_t row = panel * kGroup32 + v;
            const vf32 shift = load(lse_ + row), scale = set1(a_.scale);
            vf32 p_sum = load(sum_p_ + row), p_dp_sum = load(sum_p_dp_ + row);
            KeyDropout keep(a_.dropout, begin_ + first_ + row, head_);
            for (int key = 0; key < keys; ++key) {
                const int64_t at = place(key, v);
                const vf32 e = exp(fma(load(s + at), scale, -shift));
                vf32 g = load(dp + at), p = e;
                if constexpr (kDropout) {
                    const vf32 multiplier = keep.multiplier(index[key]);
                    g *= multiplier, p = select(multiplier == vf32{}, -e, e);
                    store(dp + at, g);
                }
                p_sum += e, p_dp_sum = fma(e, g, p_dp_sum);
                store(s + at, p);
            }
            store(sum_p_ + row, p_sum), store(sum_p_dp_ + row, p_dp_sum);
        }
    }

    // P^T with its dropout factor, and dS^T = P (dP - sum), as parts of tiles.
    template <bool kDropout>
    void score_gradients(int64_t strip, int64_t panel) {
        const float *const s = scores(panel, strip), *const dp = grad_p(panel, strip);
        const float *const inverse = sum_p_ + panel * kGroup32, *const sum = sum_p_dp_ + panel * kGroup32;
        const int keys = keys_of(strip), width = width_of(panel);
        const int64_t part_bytes = panels_ * kPairBytes, turned_part = strips_ * kPairBytes;
        char* const turned = ds_turned_ + panel * kParts * turned_part + strip * kPairBytes;
        vu32 largest = largest_;
        for (int key = 0; key < kGroup32; key += 2)
            for (int v = 0; v < kGroup32; v += 2 * kLanes) {
                vf32 p[2][2] = {}, ds[2][2] = {};  // [key][vector of queries]
#pragma GCC unroll 2
                for (int i = 0; i < 2; ++i)
#pragma GCC unroll 2
                    for (int j = 0; j < 2; ++j) {
                        const int query = v + j * kLanes;
                        if (key + i >= keys || query >= width) continue;
                        const int64_t at = place(key + i, query);
                        const vf32 e = load(s + at) * load(inverse + query);
                        const vf32 rest = load(dp + at) - load(sum + query);
                        ds[i][j] = (kDropout ? vabs(e) : e) * rest;
                        p[i][j] = kDropout ? select(e < vf32{}, vf32{}, e * a_.dropout.scale) : e;
                        largest = larger(largest, size_bits(ds[i][j]));
                    }
                const int64_t row = panel * kPairBytes + key / kTileSide * kTileBytes +
                                    key % kTileSide * kTileRowBytes + v * 2;
                const int64_t first = v / kTileSide * kTileBytes + v % kTileSide * 4;
                const int64_t second = (v + kLanes) / kTileSide * kTileBytes + (v + kLanes) % kTileSide * 4;
                store_parts(p, p_ + row, part_bytes, nullptr, 0, 0);
                store_parts(ds, ds_ + row, part_bytes, turned + key / 2 * kTileRowBytes + first, turned_part,
                            second - first);
            }
        largest_ = largest;
    }
    // Two keys by two vectors of queries: a piece of two rows of a strip, and of a row of two tiles of a panel (unless that
    // is null), `other` bytes from each other.
    static RK_INLINE void store_parts(vf32 (&x)[2][2], char* rows, int64_t rows_part, char* words,
                                      int64_t words_part, int64_t other) {
#pragma GCC unroll 3
        for (int part = 0; part < kParts; ++part, rows += rows_part) {
            vu32 of[2][2];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) of[i / 2][i % 2] = take_part(&x[i / 2][i % 2]);
            store_upper_halves(rows, of[0][0], of[0][1]);
            store_upper_halves(rows + kTileRowBytes, of[1][0], of[1][1]);
            if (words == nullptr) continue;
            store(reinterpret_cast<float*>(words), as_float((of[0][0] >> 16) | of[1][0]));
            store(reinterpret_cast<float*>(words + other), as_float((of[0][1] >> 16) | of[1][1]));
            words += words_part;
        }
    }

    void gradient_of_queries(int64_t panel) const {
        alignas(64) float block[kBlockFloats] = {}, turned[kGroup32 * kTileSide], factor[kTileSide];
        for (float& f : factor) f = a_.scale;
        const int64_t key_steps = ceil_div(keys_.count, kGroup32), stride = a_.heads * a_.head_dim;
        T* const out =
            static_cast<T*>(a_.grad_q) + (begin_ + first_ + panel * kGroup32) * stride + head_ * a_.head_dim;
        for (int64_t strip = 0; strip < steps_; ++strip) {
            multiply({k_turned_ + strip * kParts * key_steps * kPairBytes,
                      ds_turned_ + panel * kParts * strips_ * kPairBytes, key_steps * kPairBytes,
                      strips_ * kPairBytes, strips_},
                     block, false, width_of(panel));
            for (int half = 0; half < queries_of(panel); half += kTileSide) {
                const float* const from = block + half / kTileSide * kTileFloats;
                __builtin_memcpy(turned, from, kTileFloats * 4);
                __builtin_memcpy(turned + kTileFloats, from + 2 * kTileFloats, kTileFloats * 4);
                store_turned(turned, factor, min64(kTileSide, queries_of(panel) - half),
                             min64(kGroup32, a_.head_dim - strip * kGroup32),
                             out + half * stride + strip * kGroup32, stride);
            }
        }
    }

    // ---- of keys ----

    // What the block's queries add to the gradient of a strip of keys; after the last block it is stored.
    void gradient_of_keys(const char* left, const char* right, int64_t strip, float* sums, bool last,
                          void* out, float factor) const {
        const int64_t bytes = panels_ * kParts * kPairBytes, part_bytes = panels_ * kPairBytes;
        for (int64_t panel = 0; panel < steps_; ++panel) {
            float* const block = sums + (strip * steps_ + panel) * kBlockFloats;
            multiply({left, right + panel * bytes, part_bytes, part_bytes, panels_}, block,
                     strip < summed_strips_, kGroup32);
            if (!last) continue;
            for (int key = 0; key < keys_of(strip); ++key) {
                T* const to = key_row(out, keys_.index[strip * kGroup32 + key]) + panel * kGroup32;
                const int left_over = int(a_.head_dim - panel * kGroup32);
                for (int c = 0; c < kGroup32 && c < left_over; c += kLanes)
                    store_some(to + c, load(block + place(key, c)) * factor, left_over - c);
            }
        }
    }
    T* key_row(void* out, int64_t key) const {
        return static_cast<T*>(out) + ((keys_.begin + key) * a_.heads + head_) * a_.head_dim;
    }
    void clear_hidden() const {
        for (int64_t key = 0, n = 0; key < keys_.length; ++key) {
            if (n < keys_.count && keys_.index[n] == key) {
                ++n;
                continue;
            }
            __builtin_memset(key_row(a_.grad_k, key), 0, size_t(a_.head_dim) * sizeof(T));
            __builtin_memset(key_row(a_.grad_v, key), 0, size_t(a_.head_dim) * sizeof(T));
        }
    }

    const AttentionArgs& a_;
    const int64_t steps_;        // along head_dim; strips and panels of its columns
    const int64_t group_bytes_;  // of a strip or panel that is summed over head_dim
    SeenKeys keys_;
    char *k_, *v_, *k_turned_;                            // [strips]
    char *q_turned_, *grad_out_turned_, *q_, *grad_out_;  // of a block: [panels], [panels of columns]
    float *scores_, *grad_p_;                             // [strips][panels][block]
    char *p_, *ds_, *ds_turned_;                          // a strip; [panels]
    float *grad_k_, *grad_v_;                             // [strips][panels of columns][block]
    T* room_[2];
    int64_t head_, begin_, length_;           // of a (sequence, head): its queries
    int64_t first_, panels_, seen_, strips_;  // of a block: its first query; the keys that it sees
    int64_t last_, summed_strips_;            // strips that have sums of earlier blocks
    vu32 largest_;
    static constexpr int64_t kRows = kBlockPanels * kGroup32;
    alignas(64) float lse_[kRows], sum_p_[kRows], sum_p_dp_[kRows];
    const TileUse use_;
};

}  // namespace rk::cpu::RK_CPU_ISA
