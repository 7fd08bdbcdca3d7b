"""The quantised weights of one layer, and how they notice that the weights are no longer what was copied.

A copy is in the order in which a kernel of one instruction set reads it. The module's own parameters stay what they
were: what is saved, trained and copied.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from operator import is_

import torch
from torch import Tensor

from roberta_kernels.encoder_call import LayerTensors
from roberta_kernels.quantized.offloading import Offloaded

# patch's `quantization`, and the kinds that the op pack_weight knows.
QUANTIZATIONS = ("bfloat16", "int8", "int8-dynamic")

_WINDOW = 1024  # elements, a page


def with_copies(tensors: LayerTensors, copies: Sequence[Tensor]) -> list[Tensor]:
    """What the op packed_encoder takes of a layer. copies: of query, key and value together, and of the other three."""
    qkv, attention, inner, output = copies
    return [
        *(qkv, tensors.query_bias, tensors.key_bias, tensors.value_bias),
        *(attention, tensors.attention_bias, tensors.attention_norm_weight, tensors.attention_norm_bias),
        *(inner, tensors.inner_bias),
        *(output, tensors.output_bias, tensors.output_norm_weight, tensors.output_norm_bias),
    ]


def sample_hash(samples: list[Tensor]) -> int:
    """Of some elements: what shows edits through `.data`, which change nothing else."""
    return torch.ops.roberta_kernels_cpu.sample_weights.default(samples)


class LayerCopies:
    """The quantised weights of one layer: of query, key and value together, and of the other three."""

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
