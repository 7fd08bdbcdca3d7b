"""One op call through some layers, on quantised copies that are made again when the weights change."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from roberta_kernels import backends
from roberta_kernels.encoder_call import LayerSettings, LayerTensors, run_encoder
from roberta_kernels.quantized.copies import LayerCopies, sample_hash, trim, with_copies
from roberta_kernels.unpadding import Sequences

_making = threading.Lock()  # two threads that find no copies shall not both copy, nor move a weight twice


class _Made(NamedTuple):
    """What was copied, and what the weights were like: replaced as a whole, so that threads see all or nothing."""

    isa: str
    tensors: list[Tensor]
    pointers: list[int]
    versions: list[int]
    samples: list[Tensor]
    sampled: int


class QuantizedCall:
    """A call through `layers`, each the place of its copies and its tensors."""

    def __init__(
        self,
        layers: Sequence[tuple[LayerCopies, LayerTensors]],
        settings: LayerSettings,
        kind: str,
        offload: bool,
    ) -> None:
        self._layers, self._settings, self._kind, self._offload = layers, settings, kind, offload
        self._weights = [weight for _, tensors in layers for weight in tensors.weights()]
        self._made: _Made | None = None
        self.layer_count = len(layers)

    def run(self, hidden_states: Tensor, sequences: Sequences) -> Tensor:
        """`[..., H]` float32 -> `[..., H]`, through all layers."""
        isa = backends.cpu_isa()
        made = self._made
        if made is None or not self._holds(made, isa):
            made = self._copy(isa)
        op = torch.ops.roberta_kernels_cpu.packed_encoder.default
        return run_encoder(op, made.tensors, self._settings, hidden_states, sequences)

    def _holds(self, made: _Made, isa: str) -> bool:
        """Whether the weights are those that were copied: flat lists, as this runs in every call."""
        return (
            made.isa == isa
            and [weight.data_ptr() for weight in self._weights] == made.pointers
            and [weight._version for weight in self._weights] == made.versions
            and sample_hash(made.samples) == made.sampled
        )

    def _copy(self, isa: str) -> _Made:
        with _making, torch.inference_mode(False), torch.no_grad():
            if self._made is not None and self._holds(self._made, isa):
                return self._made  # another thread did it
            self._made, fresh = None, False
            for copies, tensors in self._layers:
                weights = tensors.weights()
                if not copies.current(weights, self._kind, isa):
                    copies.make(weights, self._kind, isa, self._offload)
                    fresh = True
            if fresh:
                trim()
            samples = [sample for copies, _ in self._layers for sample in copies.samples]
            self._made = _Made(
                isa,
                [tensor for copies, tensors in self._layers for tensor in with_copies(tensors, copies.copies or ())],
                [weight.data_ptr() for weight in self._weights],
                [weight._version for weight in self._weights],
                samples,
                sample_hash(samples),
            )
            return self._made
