"""Padded batches and unpadded tokens, and which rows form a sequence.

A padded batch `[B, S]` has two layouts here. *Unpadded*: only the real tokens, `[T]`, one sequence after another; what
it costs follows the data, so that it needs to read the mask on the host. *Padded*: all `B * S` rows, with a key mask;
its shapes do not depend on the data, which tracing needs.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """A padded batch `[batch, length]` and the rows of it that are kept; indices None: all of them."""

    batch: int
    length: int
    indices: Tensor | None  # int64 [T], ascending, into the flattened batch
    sequences: Sequences

    def unpad(self, padded: Tensor) -> Tensor:
        """`[batch, length, ...]` -> `[T, ...]`."""
        rows = padded.reshape(self.batch * self.length, *padded.shape[2:])
        return rows if self.indices is None else rows.index_select(0, self.indices)

    def pad(self, unpadded: Tensor) -> Tensor:
        """`[T, H]` -> `[batch, length, H]`, zeros where nothing was kept."""
        rows = unpadded
        if self.indices is not None:
            zeros = unpadded.new_zeros(self.batch * self.length, unpadded.shape[1])
            rows = zeros.index_copy(0, self.indices, unpadded)
        return rows.view(self.batch, self.length, -1)


def equal_lengths(batch: int, length: int, device: torch.device) -> Tensor:
    """cu_seqlens of `batch` sequences of `length` rows each."""
    return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)


def padded_sequences(batch: int, length: int, mask: Tensor | None, device: torch.device, causal: bool) -> Sequences:
    """The padded layout. mask: `[batch, length]`, nonzero for real tokens, or None for all real."""
    key_mask = None if mask is None else mask.reshape(-1).to(torch.bool)
    return Sequences(equal_lengths(batch, length, device), length, key_mask, causal)


def unpadding(mask: Tensor | None, batch: int, length: int, device: torch.device, causal: bool) -> Unpadding | None:
    """The unpadded layout, or None where unpadding would lose a row that is read.

    mask: `[batch, length]`, nonzero for real tokens, holes allowed; None: all real. One read of the mask on the host.

    None comes back when some sequence does not start with a real token: poolers and classifiers read position 0 of
    each sequence, so that row must be computed even where it is padding (left padding; a sequence of padding only).
    """
    if mask is None:
        return Unpadding(batch, length, None, padded_sequences(batch, length, None, device, causal))
    real = mask.to(torch.bool)
    lengths = real.sum(1, dtype=torch.int32)
    summary = torch.cat([lengths, real[:, :1].all().to(torch.int32).reshape(1)]).tolist()  # the one synchronisation
    starts_real = bool(summary.pop())
    if not starts_real:
        return None
    total = sum(summary)
    if total == batch * length:
        return Unpadding(batch, length, None, padded_sequences(batch, length, None, device, causal))
    cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=device)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=cu_seqlens[1:])
    indices = torch.nonzero_static(real.reshape(-1), size=total).squeeze(1)
    return Unpadding(batch, length, indices, Sequences(cu_seqlens, max(summary), None, causal))
