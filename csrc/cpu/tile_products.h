// C^T = W X^T on tiles (amx.h), with weights read where they lie, row-major [N, K], and tokens packed by tile_operands.h.
//
//   numbers      products                          of what size         in float32 throughout
//   bfloat16     w0 x0
//   float32 (1)  w0 x0                             errors of 2^-9       "medium"
//   float32 (2)  w1 x0, w0 x1, w0 x0               2^-16                "high"
//   float32 (3)  w2 x0, w1 x0, w1 x1, w0 x1, w0 x2, w0 x0; left out is less than 2^-25 of a product: "highest"
//
//   in tiles     the sums of 32 weight rows x 32 tokens, four tiles; the other four hold operands. A pair of tiles that is
//                loaded meets the pair that is there already, so the 24 tile products of a step take 16 loads.
//   accuracy     Within a slab (768 along K) the small products are summed by themselves, over all of it; then w0 x0 over
//                kChunkSteps steps at a time. These sums start from zero and are added in vectors, in this order. So
//                what rounds is a sum of few large terms. (A single product needs none of this: its sums stay in the
//                tiles over all of K.)
//   a task       a few strips of 32 weight rows x a range of tokens. It brings the strips' slab into the second-level
//                cache as tiles, split (each weight is read once a group of tokens, 4 or 2 bytes an element), and walks
//                the tokens; their panel comes from there or the third level, and is met by every strip.
//   epilogue     gets the finished block, float32, in the first-level cache.
//
//   few tokens   (one panel) Reading the weights is what takes the time. A task splits kPieceSteps steps of a strip at a
//                time, into the first-level cache, and multiplies them at once, so that the memory is never idle for
//                long; the sums go in and out of the tiles for each piece, which changes none of their bits.
//
// An element is summed in an order that depends on K alone: not on the number of tokens, their place, or the threads.
//
// The roof: a tile product is 16 cycles for 8192 multiply-adds, and its two loads 16 cycles of the first-level cache's
// time if nothing is kept. A 2 x 2 block loads one tile for each product. From the second-level cache a tile comes in 19
// cycles: a single product is bound by that (the strips' tiles are read with the hint that they are not needed again, to
// keep the panel in the first level), six products are not (16 loads for 24).
#pragma once
#include "csrc/cpu/tile_blocks.h"

namespace rk::cpu::RK_CPU_ISA {

constexpr int64_t kStripBytes = 1 << 20;  // of a slab of the strips of a task,
constexpr int64_t kMostStrips = 8;        // of a task

// ---- special numbers ----

// What a row with an infinity or NaN gives: the weight's row as it is times a token put together again, in float32.
inline float multiply_nonfinite(const float* row, int64_t stride, const float* token, int64_t k_size) {
    vf32 sums = zero();
    int64_t k = 0;
    if (stride == 1)
        for (; k + kLanes <= k_size; k += kLanes) sums = fma(load(row + k), load(token + k), sums);
    float sum = hsum(sums);
    for (; k < k_size; ++k) sum += row[k * stride] * token[k];
    return sum;
}

// Elements along K of a weight's row are this far apart.
template <class W>
constexpr int64_t column_stride_of(const W&) {
    return 1;
}
template <class T>
constexpr int64_t column_stride_of(const Matrix<T>& m) {
    return m.column_stride;
}

// ---- the product ----

// Strips of up to three weights of one K.
struct WeightStrips {
    int64_t first[4] = {};
    int count;
    template <class W>
    RK_INLINE WeightStrips(const W* weights, int count_) : count(count_) {
        for (int i = 0; i < count; ++i) first[i + 1] = first[i] + ceil_div(weights[i].rows, kGroup32);
    }
    RK_INLINE int64_t total() const { return first[count]; }
    RK_INLINE int weight_of(int64_t strip) const {
        int i = 0;
        while (strip >= first[i + 1]) ++i;
        return i;
    }
};

template <class T, int kParts, class W, class Epilogue>
class TileProduct {
  public:
    TileProduct(const W* weights, int count, const TokenTiles<kParts>& x, const Epilogue& epilogue)
        : weights_(weights), strips_(weights, count), x_(x), epilogue_(epilogue) {}

    void run() {
        const int64_t strips = strips_.total(), panels = x_.panels(), threads = num_threads();
        if (strips == 0 || panels == 0) return;
        if (panels == 1) return few(strips, threads);
        // Strips of a task: as many as the cache holds, but enough tasks for every thread to have several, and as many as
        // the others.
        const int64_t fitting =
            min64(kMostStrips, kStripBytes / (x_.layout.steps_of(0) * kParts * kPairBytes));
        const int64_t most = max64(1, min64(fitting, strips / (3 * threads)));
        const int64_t blocks = min64(strips, round_up(ceil_div(strips, most), threads));
        const int64_t ranges = max64(1, min64(panels, ceil_div(2 * threads, blocks)));
        parallel_tasks(blocks * ranges, threads, [&](int64_t task) {
            const int64_t block = task / ranges, range = task % ranges;
            multiply(strips * block / blocks, strips * (block + 1) / blocks, panels * range / ranges,
                     panels * (range + 1) / ranges);
        });
    }

  private:
    static constexpr bool kMarks = kMarksSpecial<kParts>;
    static constexpr int kLinesOfRow = kRowSteps * kStepElements * int(sizeof(T)) / 64;
    // Of what comes after a piece half the lines are asked for while it is packed, the others while it is multiplied, so
    // that the memory has always something to do.
    static constexpr int kLinesPacking = kLinesOfRow / 2;
    static constexpr int kLinesMultiplying = kLinesOfRow / 2 * kGroup32 / kRowSteps;
    // The piece that is packed next was asked for while the one before was packed and multiplied: one piece ahead its first
    // lines would be waited for.
    static constexpr int kPiecesAhead = 2;

    struct Place {
        int part;
        int64_t row;
        int rows;
    };
    Place place(int64_t strip) const {
        const int part = strips_.weight_of(strip);
        const int64_t row = (strip - strips_.first[part]) * kGroup32;
        return {part, row, int(min64(kGroup32, weights_[part].rows - row))};
    }

    void multiply(int64_t first, int64_t last, int64_t left, int64_t right) const {
        const TileLayout<kParts>& layout = x_.layout;
        const int64_t count = last - first, slabs = layout.slabs();
        const int64_t strip_bytes = layout.steps_of(0) * kParts * kPairBytes;
        const int64_t kept = slabs == 1 ? count : count * (right - left);  // blocks
        Scratch& memory = thread_scratch(Use::column_block);
        memory.reset(size_t(count * (strip_bytes + kGroup32) + kept * kBlockFloats * 4), 3);
        char* const tiles = memory.take<char>(count * strip_bytes);
        float* const blocks = memory.take<float>(kept * kBlockFloats);
        uint8_t* const nonfinite = memory.take<uint8_t>(count * kGroup32);
        __builtin_memset(nonfinite, 0, size_t(count * kGroup32));
        const TileUse use;
        for (int64_t slab = 0; slab < slabs; ++slab) {
            for (int64_t i = 0; i < count; ++i) {
                const int64_t step = slab * kSlabSteps<kParts>;
                ReadAhead next = after(first + i, (step + 2 * kRowSteps) * kStepElements);
                pack(place(first + i), step, layout.steps_of(slab), tiles + i * strip_bytes,
                     nonfinite + i * kGroup32, &next, kLinesOfRow);
            }
            for (int64_t panel = left; panel < right; ++panel) {
                float* const sums = blocks + (slabs == 1 ? 0 : (panel - left) * count * kBlockFloats);
                if (x_.real(panel) > kTileSide)
                    multiply_panel<2>(tiles, strip_bytes, first, count, panel, slab, sums);
                else
                    multiply_panel<1>(tiles, strip_bytes, first, count, panel, slab, sums);
                if (slab == slabs - 1) finish_panel(first, count, panel, sums, nonfinite);
            }
        }
    }

    const T* row(const Place& at) const {
        const W& w = weights_[at.part];
        return static_cast<const T*>(w.data) + at.row * w.row_stride;
    }
    // What is read after the first `column` elements of a strip's rows.
    ReadAhead after(int64_t strip, int64_t column) const {
        const Place at = place(strip);
        const int64_t next = strip + 1 < strips_.total() ? strip + 1 : strip;
        const W& w = weights_[at.part];
        return {row(at), row(place(next)), w.row_stride * int64_t(sizeof(T)), w.columns * int64_t(sizeof(T)),
                column * int64_t(sizeof(T))};
    }

    // Steps of a strip from one on (of all of K) as tiles.
    void pack(const Place& at, int64_t step, int64_t steps, char* tiles, uint8_t* nonfinite, ReadAhead* next,
              int lines) const {
        const W& w = weights_[at.part];
        const int64_t k = step * kStepElements;
        const T* const in = row(at) + k * column_stride_of(w);
        if (column_stride_of(w) != 1)
            return pack_strip_across<kParts>(in, at.rows, column_stride_of(w), w.columns - k, steps, tiles,
                                             nonfinite);
        pack_strip<kParts>(in, at.rows, w.row_stride, w.columns - k, steps, tiles, nonfinite, next, lines);
    }

    // A task is a strip, so that the threads end together; each asks for what its next one needs.
    void few(int64_t strips, int64_t threads) const {
        parallel_tasks(strips, threads, [&](int64_t strip) {
            const TileUse use;
            x_.tokens > kTileSide ? multiply_few<2>(strip) : multiply_few<1>(strip);
        });
    }

    // All of a strip for the only panel.
    template <int kHalves>
    void multiply_few(int64_t strip) const {
        alignas(64) char tiles[kPieceSteps<kParts> * kParts * kPairBytes];
        alignas(64) float block[kBlockFloats];
        PieceSums<kParts> sums;
        uint8_t nonfinite[kGroup32] = {};
        const Place at = place(strip);
        ReadAhead next = after(strip, kPiecesAhead * kPieceSteps<kParts> * kStepElements);
        const TileLayout<kParts>& layout = x_.layout;
        for (int64_t slab = 0; slab < layout.slabs(); ++slab) {
            const int64_t slab_steps = layout.steps_of(slab);
            for (int64_t step = 0; step < slab_steps; step += kPieceSteps<kParts>) {
                const int64_t steps = min64(kPieceSteps<kParts>, slab_steps - step);
                const char* const x = x_.slab(0, slab) + step * layout.step_bytes;
                pack(at, slab * kSlabSteps<kParts> + step, steps, tiles, nonfinite, &next, kLinesPacking);
                if constexpr (kParts == 1)
                    multiply_once<kHalves>(tiles, x, layout.step_bytes, x_.row_bytes, steps, block,
                                           slab == 0 && step == 0, &next, kLinesMultiplying);
                else
                    multiply_piece<kParts, kHalves>(
                        {tiles, x, steps * kPairBytes, layout.part_bytes(slab), steps}, x_.row_bytes, step,
                        slab_steps - step, &sums, &next, kLinesMultiplying);
            }
            if constexpr (kParts > 1) add_pieces<kParts, kHalves>(sums, slab_steps, block, slab == 0);
        }
        finish_panel(strip, 1, 0, block, nonfinite);
    }

    template <int kHalves>
    void multiply_panel(const char* tiles, int64_t strip_bytes, int64_t first, int64_t count, int64_t panel,
                        int64_t slab, float* sums) const {
        const int64_t steps = x_.layout.steps_of(slab);
        const bool last = slab == x_.layout.slabs() - 1;
        const char* const x = x_.slab(panel, slab);
        if constexpr (kParts == 1) {
            for (int64_t step = 0; step < steps; step += kChunkSteps)
                for (int64_t i = 0; i < count; ++i) {
                    WriteAhead written =
                        last && step + kChunkSteps >= steps ? ahead(first + i, panel) : WriteAhead{};
                    multiply_once<kHalves>(tiles + i * strip_bytes + step * kPairBytes, x + step * kPairBytes,
                                           kPairBytes, kTileRowBytes, min64(kChunkSteps, steps - step),
                                           sums + i * kBlockFloats, slab == 0 && step == 0, &written, 3);
                }
        } else {
            for (int64_t i = 0; i < count; ++i)
                multiply_slab<kParts, kHalves>(
                    {tiles + i * strip_bytes, x, steps * kPairBytes, steps * kPairBytes, steps},
                    sums + i * kBlockFloats, slab == 0, last ? ahead(first + i, panel) : WriteAhead{});
        }
    }

    WriteAhead ahead(int64_t strip, int64_t panel) const {
        const Place at = place(strip);
        return epilogue_.ahead(at.part, at.row, panel * kGroup32, x_.real(panel));
    }

    void finish_panel(int64_t first, int64_t count, int64_t panel, float* sums,
                      const uint8_t* nonfinite) const {
        const int tokens = x_.real(panel);
        for (int64_t i = 0; i < count; ++i, sums += kBlockFloats, nonfinite += kGroup32) {
            const Place at = place(first + i);
            if constexpr (kMarks) repair(weights_[at.part], at.row, at.rows, panel, nonfinite, sums);
            epilogue_(at.part, at.row, panel * kGroup32, at.rows, tokens, static_cast<const float*>(sums));
        }
    }

    void repair(const W& w, int64_t row, int rows, int64_t panel, const uint8_t* row_nonfinite,
                float* sums) const {
        const uint8_t* const token_nonfinite = x_.nonfinite + panel * kGroup32;
        uint64_t found = 0, word;
        for (int i = 0; i < kGroup32; i += 8) {
            __builtin_memcpy(&word, token_nonfinite + i, 8), found |= word;
            __builtin_memcpy(&word, row_nonfinite + i, 8), found |= word;
        }
        if (found == 0) return;
        float* const token_row = thread_scratch(Use::left_operand).words(w.columns);
        const float* const weight = static_cast<const float*>(w.data) + row * w.row_stride;
        for (int t = 0; t < x_.real(panel); ++t) {
            const int64_t token = panel * kGroup32 + t;
            for (int64_t k = 0; k < w.columns; ++k) token_row[k] = token_element(x_, token, k);
            for (int r = 0; r < rows; ++r)
                if (row_nonfinite[r] != 0 || token_nonfinite[t] != 0)
                    block_row(sums, r, t / kTileSide)[t % kTileSide] = multiply_nonfinite(
                        weight + r * w.row_stride, column_stride_of(w), token_row, w.columns);
        }
    }

    const W* weights_;
    const WeightStrips strips_;
    const TokenTiles<kParts>& x_;
    const Epilogue& epilogue_;
};

// For every block: epilogue(weight, row, token, rows, tokens, block), of up to 32 rows of that weight and 32 tokens;
// before that epilogue.ahead(weight, row, token, tokens) says what it will write. T: the weights' elements.
template <class T, int kParts, class W, class Epilogue>
inline void multiply_tiles(const W* weights, int count, const TokenTiles<kParts>& x,
                           const Epilogue& epilogue) {
    TileProduct<T, kParts, W, Epilogue>(weights, count, x, epilogue).run();
}

// ---- epilogues ----

// out[token][row] = block + bias[row]; bias: [rows], or null. out: the block's first element, rows of it `stride` apart.
template <class T>
inline void store_block(const float* block, int rows, int tokens, const T* bias, T* out, int64_t stride) {
    for (int row = 0; row < rows; row += kLanes) {
        const int width = int(min64(kLanes, rows - row));
        const vf32 b = bias != nullptr ? load_some(bias + row, width) : zero();
        for (int token = 0; token < tokens; token += kLanes) {
            vf32 square[kLanes];
#pragma GCC unroll 16
            for (int r = 0; r < kLanes; ++r)
                square[r] = load(block_row(block, row + r, token / kTileSide) + token % kTileSide);
            transpose(square);
            if (width == kLanes && tokens - token >= kLanes) {
#pragma GCC unroll 16
                for (int t = 0; t < kLanes; ++t) store(out + (token + t) * stride + row, square[t] + b);
            } else {
                for (int t = 0; t < min64(kLanes, tokens - token); ++t)
                    store_some(out + (token + t) * stride + row, square[t] + b, width);
            }
        }
    }
}

// The same in bfloat16: two rows of a token are a word, so that half as much is transposed, and a token's rows are written
// as one line of the cache.
inline void store_block(const float* block, int rows, int tokens, const bf16* bias, bf16* out,
                        int64_t stride) {
    alignas(64) float biases[kGroup32] = {};
    for (int row = 0; bias != nullptr && row < rows; row += kLanes)
        store(biases + row, load_some(bias + row, rows - row));
    for (int token = 0; token < tokens; token += kLanes)
        for (int row = 0; row < rows; row += 2 * kLanes) {
            vf32 square[kLanes];
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) {
                const int at = row + 2 * i;
                const float* const from = block_row(block, at, token / kTileSide) + token % kTileSide;
                square[i] =
                    as_float(pair_of_bf16(load(from) + biases[at], load(from + kTileSide) + biases[at + 1]));
            }
            transpose(square);
            bf16* const to = out + token * stride + row;
            const int width = int(min64(2 * kLanes, rows - row));
            if (width == 2 * kLanes && tokens - token >= kLanes) {
#pragma GCC unroll 16
                for (int t = 0; t < kLanes; ++t) store(reinterpret_cast<float*>(to + t * stride), square[t]);
            } else {
                for (int t = 0; t < min64(kLanes, tokens - token); ++t)
                    __builtin_memcpy(to + t * stride, &square[t], size_t(width) * sizeof(bf16));
            }
        }
}

// Writes products of up to three weights side by side: out[token][first[weight] + row] (+ bias).
template <class T>
struct StoreBlocks {
    T* out;  // [tokens, stride]
    int64_t stride;
    int64_t first[3];
    const T* bias[3];  // [rows of the weight], or null
    WriteAhead ahead(int weight, int64_t row, int64_t token, int tokens) const {
        return {reinterpret_cast<char*>(out + token * stride + first[weight] + row),
                stride * int64_t(sizeof(T)), tokens};
    }
    void operator()(int weight, int64_t row, int64_t token, int rows, int tokens, const float* block) const {
        store_block(block, rows, tokens, bias[weight] == nullptr ? nullptr : bias[weight] + row,
                    out + token * stride + first[weight] + row, stride);
    }
};

// block = gelu(block + bias), to the tiles of the product that comes next, of which the block's rows are one step.
// Where a row of the weight is not there, it is zero.
template <class T, int kParts, bool kTanh>
inline void activate_block(const float* block, int rows, const T* bias, const TokenTiles<kParts>& to,
                           int64_t step, int64_t panel) {
    const int64_t part_bytes = to.layout.part_bytes(step / kSlabSteps<kParts>);
    char* const tiles = to.step(panel, step);
    const int halves = to.real(panel) > kTileSide ? 2 : 1;
    for (int half = 0; half < halves; ++half)
        for (int row = 0; row < kGroup32; row += 2)
            for (int v = 0; v * 4 < to.row_bytes; v += kLanes) {
                const int words = int(min64(kLanes, to.row_bytes / 4 - v));
                vf32 pair[2];
                for (int i = 0; i < 2; ++i)
                    pair[i] =
                        row + i < rows
                            ? gelu<kTanh>(load(block_row(block, row + i, half) + v) + load1(bias + row + i))
                            : zero();
                char* const out = tiles + half * kTileBytes + row / 2 * to.row_bytes + v * 4;
                const auto put = [&](int part, vu32 even, vu32 odd) {
                    store_words(out + part * part_bytes, (even >> 16) | odd, words);
                };
                if constexpr (sizeof(T) == 2) {
                    store_words(out, pair_of_bf16(pair[0], pair[1]), words);
                    continue;
                }
                if (!has_special(larger(size_bits(pair[0]), size_bits(pair[1])))) {
                    for (int part = 0; part < kParts; ++part) {
                        const vu32 even = take_part(&pair[0]), odd = take_part(&pair[1]);
                        put(part, even, odd);
                    }
                    continue;
                }
                for (int t = 0; t < words; ++t)
                    for (int i = 0; i < 2; ++i) {
                        const ScalarParts parts = split_any(pair[i][t]);
                        for (int part = 0; part < kParts; ++part)
                            __builtin_memcpy(out + part * part_bytes + 4 * t + 2 * i, &parts.part[part], 2);
                        if (kMarksSpecial<kParts> && !is_finite(pair[i][t]))
                            to.mark(panel * kGroup32 + half * kTileSide + v + t);
                    }
            }
}

}  // namespace rk::cpu::RK_CPU_ISA
