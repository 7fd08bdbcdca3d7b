"""A window's rows in batches of about equal numbers of tokens."""

from __future__ import annotations

import numpy as np

from roberta_kernels.encoding.state import Counts
from roberta_kernels.encoding.tokenization import Window

BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}

_PLAIN_BATCH = 32  # rows of the batches that padding is compared with


def batches_of(lengths: np.ndarray, budget: int, unpadded: bool) -> list[np.ndarray]:
    """The rows of each batch, longest first, so that what does not fit in memory fails at once; empty rows in none.

    A batch has at most `budget` tokens: real ones where the model leaves padding out (and then at most twice as many
    with padding, for the ids and the last hidden state are padded all the same), else padded ones. A longer row is
    alone.
    """
    order = np.argsort(-lengths, kind="stable")
    batches: list[np.ndarray] = []
    first = real = 0
    for last, row in enumerate(order):
        length = int(lengths[row])
        if length == 0:
            order = order[:last]
            break
        padded = (last - first + 1) * int(lengths[order[first]])
        full = (real + length > budget or padded > 2 * budget) if unpadded else padded > budget
        if full and last > first:
            batches.append(order[first:last])
            first, real = last, 0
        real += length
    if first < len(order):
        batches.append(order[first:])
    return batches


def counted(counts: Counts, window: Window, batches: list[np.ndarray], unpadded: bool) -> Counts:
    """`counts` and what a window adds to them."""

    def padding(rows: list[np.ndarray]) -> int:
        return sum(int((lengths.max() - lengths).sum()) for lengths in rows)

    real = window.lengths[window.lengths > 0]
    plain = [real[i : i + _PLAIN_BATCH] for i in range(0, len(real), _PLAIN_BATCH)]
    return counts.plus(
        tokens=int(real.sum()),
        padding=0 if unpadded else padding([window.lengths[rows] for rows in batches]),
        plain_padding=padding(plain),
        bad=len(window.bad),
        truncated=window.truncated,
    )
