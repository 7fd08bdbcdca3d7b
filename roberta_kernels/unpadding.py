"""Padded batches and unpadded tokens, and which rows form a sequence.

A padded batch `[B, S]` has two layouts here. *Unpadded*: only the rows that are computed, `[T]`, one sequence after
another; what it costs follows the data, so that it needs to read the mask on the host. *Padded*: all `B * S` rows; its
shapes do not depend on the data, which tracing needs. In both a key mask says which rows may be seen.

Which padded rows are computed in the unpadded layout: none but position 0, which poolers and classifiers read; or,
where all padded rows of a sequence are the same row, the first of them, which then stands for all. Neither is ever a
key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """Which rows belong to which sequence: what attention needs to know.

    cu_seqlens: int32 `[B + 1]`. max_seqlen: an upper bound of the lengths. key_mask: bool `[rows]`, True for rows
    that may be seen, or None for all. causal: a row sees itself and the rows before it only.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    key_mask: Tensor | None
    causal: bool


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

    real: bool `[batch, length]`. lengths: real tokens of each sequence, and starts: whether its first row is one, both
    on the host. first: int64 `[batch, 1]`, the first padded position of each sequence, 0 where there is none.
    """

    real: Tensor
    lengths: list[int]
    starts: list[int]
    first: Tensor

    @property
    def rows(self) -> int:
        return self.real.numel()

    @property
    def padded(self) -> int:
        return self.rows - sum(self.lengths)

    def blind(self, causal: bool) -> bool:
        """Whether some row has no key to see."""
        return not all(self.lengths) or (causal and not all(self.starts))

    def holds(self, value: int, ids: Tensor) -> bool:
        """Whether `value` is the id at all padded positions of ids `[batch, length]`. One read on the host."""
        return not bool((ids.ne(value) > self.real).any())  # of two booleans, "and not"

    def alike(self, per_row: Sequence[Tensor], causal: bool) -> list[bool]:
        """Of each tensor `[batch, length]`, whether it is the same at all padded positions of a sequence; and, last,
        whether these see the same keys. One read on the host."""
        padded = ~self.real
        differ = [((tensor != tensor.gather(1, self.first)) & padded).any() for tensor in per_row]
        if causal:
            differ.append((padded[:, :-1] & self.real[:, 1:]).any())
        found = torch.stack(differ).tolist() if differ else []
        return [not different for different in found] + ([] if causal else [True])

    def real_rows(self, causal: bool) -> Unpadding:
        """The layout of the real rows, and of position 0; zeros come back at all others."""
        kept = self.real
        if not all(self.starts):
            kept = kept.clone()
            kept[:, 0] = True
        lengths = [n if starts else n + 1 for n, starts in zip(self.lengths, self.starts, strict=True)]
        return self._layout(kept, lengths, causal)

    def one_row(self, causal: bool) -> Unpadding:
        """The layout of the real rows, and of one padded row of each sequence that has any, which stands for all."""
        kept = self.real.scatter(1, self.first, True)
        lengths = [min(n + 1, self.real.shape[1]) for n in self.lengths]
        return self._layout(kept, lengths, causal, stand_ins=True)

    def _layout(self, kept: Tensor, lengths: list[int], causal: bool, stand_ins: bool = False) -> Unpadding:
        batch, length = kept.shape
        total = sum(lengths)
        cu_seqlens = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=kept.device)
        indices = torch.nonzero_static(kept.reshape(-1), size=total).squeeze(1)
        seen = None if total == sum(self.lengths) else self.real.reshape(-1).index_select(0, indices)
        # All rows before the first padded one are kept.
        own = cu_seqlens[:-1] + self.first[:, 0] if stand_ins else None
        return Unpadding(batch, length, indices, Sequences(cu_seqlens, max(lengths), seen, causal), own)


def look(mask: Tensor) -> Padding | None:
    """What a mask `[batch, length]`, nonzero for real tokens, says, or None where all are real. One read of the mask on
    the host."""
    real = mask.to(torch.bool)
    lengths, starts = torch.stack([real.sum(1), real[:, 0]]).tolist()
    if sum(lengths) == real.numel():
        return None
    return Padding(real, lengths, starts, real.view(torch.uint8).argmin(1, keepdim=True))
