"""Padded batches and unpadded tokens, and which rows form a sequence.

A padded batch `[B, S]` has two layouts here. *Unpadded*: only the rows that are computed, `[T]`, one sequence after
another; what it costs follows the data, so that it needs to read the mask on the host. *Padded*: all `B * S` rows; its
shapes do not depend on the data, which tracing needs. In both a key mask says which rows may be seen.

Which padded rows are computed in the unpadded layout: none but position 0, which poolers and classifiers read; or,
where all padded rows of a sequence are the same row, the first of them, which then stands for all. Neither is ever a
key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """Which rows belong to which sequence: what attention needs to know.

    cu_seqlens: int32 `[B + 1]`. max_seqlen: an upper bound of the lengths. key_mask: bool `[rows]`, True for rows
    that may be seen, or None for all. causal: a row sees itself and the rows before it only. bias: `[heads, length,
    length]`, added to the scores of all layers, or None: the rows of a sequence are then its positions from 0 on.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    key_mask: Tensor | None
    causal: bool
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Unpadding:
    """A padded batch `[batch, length]` and the rows of it that are computed; indices None: all of them.

    stand_ins: of each sequence, the computed row that stands in for its padded rows; None: zeros do.
    """

    batch: int
    length: int
    indices: Tensor | None  # int64 [T], ascending, into the flattened batch
    sequences: Sequences
    stand_ins: Tensor | None = None  # int64 [batch], into the computed rows

    def unpad(self, padded: Tensor) -> Tensor:
        """`[batch, length, ...]` -> `[T, ...]`."""
        rows = padded.reshape(self.batch * self.length, *padded.shape[2:])
        return rows if self.indices is None else rows.index_select(0, self.indices)

    def pad(self, unpadded: Tensor) -> Tensor:
        """`[T, H]` -> `[batch, length, H]`."""
        rows = unpadded
        if self.indices is not None:
            hidden = unpadded.shape[1]
            if self.stand_ins is None:
                around = unpadded.new_zeros(self.batch * self.length, hidden)
            else:  # its backward sums over a sequence in a fixed order, which a gather of repeated rows would not
                own = unpadded.index_select(0, self.stand_ins)[:, None]
                around = own.expand(self.batch, self.length, hidden).reshape(-1, hidden).contiguous()
            rows = around.index_copy_(0, self.indices, unpadded)
        return rows.view(self.batch, self.length, -1)


def equal_lengths(batch: int, length: int, device: torch.device) -> Tensor:
    """cu_seqlens of `batch` sequences of `length` rows each."""
    return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)


def padded_sequences(batch: int, length: int, mask: Tensor | None, device: torch.device, causal: bool) -> Sequences:
    """The padded layout. mask: `[batch, length]`, nonzero for real tokens, or None for all real."""
    key_mask = None if mask is None else mask.reshape(-1).to(torch.bool)
    return Sequences(equal_lengths(batch, length, device), length, key_mask, causal)


def all_rows(batch: int, length: int, device: torch.device, causal: bool) -> Unpadding:
    """The unpadded layout of a batch that has no padding."""
    return Unpadding(batch, length, None, padded_sequences(batch, length, None, device, causal))


@dataclass(frozen=True, slots=True, eq=False)
class Padding:
    """A batch that has padding, as `look` found it.

    real: bool `[batch, length]`. counts: int64 `[batch]`, real tokens of each sequence, and lengths the same on the
    host; starts: whether its first row is one, on the host. first: int64 `[batch, 1]`, the first padded position of
    each sequence, 0 where there is none. answers: to the questions that were asked, on the host.
    """

    real: Tensor
    counts: Tensor
    lengths: list[int]
    starts: list[int]
    first: Tensor
    answers: dict[str, bool]

    @property
    def rows(self) -> int:
        return self.real.numel()

    @property
    def padded(self) -> int:
        return self.rows - sum(self.lengths)

    def blind(self, causal: bool) -> bool:
        """Whether some row has no key to see."""
        return not all(self.lengths) or (causal and not all(self.starts))

    def real_rows(self, causal: bool) -> Unpadding:
        """The layout of the real rows, and of position 0; zeros come back at all others."""
        kept, counts = self.real, self.counts
        if not all(self.starts):
            kept = kept.clone()
            kept[:, 0].fill_(True)
            counts = kept.sum(1)
        lengths = [n if starts else n + 1 for n, starts in zip(self.lengths, self.starts, strict=True)]
        return self._layout(kept, counts, lengths, causal)

    def one_row(self, causal: bool) -> Unpadding:
        """The layout of the real rows, and of one padded row of each sequence that has any, which stands for all."""
        kept = self.real.scatter(1, self.first, True)
        lengths = [min(n + 1, self.real.shape[1]) for n in self.lengths]
        return self._layout(kept, kept.sum(1), lengths, causal, stand_ins=True)

    def _layout(
        self, kept: Tensor, counts: Tensor, lengths: list[int], causal: bool, stand_ins: bool = False
    ) -> Unpadding:
        """counts: lengths, where the mask is: what is copied there from the host would wait for the device."""
        batch, length = kept.shape
        total = sum(lengths)
        cu_seqlens = counts.new_zeros(batch + 1, dtype=torch.int32)
        torch.cumsum(counts, 0, dtype=torch.int32, out=cu_seqlens[1:])
        indices = torch.nonzero_static(kept.reshape(-1), size=total).squeeze(1)
        seen = None if total == sum(self.lengths) else self.real.reshape(-1).index_select(0, indices)
        # All rows before the first padded one are kept.
        own = cu_seqlens[:-1] + self.first[:, 0] if stand_ins else None
        return Unpadding(batch, length, indices, Sequences(cu_seqlens, max(lengths), seen, causal), own)


# Of real and first, as Padding has them, makes bool tensors of no dimension, by name.
Questions = Callable[[Tensor, Tensor], dict[str, Tensor]]


def other_ids(value: int, ids: Tensor, real: Tensor) -> Tensor:
    """Whether some padded position of ids `[batch, length]` has another id."""
    return (ids.ne(value) > real).any()  # of two booleans, "and not"


def differences(per_row: dict[str, Tensor], causal: bool, real: Tensor, first: Tensor) -> dict[str, Tensor]:
    """Of each tensor `[batch, length]`, whether it is not the same at all padded positions of a sequence; and, as
    "keys", whether these do not see the same ones."""
    padded = ~real
    found = {name: ((tensor != tensor.gather(1, first)) & padded).any() for name, tensor in per_row.items()}
    if causal:
        found["keys"] = (padded[:, :-1] & real[:, 1:]).any()
    return found


def padding_before(real: Tensor) -> Tensor:
    """Whether padding stands before a real token, so that unpadded rows do not keep their positions."""
    return (~real[:, :-1] & real[:, 1:]).any()


def read(tensor: Tensor) -> list[int]:
    """What a tensor holds. On a GPU the host waits for it: nothing else in a forward does."""
    return tensor.tolist()


def ask(answers: dict[str, Tensor]) -> dict[str, bool]:
    """One read of bool tensors of no dimension."""
    return dict(zip(answers, map(bool, read(torch.stack(list(answers.values())))), strict=True)) if answers else {}


def look(mask: Tensor, questions: Questions | None = None) -> Padding | None:
    """What a mask `[batch, length]`, nonzero for real tokens, says, and the answers to questions that a batch with
    padding raises; None where all are real. One read in all."""
    real = mask.to(torch.bool)
    batch = len(real)
    counts, first = real.sum(1), real.view(torch.uint8).argmin(1, keepdim=True)
    asked = {} if questions is None else questions(real, first)
    found = read(torch.cat([counts, real[:, 0], *(answer.view(1) for answer in asked.values())]))
    lengths, starts, answers = found[:batch], found[batch : 2 * batch], found[2 * batch :]
    if sum(lengths) == real.numel():
        return None
    return Padding(real, counts, lengths, starts, first, dict(zip(asked, map(bool, answers), strict=True)))
