"""The prepacked weights of one layer, and how they notice that the weights are no longer what was copied.

A copy is in the order in which a kernel of one instruction set reads it, in float32 or rounded to fewer bits. The
module's own parameters stay what they were: what is saved, trained and copied.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor

from roberta_kernels import backends
from roberta_kernels.prepacked.offloading import Offloaded

# patch's `quantization` -> the kind that the op pack_weight knows.
KINDS: dict[str | None, str] = {
    None: "float32",
    "bfloat16": "bfloat16",
    "int8": "int8",
    "int8-dynamic": "int8-dynamic",
}
QUANTIZATIONS = tuple(kind for kind in KINDS if kind is not None)

_WINDOW = 1024  # elements, a page


class LayerTensors(NamedTuple):
    """The parameters of a layer, in the order in which the encoder op takes them.

    Weights are `[N, K]` (K: input), everything else is `[N]`; H: hidden size, F: feed-forward size.
    """

    query_weight: Tensor  # [H, H], as the next two
    query_bias: Tensor
    key_weight: Tensor
    key_bias: Tensor
    value_weight: Tensor
    value_bias: Tensor
    attention_weight: Tensor  # [H, H]: attention.output.dense
    attention_bias: Tensor
    attention_norm_weight: Tensor
    attention_norm_bias: Tensor
    inner_weight: Tensor  # [F, H]: intermediate.dense
    inner_bias: Tensor
    output_weight: Tensor  # [H, F]: output.dense
    output_bias: Tensor
    output_norm_weight: Tensor
    output_norm_bias: Tensor

    def weights(self) -> tuple[Tensor, ...]:
        """Of the six products."""
        return (
            *(self.query_weight, self.key_weight, self.value_weight),
            *(self.attention_weight, self.inner_weight, self.output_weight),
        )

    def with_copies(self, copies: Sequence[Tensor]) -> list[Tensor]:
        """What packed_encoder takes of a layer. copies: of query, key and value together, and of the other three."""
        qkv, attention, inner, output = copies
        return [
            *(qkv, self.query_bias, self.key_bias, self.value_bias),
            *(attention, self.attention_bias, self.attention_norm_weight, self.attention_norm_bias),
            *(inner, self.inner_bias),
            *(output, self.output_bias, self.output_norm_weight, self.output_norm_bias),
        ]


def sample_hash(samples: list[Tensor]) -> int:
    """Of some elements: what shows edits through `.data`, which change nothing else."""
    return torch.ops.roberta_kernels_cpu.sample_weights.default(samples)


class LayerCopies:
    """The prepacked weights of one layer: of query, key and value together, and of the other three."""

    def __init__(self) -> None:
        self.offloaded = Offloaded()
        self.copies: list[Tensor] | None = None
        self.samples: list[Tensor] = []

    def current(self, weights: Sequence[Tensor], kind: str, isa: str) -> bool:
        """Whether these weights are the copied ones, unchanged since."""
        return (
            self.copies is not None
            and (self._kind, self._isa) == (kind, isa)
            and all(map(is_, weights, self._weights))
            and [weight.data_ptr() for weight in weights] == self._pointers
            and [weight._version for weight in weights] == self._versions
            and sample_hash(self.samples) == self._hash
        )

    def make(self, weights: Sequence[Tensor], kind: str, isa: str, offload: bool) -> None:
        """Copies weights that are plain, contiguous float32 tensors on the CPU.

        offload: move each out of memory once it is copied.
        """
        pack = torch.ops.roberta_kernels_cpu.pack_weight.default
        self.drop()  # the old copies go before the new ones come
        query, key, value, *others = (weight.detach() for weight in weights)
        copies = [pack(torch.cat([query, key, value]), kind), *(pack(weight, kind) for weight in others)]
        if offload:
            self.offloaded.move(weights)
        self._weights, self._kind, self._isa = tuple(weights), kind, isa
        self._pointers = [weight.data_ptr() for weight in weights]
        self._versions = [weight._version for weight in weights]
        self.samples = self._sampled(weights)
        self._hash = sample_hash(self.samples)
        self.copies = copies

    def _sampled(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """What to look at: where weights are out of memory, a few pages, as reading brings the others back."""
        samples: list[Tensor] = []
        for weight in weights:
            if weight in self.offloaded:
                flat = weight.detach().view(-1)
                samples += [flat[at : at + _WINDOW] for at in (0, len(flat) // 2, max(0, len(flat) - _WINDOW))]
            else:
                samples.append(weight)
        return samples

    def drop(self) -> bool:
        """Frees the copies, and says whether there were any. Weights that were moved out of memory stay there."""
        had = self.copies is not None
        self.copies, self.samples = None, []
        return had

    def bring_back(self) -> None:
        """Frees the copies, and brings weights back into memory."""
        self.drop()
        with torch.inference_mode(False), torch.no_grad():
            self.offloaded.bring_back()


def trim() -> None:
    """Hands memory that was freed back to the system: glibc keeps what lies below something that is still in use."""
    if (release := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        release(0)


@functools.cache
def unavailable() -> str | None:
    """Why no weights can be prepacked in this process, or None."""
    status = backends.available_backends()["cpu"]
    if not status:
        return status.detail
    return None if hasattr(torch.ops.roberta_kernels_cpu, "pack_weight") else "the compiled kernels are of an old build"
