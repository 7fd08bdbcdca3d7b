"""Dropout masks from Philox-4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011), never
stored.

The mask is a function of (seed, row, column, plane) alone, so backward draws again what forward drew, whatever the
tiling:

    key = (low word of seed, high word of seed), counter = (column // 4, row, plane, 0), word = column % 4 of the four
    keep when word >= floor(p * 2**32), unsigned

One counter is for four adjacent columns: a tile of `[rows, columns]` costs rows * columns / 4 Philox evaluations,
whose four words are compared at once and laid side by side as booleans. The first round only sees one coordinate a
side, so broadcasting leaves it at `[1, columns / 4]` and `[rows, 1]`.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl


def threshold(dropout_p: float) -> int:
    """floor(p * 2**32): words below it are dropped."""
    return math.floor(dropout_p * 2.0**32)


def keep_scale(dropout_p: float) -> float:
    """1 / (1 - p): what kept elements are multiplied by, in float32."""
    return 1.0 / (1.0 - dropout_p)


@triton.jit
def keep_mask(
    seed,  # int64
    rows,  # [R] int32
    first_column,  # int32, a multiple of 4
    plane,  # int32
    dropout_threshold,  # uint32
    COLUMNS: tl.constexpr,  # a multiple of 4
):
    """bool `[R, COLUMNS]`: which elements of columns first_column, first_column + 1, ... dropout keeps."""
    R: tl.constexpr = rows.shape[0]
    limit = dropout_threshold.to(tl.uint32)
    groups = first_column // 4 + tl.arange(0, COLUMNS // 4)
    w0, w1, w2, w3 = tl.philox(seed, groups[None, :], rows[:, None], plane, 0)
    even = tl.join(w0 >= limit, w2 >= limit)
    odd = tl.join(w1 >= limit, w3 >= limit)
    return tl.reshape(tl.join(even, odd), [R, COLUMNS])


@triton.jit
def keep_mask_transposed(
    seed,  # int64
    rows,  # [R] int32
    first_column,  # int32, a multiple of 4
    plane,  # int32
    dropout_threshold,  # uint32
    COLUMNS: tl.constexpr,  # a multiple of 4
):
    """bool `[COLUMNS, R]`: keep_mask with the columns down the tile, as a tile of transposed scores needs it."""
    R: tl.constexpr = rows.shape[0]
    limit = dropout_threshold.to(tl.uint32)
    groups = first_column // 4 + tl.arange(0, COLUMNS // 4)
    w0, w1, w2, w3 = tl.philox(seed, groups[:, None], rows[None, :], plane, 0)
    even = tl.join(w0 >= limit, w2 >= limit)
    odd = tl.join(w1 >= limit, w3 >= limit)
    return tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 3, 1)), [COLUMNS, R])
