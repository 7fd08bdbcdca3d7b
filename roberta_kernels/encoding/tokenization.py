"""Texts to token ids: windows of texts, tokenized as the tokenizer does it with each text by itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from roberta_kernels.encoding.sources import Bad, EncodingError, Row, Source

WINDOW = 8192  # texts
WINDOW_CHARACTERS = 16 << 20  # a window of long texts ends earlier

_TOKENIZED_TEXTS, _TOKENIZED_CHARACTERS = 256, 1 << 20  # at once: what a tokenizer returns is far larger than the ids


@dataclass(frozen=True, eq=False)
class Window:
    """ids: of each row, int32; empty for a bad one. lengths: of those. bad: (row in the window, reason)."""

    ids: list[np.ndarray]
    lengths: np.ndarray
    bad: list[tuple[int, str]]
    truncated: int


def windows(source: Source, start: int, texts: int) -> Iterator[list[Row]]:
    window: list[Row] = []
    characters = 0
    for row in source.read(start):
        window.append(row)
        characters += len(row) if isinstance(row, str) else 0
        if len(window) == texts or characters >= WINDOW_CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window


class Tokens:
    """Texts to token ids, as the tokenizer gives them one by one."""

    def __init__(self, tokenizer: Any, longest: int, config: Any) -> None:
        self.tokenizer, self.longest = tokenizer, longest
        self._vocabulary = getattr(config, "vocab_size", None)
        pads = (getattr(config, "pad_token_id", None), getattr(tokenizer, "pad_token_id", None), 0)
        self.pad: int = next(pad for pad in pads if pad is not None)

    def window(self, rows: list[Row]) -> Window:
        nothing = np.empty(0, np.int32)
        ids = [nothing] * len(rows)
        bad = [(i, row.reason) for i, row in enumerate(rows) if isinstance(row, Bad)]
        truncated = 0
        for chunk in _chunks([(i, row) for i, row in enumerate(rows) if isinstance(row, str)]):
            # One token more than the model takes tells the texts that are too long from those that just fit.
            found = self._ids([text for _, text in chunk], self.longest + 1)
            over = [j for j, row in enumerate(found) if len(row) > self.longest]
            for j, cut in zip(over, self._ids([chunk[j][1] for j in over], self.longest), strict=True):
                found[j] = cut
            for j, ((i, _), row) in enumerate(zip(chunk, found, strict=True)):
                if 0 < len(row) <= self.longest:
                    ids[i] = np.array(row, np.int32)
                    truncated += j in over
                elif len(row) == 0:
                    bad.append((i, "no tokens"))
                else:
                    bad.append((i, f"{len(row)} tokens, at most {self.longest}: the tokenizer does not truncate it"))
        lengths = np.array([len(row) for row in ids])
        highest = max((int(row.max()) for row in ids if len(row)), default=0)
        if self._vocabulary is not None and highest >= self._vocabulary:
            raise EncodingError(
                f"the tokenizer is not this model's: it gives token {highest}, and the model knows {self._vocabulary}"
            )
        return Window(ids, lengths, sorted(bad), truncated)

    def _ids(self, texts: list[str], longest: int) -> list[list[int]]:
        if not texts:
            return []
        found = self.tokenizer(
            texts, truncation=True, max_length=longest, return_attention_mask=False, return_token_type_ids=False
        )
        return found["input_ids"]


def _chunks(texts: list[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    rest = iter(texts)
    while chunk := list(itertools.islice(rest, 1)):
        characters = len(chunk[0][1])
        while characters < _TOKENIZED_CHARACTERS and len(chunk) < _TOKENIZED_TEXTS:
            following = next(rest, None)
            if following is None:
                break
            chunk.append(following)
            characters += len(following[1])
        yield chunk
