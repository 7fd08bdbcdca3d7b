"""Weights moved out of memory, into unlinked temporary files that are mapped in their place.

A weight that is only read when it is saved, trained or copied need not be resident. Mapped privately it is a tensor as
before: what reads it reads the file, and what writes to it gets pages of memory of its own (copy on write).
"""

from __future__ import annotations

import tempfile
import warnings
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Offloaded:
    """The weights of a module that are in files."""

    def __init__(self) -> None:
        self._moved: dict[int, tuple[weakref.ref[nn.Parameter], int]] = {}  # id -> the weight, its address

    def __contains__(self, weight: nn.Parameter) -> bool:
        moved = self._moved.get(id(weight))
        return moved is not None and moved[0]() is weight and moved[1] == weight.data_ptr()

    def move(self, weights: Iterable[nn.Parameter]) -> None:
        """Moves weights into files in the temporary directory (tempfile's). Where it has no room, they stay, with a
        warning.
        """
        for weight in weights:
            storage = weight.untyped_storage()
            if storage.nbytes() != weight.numel() * weight.element_size() or not weight.is_contiguous():
                continue  # a part of something larger: moving it would part it from the rest
            try:
                mapped = _mapped_copy(weight.detach())
            except (OSError, RuntimeError) as error:
                warnings.warn(
                    f"roberta_kernels: weights stay in memory: no room for them in {tempfile.gettempdir()} ({error})",
                    stacklevel=2,
                )
                return
            weight.data = mapped
            self._moved[id(weight)] = weakref.ref(weight), weight.data_ptr()

    def bring_back(self) -> None:
        """Brings into memory what is still mapped."""
        for reference, _ in self._moved.values():
            weight = reference()
            if weight is not None and weight in self:
                weight.data = weight.detach().clone()
        self._moved.clear()


# Bytes of one write. The page cache keeps a file in pieces as it was written, and reading an element maps its piece.
_PIECE = 1 << 16


def _mapped_copy(tensor: Tensor) -> Tensor:
    content = tensor.numpy().data.cast("B")
    with tempfile.NamedTemporaryFile(prefix="roberta_kernels-", buffering=0) as file:
        for start in range(0, len(content), _PIECE):
            if file.write(content[start : start + _PIECE]) != len(content[start : start + _PIECE]):
                raise OSError("a file in the temporary directory could not be written whole")
        mapped = torch.from_file(file.name, shared=False, size=tensor.numel(), dtype=tensor.dtype, device="cpu")
    return mapped.view(tensor.shape)
