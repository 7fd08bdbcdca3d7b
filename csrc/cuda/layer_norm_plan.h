// How the rows of add_layer_norm and embedding_layer_norm are spread over registers, warps and blocks. Plain
// C++: no CUDA, no torch.
//
// A row of up to 8192 columns (float32: 4096), a multiple of 16 bytes long, lies in the registers of one or
// more whole warps; how many depends on its length and dtype alone, so that a row comes out the same, bit for
// bit, whatever rows are beside it. Where one warp has a row (up to 1024 columns; float32: 768), its sums
// need no barrier, and warps that load and warps that compute overlap. Any other row is looped over by a
// block, element by element, and read again for each pass.
#pragma once
#include <stdint.h>

namespace rk::cuda {

// Warps that share a row, and columns for each of their threads. {0, 0}: the row is looped over.
struct RowLayout {
    int warps, elements;
};

// 24 elements a lane are 768 columns, RoBERTa-base; 32 are 1024, RoBERTa-large. Backward has to fit three
// sums for each of a thread's columns beside the row, which 32 of float32 do not.
constexpr int kLayouts = 5;
constexpr RowLayout kLayouts16Bit[kLayouts] = {{1, 16}, {1, 24}, {1, 32}, {4, 16}, {8, 32}};
constexpr RowLayout kLayouts32Bit[kLayouts] = {{1, 16}, {1, 24}, {2, 16}, {4, 16}, {8, 16}};
constexpr int kLoopWarps = 8;  // of a block that loops over a row

// vector: columns in 16 bytes, 8 or 4.
constexpr const RowLayout* row_layouts(int vector) {
    return vector == 8 ? kLayouts16Bit : kLayouts32Bit;
}

constexpr RowLayout row_layout(int64_t columns, int vector) {
    if (columns % vector == 0)
        for (int i = 0; i < kLayouts; ++i) {
            const RowLayout layout = row_layouts(vector)[i];
            if (columns <= int64_t{32} * layout.warps * layout.elements) return layout;
        }
    return {0, 0};
}

constexpr int warps_of(RowLayout layout) {
    return layout.warps == 0 ? kLoopWarps : layout.warps;
}

// The most rows that a block has in the making at a time. Forward: blocks of four warps, whose slots the
// hardware refills as they end.
constexpr int most_rows_forward(RowLayout layout) {
    return layout.warps == 1 ? 4 : 1;
}

// Backward: as many as the registers of a multiprocessor hold (a multiple of its four schedulers) beside the
// column sums, because each block leaves a row of partial sums. Twelve warps have 168 registers each, eight
// 255.
constexpr int most_rows_backward(RowLayout layout, int vector, bool dropout) {
    if (layout.warps != 1) return 1;
    return layout.elements == 16 || (layout.elements == 24 && vector == 8 && !dropout) ? 12 : 8;
}

// Blocks of backward that a multiprocessor has room for.
constexpr int blocks_backward(RowLayout layout) {
    return layout.warps == 2 ? 6 : layout.warps == 4 ? 3 : layout.warps == 0 ? 4 : 1;
}

struct RowGrid {
    int64_t blocks;
    int rows_per_block;  // at a time; a block then goes on to further rows
    int threads;         // of a block
};

constexpr int64_t kMostBlocks = 2147483647;

inline int64_t ceil_div(int64_t a, int64_t b) {
    return a / b + (a % b != 0);
}

// Few rows are spread over the multiprocessors before any of them gets a second one.
inline int rows_per_block(int64_t rows, int multiprocessors, int most) {
    const int64_t even = ceil_div(rows, multiprocessors);
    return even < 1 ? 1 : even < most ? static_cast<int>(even) : most;
}

// A block for every few rows.
inline RowGrid forward_grid(int64_t rows, RowLayout layout, int multiprocessors) {
    const int at_once = rows_per_block(rows, multiprocessors, most_rows_forward(layout));
    const int64_t blocks = ceil_div(rows, at_once);
    return {blocks < kMostBlocks ? blocks : kMostBlocks, at_once, 32 * warps_of(layout) * at_once};
}

// Blocks that stay, each of which leaves one row of partial sums.
inline RowGrid backward_grid(int64_t rows, RowLayout layout, int vector, bool dropout, int multiprocessors) {
    const int at_once = rows_per_block(rows, multiprocessors, most_rows_backward(layout, vector, dropout));
    const int64_t blocks = ceil_div(rows, at_once), room = int64_t{multiprocessors} * blocks_backward(layout);
    return {blocks < room ? blocks : room, at_once, 32 * warps_of(layout) * at_once};
}

}  // namespace rk::cuda
