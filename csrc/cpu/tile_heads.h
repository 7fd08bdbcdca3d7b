// Rows of a head to tiles and back, for attention on tiles (tile_attention.h, tile_attention_backward.h). Numbers are cut
// into parts as in tile_operands.h; `step` is 32 elements along what is summed over, and what is not there is zero. A
// packer returns false (or words that are not zero) where there is an infinity or NaN, which is not checked for bfloat16.
#pragma once
#include "csrc/cpu/attention.h"
#include "csrc/cpu/tile_blocks.h"

namespace rk::cpu::RK_CPU_ISA {

template <class T>
struct HeadRows {
    const T* data;
    int64_t stride, count, columns;

    RK_INLINE const T* at(int64_t row, int64_t column = 0) const { return data + row * stride + column; }
    // At most `most` rows from `first` on.
    RK_INLINE HeadRows some(int64_t first, int64_t most) const {
        return {at(first), stride, max64(0, min64(count - first, most)), columns};
    }
    // Asks the memory for rows that will be read.
    void ask(int64_t first, int64_t most) const {
        for (int64_t r = first; r < min64(first + most, count); ++r) ask_row(at(r), columns);
    }
    static void ask_row(const T* row, int64_t columns) {
        for (int64_t i = 0; i < columns; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + i);
    }
};

template <class T>
inline HeadRows<T> head_rows(const HeadsView& view, int64_t first, int64_t count, int64_t head,
                             int64_t head_dim) {
    return {static_cast<const T*>(view.data) + first * view.token_stride + head * view.head_stride,
            view.token_stride, count, head_dim};
}

// The keys of a sequence that may be seen.
struct SeenKeys {
    int32_t* index = nullptr;  // a key's place in its sequence
    int64_t begin = 0, length = 0, count = 0;

    void find(const AttentionArgs& a, int64_t sequence) {
        begin = a.cu_seqlens_k[sequence], length = a.cu_seqlens_k[sequence + 1] - begin, count = 0;
        for (int64_t j = 0; j < length; ++j)
            if (a.key_mask == nullptr || a.key_mask[begin + j]) index[count++] = int32_t(j);
    }
    // How many of the first a query may see under `j <= last`.
    int64_t visible(int64_t last) const {
        int64_t n = count;
        while (n > 0 && index[n - 1] > last) --n;
        return n;
    }
    // Their rows, one after the other; in `room` if others lie between.
    template <class T>
    HeadRows<T> rows(const HeadsView& view, int64_t head, int64_t head_dim, T* room) const {
        const HeadRows<T> all = head_rows<T>(view, begin, length, head, head_dim);
        if (count == length) return all;
        for (int64_t j = 0; j < count; ++j)
            __builtin_memcpy(room + j * head_dim, all.at(index[j]), size_t(head_dim) * sizeof(T));
        return {room, head_dim, count, head_dim};
    }
};

// Some rows (up to 16) of one step of 32 elements, parts part_bytes apart.
template <int kParts, class T>
inline vu32 split_rows(const T* from, int64_t stride, int64_t rows, int64_t left, char* to,
                       int64_t part_bytes) {
    vu32 largest{};
    for (int64_t r = 0; r < rows; ++r)
        largest =
            larger(largest, split_step<kParts>(from + r * stride, left, to + r * kTileRowBytes, part_bytes));
    if (has_special(largest))
        for (int64_t r = 0; r < rows; ++r)
            if (split_special_step<kParts>(from + r * stride, left, to + r * kTileRowBytes, part_bytes))
                return set1(~uint32_t{0});
    return vu32{};
}

// to[column][row] of up to 16 rows and columns.
template <class T>
RK_INLINE void turn(const T* from, int64_t stride, int64_t rows, int64_t columns, float* to,
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

// 16 rows of a left operand, summed over columns, in strips of 32 rows: [part][step][2 tiles][16 rows][32].
template <int kParts, class T>
inline vu32 pack_rows(const HeadRows<T>& from, int64_t first, char* strips) {
    const int64_t steps = ceil_div(from.columns, kStepElements), part_bytes = steps * kPairBytes;
    const int64_t rows = min64(kTileSide, from.count - first);
    vu32 found{};
    char* to = strips + first / kGroup32 * kParts * part_bytes + first % kGroup32 / kTileSide * kTileBytes;
    for (int64_t step = 0; step < steps; ++step, to += kPairBytes) {
        if (rows < kTileSide)
            for (int part = 0; part < kParts; ++part) __builtin_memset(to + part * part_bytes, 0, kTileBytes);
        found |= split_rows<kParts>(from.at(first, step * kStepElements), from.stride, rows,
                                    from.columns - step * kStepElements, to, part_bytes);
    }
    return found;
}

// Columns of a left operand, summed over rows, in strips of 32 columns: [part][step of rows][2 tiles][16 columns][32].
template <int kParts, class T>
inline bool pack_columns(const HeadRows<T>& from, char* strips) {
    const int64_t steps = ceil_div(from.count, kGroup32), part_bytes = steps * kPairBytes;
    if constexpr (sizeof(T) == 2) {  // pairs are turned as words
        for (int64_t column = 0; column < from.columns; column += kGroup32)
            pack_strip_across<1>(from.at(0, column), int(min64(kGroup32, from.columns - column)), from.stride,
                                 from.count, steps, strips + column / kGroup32 * part_bytes, nullptr);
        return true;
    }
    vu32 found{};
    for (int64_t column = 0; column < round_up(from.columns, kGroup32); column += kTileSide) {
        char* to =
            strips + column / kGroup32 * kParts * part_bytes + column % kGroup32 / kTileSide * kTileBytes;
        for (int64_t row = 0; row < from.count; row += kGroup32, to += kPairBytes) {
            alignas(64) float turned[kTileSide * kGroup32];
            for (int half = 0; half < kGroup32; half += kTileSide)
                turn(from.at(row + half, column), from.stride, from.count - row - half, from.columns - column,
                     turned + half, kGroup32);
            found |= split_rows<kParts>(turned, kGroup32, kTileSide, kGroup32, to, part_bytes);
        }
    }
    return !any((vi32)found);
}

// Up to 16 rows of a right operand, summed over columns: one of the two tiles of a panel of 32 rows,
// [part][step][2 tiles][16 pairs of columns][16 rows][2].
template <int kParts, class T>
inline bool pack_rows_turned(const HeadRows<T>& from, char* to) {
    const int64_t steps = ceil_div(from.columns, kStepElements), part_bytes = steps * kPairBytes;
    bool finite = true;
    for (int64_t column = 0; column < from.columns; column += kStepElements, to += kPairBytes) {
        const int64_t left = from.columns - column;
        if constexpr (sizeof(T) == 2) {
            alignas(64) char rows[kTileBytes] = {};
            split_rows<1>(from.at(0, column), from.stride, min64(kTileSide, from.count), left, rows, 0);
            transpose_tile(rows, to);
            continue;
        }
        alignas(64) float turned[kStepElements * kTileSide];
        for (int half = 0; half < kStepElements; half += kTileSide)
            turn(from.at(0, column + half), from.stride, from.count, left - half, turned + half * kTileSide,
                 kTileSide);
        interleave_step<kParts>(turned, kTileSide, kTileSide, kStepElements, to, kTileRowBytes, part_bytes,
                                [&](int) { finite = false; });
    }
    return finite;
}

// block = (or, with `add`, +=) the products of a strip and a panel: small ones first, then the large one, in one set of sums.
template <int kParts, int kHalves>
inline void multiply_steps(const StepsOf& of, float* block, bool add) {
    WriteAhead none;
    zero_sums<kHalves>();
    if constexpr (kParts > 1) multiply_small<kParts, kHalves>(of, &none, 0);
    multiply_large<kHalves>(of.w, of.x, of.steps);
    add ? add_sums<kHalves>(block) : store_sums<kHalves>(block);
}

// to[row][column] = from[column][row] factor[row] of up to 16 rows; from: [columns in whole steps][16].
template <class T>
inline void store_turned(const float* from, const float* factor, int64_t rows, int64_t columns, T* to,
                         int64_t stride) {
    for (int64_t column = 0; column < columns; column += kLanes)
        for (int v = 0; v < rows; v += kLanes) {
            const vf32 scale = load(factor + v);
            vf32 square[kLanes];
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) square[i] = load(from + (column + i) * kTileSide + v) * scale;
            transpose(square);
            for (int i = 0; i < min64(kLanes, rows - v); ++i)
                store_some(to + (v + i) * stride + column, square[i], int(columns - column));
        }
}

}  // namespace rk::cpu::RK_CPU_ISA
