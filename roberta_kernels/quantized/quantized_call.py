"""One op call through some layers, on quantised copies that are made again when the weights change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor

from roberta_kernels import backends
from roberta_kernels.encoder_call import EncoderCall, LayerSettings, LayerTensors, run_encoder
from roberta_kernels.quantized.copies import Counted, LayerCopies, checksums, counted, trim, with_copies
from roberta_kernels.unpadding import Sequences

_WEIGHTS = 6  # of a layer
_making = threading.Lock()  # two threads that find no copies shall not both copy, nor move a weight twice


class _Made(NamedTuple):
    """What was copied, and what the weights were like: replaced as a whole, so that threads see all or nothing.

    of: the copies of each layer. was, sums and in_file: as LayerCopies', of all weights.
    """

    isa: str
    tensors: list[Tensor]
    of: list[list[Tensor]]
    was: Counted
    sums: Tensor
    in_file: list[int]


class QuantizedCall:
    """A call through `layers`, each the place of its copies and its tensors.

    not_used: called where a call runs on the parameters themselves, as the weights are not settled.
    """

    def __init__(
        self,
        layers: Sequence[tuple[LayerCopies, LayerTensors]],
        settings: LayerSettings,
        kind: str,
        offload: bool,
        not_used: Callable[[], None],
    ) -> None:
        self._layers, self._settings, self._kind, self._offload = layers, settings, kind, offload
        self._weights = [weight for _, tensors in layers for weight in tensors.weights()]
        self._made: _Made | None = None
        self._in_place = EncoderCall([tensors for _, tensors in layers], settings)
        self._not_used = not_used
        self.layer_count = len(layers)

    def run(self, hidden_states: Tensor, sequences: Sequences) -> Tensor:
        """`[..., H]` float32 -> `[..., H]`, through all layers."""
        isa = backends.cpu_isa()
        made = self._made
        if made is None or not self._holds(made, isa):
            made = self._copy(isa)
        if made is not None and not self._part_holds(made):
            made = self._copy(isa)
        if made is None:
            self._not_used()
            return self._in_place.run(hidden_states, sequences)
        op = torch.ops.roberta_kernels_cpu.packed_encoder.default
        return run_encoder(op, made.tensors, self._settings, hidden_states, sequences)

    def _holds(self, made: _Made, isa: str) -> bool:
        """Whether the weights are those that were copied, as far as torch counts: flat lists, as this runs in every
        call."""
        return (
            made.isa == isa
            and counted(self._weights) == made.was
            and all(map(is_, [copies.copies for copies, _ in self._layers], made.of))
        )

    def _part_holds(self, made: _Made) -> bool:
        """Whether the next part of each weight is what it was. A layer of which it is not loses its copies."""
        parts = [part for copies, _ in self._layers for part in [copies.next_part()] * _WEIGHTS]
        found = checksums(self._weights, made.in_file, parts)
        expected = made.sums.gather(1, torch.tensor(parts).unsqueeze(1))
        if torch.equal(found, expected):
            return True
        changed = (found != expected).view(self.layer_count, -1).any(1).tolist()
        for (copies, _), of, differs in zip(self._layers, made.of, changed, strict=True):
            if differs and copies.copies is of:
                copies.lose()
        return False

    def _copy(self, isa: str) -> _Made | None:
        """Copies what is not copied; None where that has to wait, as the weights are changing."""
        with _making, torch.inference_mode(False), torch.no_grad():
            if self._made is not None and self._holds(self._made, isa):
                return self._made  # another thread did it
            self._made = None  # which is to free the old copies
            stale = [
                (copies, tensors.weights())
                for copies, tensors in self._layers
                if not copies.current(tensors.weights(), self._kind, isa)
            ]
            ready = [copies.ready(weights) for copies, weights in stale]
            if not all(ready):
                return None
            for copies, weights in stale:
                if not copies.current(weights, self._kind, isa):  # layers may be one and the same
                    copies.make(weights, self._kind, isa, self._offload)
            if stale:
                trim()
            self._made = self._gathered(isa)
            return self._made

    def _gathered(self, isa: str) -> _Made | None:
        places = [copies for copies, _ in self._layers]
        of = [made for copies in places if (made := copies.copies) is not None]
        if len(of) < len(places):
            return None  # weights that were written to while they were copied
        return _Made(
            isa,
            [
                tensor
                for (_, tensors), made in zip(self._layers, of, strict=True)
                for tensor in with_copies(tensors, made)
            ],
            of,
            Counted(
                [pointer for copies in places for pointer in copies.was.pointers],
                [version for copies in places for version in copies.was.versions],
            ),
            torch.cat([copies.sums for copies in places]),
            [flag for copies in places for flag in copies.in_file],
        )
