"""Fake functions of the ops that a compiled library has beside those of schemas.def.

Those of schemas.def get theirs in ops/, in every namespace. These have no gradient and stand in one library, so theirs
are registered where it is loaded: without one, a call under FakeTensorMode ends in an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily


def _encoder(x: Tensor, layers: Sequence[Tensor], *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _pack_weight(weight: Tensor, kind: str) -> Tensor:
    # How many bytes a weight takes is the library's affair: it is asked, with a weight of that shape.
    with unset_fake_temporarily():
        packed = torch.ops.roberta_kernels_cpu.pack_weight.default(torch.zeros(weight.shape), kind)
    return weight.new_empty(packed.shape, dtype=packed.dtype)


def _cached_attention(query: Tensor, *_: Any) -> Tensor:
    batch, heads, queries, head_dim = query.shape
    return query.new_empty(batch, queries, heads, head_dim)


def _linear(x: Tensor, weight: Tensor, _: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _checksum_weights(weights: Sequence[Tensor], in_file: Any, first: Any, count: int, parts: int) -> Tensor:
    return weights[0].new_empty((len(weights), count), dtype=torch.int64)


# By namespace; ops without tensors need none.
FAKES: dict[str, dict[str, Callable[..., Any]]] = {
    "roberta_kernels_cpu": {
        "cached_attention": _cached_attention,
        "checksum_weights": _checksum_weights,
        "encoder": _encoder,
        "linear": _linear,
        "pack_weight": _pack_weight,
        "packed_encoder": _encoder,
    },
    "roberta_kernels_cuda": {"encoder": _encoder},
}


def register(namespace: str) -> None:
    """Registers the fake functions of a library that was just loaded; it may be of a build that has fewer ops."""
    for op, fake in FAKES.get(namespace, {}).items():
        if hasattr(getattr(torch.ops, namespace), op):
            torch.library.register_fake(f"{namespace}::{op}", fake)
