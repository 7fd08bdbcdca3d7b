"""The quantised weights of one layer, and how they notice that the weights are no longer what was copied.

A copy is in the order in which a kernel of one instruction set reads it. The module's own parameters stay what they
were: what is saved, trained and copied.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from roberta_kernels.encoder_call import LayerTensors
from roberta_kernels.quantized.offloading import Offloaded

# patch's `quantization`, and the kinds that the op pack_weight knows.
QUANTIZATIONS = ("bfloat16", "int8", "int8-dynamic")
# In so many calls all bytes of the weights are looked at, a part in each: an edit that torch does not count (through
# `.data`, a numpy view, another process) is seen after that many at the latest. A call reads a quarter of the weights'
# bytes at least, so that a part costs about a hundredth of it.
CALLS_UNTIL_SEEN = 512


def with_copies(tensors: LayerTensors, copies: Sequence[Tensor]) -> list[Tensor]:
    """What the op packed_encoder takes of a layer. copies: of query, key and value together, and of the other three."""
    qkv, attention, inner, output = copies
    return [
        *(qkv, tensors.query_bias, tensors.key_bias, tensors.value_bias),
        *(attention, tensors.attention_bias, tensors.attention_norm_weight, tensors.attention_norm_bias),
        *(inner, tensors.inner_bias),
        *(output, tensors.output_bias, tensors.output_norm_weight, tensors.output_norm_bias),
    ]


class Counted(NamedTuple):
    """All that torch says of a change of weights: where they lie, and how often they were written to."""

    pointers: list[int]
    versions: list[int]


def counted(weights: Sequence[Tensor]) -> Counted:
    return Counted([weight.data_ptr() for weight in weights], [weight._version for weight in weights])


def checksums(weights: Sequence[Tensor], in_file: list[int], first: list[int], count: int = 1) -> Tensor:
    """Of `count` parts of each weight, from its part `first` on: int64 `[weights, count]`. in_file: nonzero for what
    was moved out of memory, of which only pages that were written to since are read."""
    op = torch.ops.roberta_kernels_cpu.checksum_weights.default
    return op(list(weights), in_file, first, count, CALLS_UNTIL_SEEN)


class LayerCopies:
    """The quantised weights of one layer.

    copies: of query, key and value together, and of the other three; None where there are none. was: what torch
    counted of the weights when they were copied. sums: their checksums, int64 `[weights, parts]`. in_file: of each
    weight, whether it was moved out of memory.
    """

    def __init__(self) -> None:
        self.offloaded = Offloaded()
        self.copies: list[Tensor] | None = None
        self.was = Counted([], [])
        self.sums = torch.empty(0)
        self.in_file: list[int] = []
        self._parts = itertools.count()
        self._lost = False  # copies became useless, and weights that change once may change in every call
        self._seen: tuple[Any, ...] | None = None  # since then, in the last call

    def next_part(self) -> int:
        """Which part of the weights is to be looked at in this call."""
        return next(self._parts) % CALLS_UNTIL_SEEN

    def current(self, weights: Sequence[Tensor], kind: str, isa: str) -> bool:
        """Whether there are copies of these weights, of this kind, and torch counted no change since. Where it did,
        they are lost."""
        if self.copies is None:
            return False
        if not all(map(is_, weights, self._weights)) or counted(weights) != self.was:
            self.lose()
            return False
        return (self._kind, self._isa) == (kind, isa)

    def ready(self, weights: Sequence[Tensor]) -> bool:
        """Whether to make copies in this call: after some were lost only when the weights are what they were in the
        call before. Else weights that change before every call would be copied for one use each."""
        if not self._lost:
            return True
        sums = checksums(weights, [0] * len(weights), [0] * len(weights)).flatten().tolist()
        now = (*map(id, weights), *counted(weights), sums)
        same, self._seen = now == self._seen, now
        return same

    def make(self, weights: Sequence[Tensor], kind: str, isa: str, offload: bool) -> bool:
        """Copies weights that are plain, contiguous float32 tensors on the CPU. False: another thread wrote to them
        meanwhile, and there are no copies.

        offload: move each out of memory.
        """
        pack = torch.ops.roberta_kernels_cpu.pack_weight.default
        self.copies = None  # the old copies go before the new ones come
        if offload:
            self.offloaded.move(weights)
        # What is kept is what the weights were like before they were copied: a change since then will show.
        self._weights, self._kind, self._isa, self.was = tuple(weights), kind, isa, counted(weights)
        self.in_file = [int(weight in self.offloaded) for weight in weights]
        self.sums = checksums(weights, self.in_file, [0] * len(weights), CALLS_UNTIL_SEEN)
        query, key, value, *others = (weight.detach() for weight in weights)
        copies = [pack(torch.cat([query, key, value]), kind), *(pack(weight, kind) for weight in others)]
        self.offloaded.page_out()
        if counted(weights) != self.was:
            self.lose()
            return False
        self.copies, self._lost, self._seen = copies, False, None
        return True

    def lose(self) -> bool:
        """Frees the copies, as the weights changed or are about to, and says whether there were any. Weights that were
        moved out of memory stay there."""
        had = self.copies is not None
        self.copies, self._seen = None, None
        self._lost = self._lost or had
        return had

    def refresh(self) -> None:
        """Frees the copies, so that the next call makes new ones."""
        self.lose()
        self._lost = False

    def bring_back(self) -> None:
        """Frees the copies, and brings weights back into memory."""
        self.refresh()
        with torch.inference_mode(False), torch.no_grad():
            self.offloaded.bring_back()


def trim() -> None:
    """Hands memory that was freed back to the system: glibc keeps what lies below something that is still in use."""
    if (release := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        release(0)
