"""The product with a vocabulary, a chunk of it at a time: what the ops share that never have all logits at once."""

from __future__ import annotations

from collections.abc import Iterator

import triton
from torch import Tensor

LOGITS_AT_ONCE = 1 << 25
_FEWEST_WORDS = 512


def chunks(x: Tensor, weight: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first word, weight's rows, room for the logits `[T, words or more]`) of each chunk of weight `[V, H]`, for rows
    x `[T, H]`. One buffer is for all; its rows begin at multiples of 128 elements.
    """
    rows, words = x.shape[0], weight.shape[0]
    fitting = max(_FEWEST_WORDS, LOGITS_AT_ONCE // rows // 128 * 128)
    room = x.new_empty((rows, triton.cdiv(min(fitting, words), 128) * 128))
    for first in range(0, words, fitting):
        yield first, weight[first : first + fitting], room
