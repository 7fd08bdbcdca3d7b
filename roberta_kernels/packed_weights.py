"""The weights of layers, packed once for the CPU kernels, so that inference runs a whole encoder as one op call.

A packed weight is a copy in the order in which a kernel of one instruction set reads it, in float32 or rounded to fewer
bits. The modules' own parameters stay what they were: what is saved, trained and copied. A copy must therefore notice
whatever may happen to them between two calls: `Plan.holds` is that check, in flat lists, because it runs in every call.

    PackedWeights   the packed copies of one layer
    Plan            one op call through some layers, and what it depends on
    Prepared        where a module keeps its own of the two
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from roberta_kernels import backends, offloading
from roberta_kernels.hooks import compiled, foreign_hooks
from roberta_kernels.packing import Sequences

# patch's `quantization` -> the kind that pack_weight knows.
KINDS: dict[str | None, str] = {
    None: "float32",
    "bfloat16": "bfloat16",
    "int8": "int8",
    "int8-dynamic": "int8-dynamic",
}
QUANTIZATIONS = tuple(kind for kind in KINDS if kind is not None)
HEAD_DIMS = range(16, 129, 8)  # that the op serves
_PREPARED = "_rk_prepared"


@dataclass(frozen=True)
class Call:
    """What the op is told of layers beside their tensors; layers that differ in it cannot share a call."""

    heads: int
    scale: float
    eps: float
    tanh: bool


@dataclass(frozen=True)
class LayerParts:
    """What one call of a layer is made of.

    modules: its modules, whose own calls are skipped. places: (dict, key) under which these, their parameters and the
    attributes that count are found. weights: of query, key, value, attention.output.dense, intermediate.dense and
    output.dense. vectors: the biases of query, key, value and attention.output.dense, the weight and bias of its
    LayerNorm, the biases of intermediate.dense and output.dense, the weight and bias of its LayerNorm.
    """

    modules: list[nn.Module]
    places: list[tuple[dict[str, Any], str]]
    weights: list[nn.Parameter]
    vectors: list[nn.Parameter]
    call: Call


@dataclass(frozen=True)
class Around:
    """What a call through all layers of a model skips beside what is in them.

    modules: the layers themselves and their encoder. places: where these are found, as LayerParts has it. layers: the
    dict of the layers, which may grow.
    """

    modules: list[nn.Module] = field(default_factory=list)
    places: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    layers: dict[str, Any] = field(default_factory=dict)


NOTHING = Around()


_WINDOW = 1024  # elements, a page


def _samples(weights: Sequence[nn.Parameter], offloaded: offloading.Offloaded) -> list[Tensor]:
    """What to look at of weights: where they are out of memory, a few pages only, as reading brings the others back."""
    samples: list[Tensor] = []
    for weight in weights:
        if weight in offloaded:
            flat = weight.detach().view(-1)
            samples += [flat[at : at + _WINDOW] for at in (0, len(flat) // 2, max(0, len(flat) - _WINDOW))]
        else:
            samples.append(weight)
    return samples


def _hash(samples: list[Tensor]) -> int:
    """Of some elements: what shows edits through `.data`, which change nothing else."""
    return torch.ops.roberta_kernels_cpu.sample_weights.default(samples)


class PackedWeights:
    """The packed copies of one layer's weights: of query, key and value together, and of the other three."""

    def __init__(self, weights: list[nn.Parameter], kind: str, isa: str) -> None:
        pack = torch.ops.roberta_kernels_cpu.pack_weight.default
        query, key, value, *others = (weight.detach() for weight in weights)
        self.tensors: list[Tensor] = [pack(torch.cat([query, key, value]), kind)]
        self.tensors += [pack(weight.contiguous(), kind) for weight in others]
        self._weights, self._kind, self._isa = weights, kind, isa

    def stamp(self, offloaded: offloading.Offloaded) -> None:
        """Takes the weights as they are now for those that were packed. offloaded: those that are out of memory."""
        self._pointers = [weight.data_ptr() for weight in self._weights]
        self._versions = [weight._version for weight in self._weights]
        self.samples = _samples(self._weights, offloaded)
        self._hash = _hash(self.samples)

    def current(self, weights: list[nn.Parameter], kind: str, isa: str) -> bool:
        """Whether these weights are the packed ones, unchanged."""
        return (
            self._kind == kind
            and self._isa == isa
            and all(map(is_, weights, self._weights))
            and [weight.data_ptr() for weight in weights] == self._pointers
            and [weight._version for weight in weights] == self._versions
            and all(weight.is_contiguous() for weight in weights)
            and _hash(self.samples) == self._hash
        )


class Plan:
    """One op call through some layers, and everything that must be as it was for it to be made again."""

    def __init__(
        self,
        parts: Sequence[LayerParts],
        packed: Sequence[PackedWeights],
        kind: str,
        isa: str,
        around: Around,
    ) -> None:
        self.kind, self.isa = kind, isa
        self._call = parts[0].call
        self._modules = [*around.modules, *(module for part in parts for module in part.modules)]
        self._types = list(map(type, self._modules))
        self._attributes = [module.__dict__ for module in self._modules]
        self._places = [*around.places, *(place for part in parts for place in part.places)]
        self._around, self._layer_count = around, len(around.layers)
        self._found = [mapping[key] for mapping, key in self._places]
        self._weights = [weight for part in parts for weight in part.weights]
        self._parameters = self._weights + [vector for part in parts for vector in part.vectors]
        self._pointers = [parameter.data_ptr() for parameter in self._parameters]
        self._versions = [weight._version for weight in self._weights]
        self._samples = [sample for copies in packed for sample in copies.samples]
        self._hash = _hash(self._samples)
        self._tensors: list[Tensor] = []
        for part, copies in zip(parts, packed, strict=True):
            (qkv, attention_out, w_in, w_out), vectors = copies.tensors, part.vectors
            self._tensors += [qkv, *vectors[:3], attention_out, *vectors[3:6], w_in, vectors[6], w_out, *vectors[7:]]

    def holds(self, kind: str, isa: str) -> bool:
        """Whether the same call may be made again: nothing replaced, hooked, bound, moved, trained or edited since."""
        if self.kind != kind or self.isa != isa or _has_any_global_hook():
            return False
        if len(self._around.layers) != self._layer_count or any(map(compiled, self._around.modules)):
            return False
        if list(map(type, self._modules)) != self._types:
            return False
        # Backward hooks are never reached: a call that needs gradients is not made.
        for own, module in zip(self._attributes, self._modules, strict=True):
            if (
                own["training"]
                or own["_forward_pre_hooks"]
                or "forward" in own
                or (own["_forward_hooks"] and foreign_hooks(module))
            ):
                return False
        try:
            found = [mapping[key] for mapping, key in self._places]
        except KeyError:  # a parameter became something else (pruning, a parametrisation)
            return False
        return (
            all(map(is_, found, self._found))
            and [parameter.data_ptr() for parameter in self._parameters] == self._pointers
            and [weight._version for weight in self._weights] == self._versions
            and all(weight.is_contiguous() for weight in self._weights)
            and _hash(self._samples) == self._hash
        )

    def requires_grad(self) -> bool:
        return any(parameter.requires_grad for parameter in self._parameters)

    def run(self, hidden_states: Tensor, sequences: Sequences) -> Tensor:
        """`[..., H]` float32 -> `[..., H]`, through all layers."""
        call = self._call
        rows = hidden_states.reshape(-1, hidden_states.shape[-1]).contiguous()
        out = torch.ops.roberta_kernels_cpu.packed_encoder.default(
            rows,
            self._tensors,
            sequences.cu_seqlens,
            sequences.max_seqlen,
            sequences.key_mask,
            sequences.causal,
            call.heads,
            call.scale,
            call.eps,
            call.tanh,
        )
        return out.view(hidden_states.shape)


@dataclass
class Prepared:
    """What a module keeps for inference: a layer its packed weights and its plan, a model the plan of all layers.

    A module that is copied or pickled takes an empty one with it.
    """

    weights: PackedWeights | None = None
    plan: Plan | None = None
    offloaded: offloading.Offloaded = field(default_factory=offloading.Offloaded)

    def __reduce__(self) -> tuple[Any, ...]:
        return Prepared, ()


def prepared(module: nn.Module) -> Prepared:
    """The module's own, made when first asked for."""
    return module.__dict__.setdefault(_PREPARED, Prepared())


def drop(module: nn.Module) -> bool:
    """Frees packed weights, and says whether there were any. Weights that were moved out of memory stay there."""
    mine = module.__dict__.get(_PREPARED)
    if mine is None or (mine.weights is None and mine.plan is None):
        return False
    mine.weights = mine.plan = None
    return True


def trim() -> None:
    """Hands memory that was freed back to the system: glibc keeps what lies below something that is still in use."""
    if (release := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        release(0)


def forget(module: nn.Module) -> None:
    """Undoes all that was done for inference: frees packed weights, brings weights back into memory."""
    mine = module.__dict__.pop(_PREPARED, None)
    if mine is not None:
        with torch.inference_mode(False), torch.no_grad():
            mine.offloaded.bring_back()


_making = threading.Lock()  # two threads that find nothing packed shall not both pack, nor move a weight twice


def make_plan(
    owner: nn.Module,
    layers: Sequence[nn.Module],
    parts: Sequence[LayerParts],
    around: Around,
    *,
    kind: str,
    isa: str,
    offload: bool,
) -> Plan:
    """Packs what is not packed yet, a layer at a time, and keeps the plan of a call through `layers` at `owner`.

    parts: of each layer. offload: move each weight out of memory once it is packed.
    """
    with _making, torch.inference_mode(False), torch.no_grad():
        packed, fresh = [], False
        for layer, part in zip(layers, parts, strict=True):
            mine = prepared(layer)
            weights = mine.weights
            if weights is None or not weights.current(part.weights, kind, isa):
                mine.weights = mine.plan = weights = None  # the old copies go before the new ones come
                weights = PackedWeights(part.weights, kind, isa)
                if offload:
                    mine.offloaded.move(part.weights)
                weights.stamp(mine.offloaded)
                mine.weights, fresh = weights, True
            packed.append(weights)
        if fresh:
            trim()
        plan = prepared(owner).plan = Plan(parts, packed, kind, isa, around)
    return plan


@functools.cache
def unavailable() -> str | None:
    """Why no weights can be packed in this process, or None."""
    status = backends.available_backends()["cpu"]
    if not status:
        return status.detail
    return None if hasattr(torch.ops.roberta_kernels_cpu, "pack_weight") else "the compiled kernels are of an old build"
