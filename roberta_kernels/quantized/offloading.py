"""Weights moved out of memory, into unlinked temporary files that are mapped in their place.

A weight that is only read when it is saved, trained or copied need not be resident. Mapped privately it is a tensor as
before: what reads it reads the file, and what writes to it gets pages of memory of its own (copy on write). Weights
that from_pretrained left in the mapped file of the model are so already; of these only the pages are handed back.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger("roberta_kernels")

_PAGE_OUT = 21  # Linux' MADV_PAGEOUT: takes pages out of memory, and loses nothing that was written to them


class Offloaded:
    """The weights of a module that are in files."""

    def __init__(self) -> None:
        # id -> the weight (no weak reference: with one, torch.utils.swap_tensors refuses it), its address, and whether
        # the file is ours
        self._moved: dict[int, tuple[Tensor, int, bool]] = {}

    def __contains__(self, weight: Tensor) -> bool:
        moved = self._moved.get(id(weight))
        return moved is not None and moved[0] is weight and moved[1] == weight.data_ptr()

    def move(self, weights: Sequence[Tensor]) -> None:
        """Moves weights into files in the temporary directory (tempfile's). Where it has no room, they stay, with a
        warning. Weights of former calls that are not among them are forgotten.
        """
        self._moved = {id(weight): self._moved[id(weight)] for weight in weights if weight in self}
        mappings = _file_mappings()
        for weight in weights:
            storage = weight.untyped_storage()
            if storage.nbytes() != weight.numel() * weight.element_size() or not weight.is_contiguous():
                continue  # a part of something larger: moving it would part it from the rest
            private = [kind for start, end, kind in mappings if start <= weight.data_ptr() < end]
            if private == [False]:
                continue  # shared with another process, which would be parted from it
            if not private:
                try:
                    weight.data = _mapped_copy(weight.detach())
                except (OSError, RuntimeError) as error:
                    logger.warning(
                        "roberta_kernels: weights stay in memory: there is no room for them in %s (%s)",
                        tempfile.gettempdir(),
                        error,
                    )
                    return
            if weight not in self:
                self._moved[id(weight)] = weight, weight.data_ptr(), not private

    def page_out(self) -> None:
        """Takes what was read of them out of memory again."""
        for weight, _, _ in self._moved.values():
            if weight in self:
                _page_out(weight)

    def bring_back(self) -> None:
        """Brings into memory what is still in a file of ours."""
        for weight, _, ours in self._moved.values():
            if ours and weight in self:
                weight.data = weight.detach().clone()
        self._moved.clear()


# Bytes of one write. The page cache keeps a file in pieces as it was written, and reading an element maps its piece.
_PIECE = 1 << 16


def _file_mappings() -> list[tuple[int, int, bool]]:
    """Address ranges of this process that are files, and whether what is written there stays in this process."""
    found = []
    with contextlib.suppress(OSError):  # no Linux
        for line in Path("/proc/self/maps").read_text().splitlines():
            addresses, rights, _, _, inode, *_ = line.split()
            if inode != "0":
                start, end = (int(address, 16) for address in addresses.split("-"))
                found.append((start, end, rights.endswith("p")))
    return found


def _page_out(tensor: Tensor) -> None:
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + tensor.numel() * tensor.element_size() - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _PAGE_OUT)  # a hint


def _mapped_copy(tensor: Tensor) -> Tensor:
    content = tensor.numpy().data.cast("B")
    with tempfile.NamedTemporaryFile(prefix="roberta_kernels-", buffering=0) as file:
        for start in range(0, len(content), _PIECE):
            if file.write(content[start : start + _PIECE]) != len(content[start : start + _PIECE]):
                raise OSError("a file in the temporary directory could not be written whole")
        mapped = torch.from_file(file.name, shared=False, size=tensor.numel(), dtype=tensor.dtype, device="cpu")
    return mapped.view(tensor.shape)
