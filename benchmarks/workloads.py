"""What is measured: model sizes, batches, directions, dtypes, and the list of cases that a run goes through."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

OPS = ("attention", "add_layer_norm", "gelu_ffn", "embedding_layer_norm")
DIRECTIONS = ("forward", "forward_backward")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Size:
    """The widths of one model."""

    name: str
    hidden: int
    inner: int
    heads: int
    vocabulary: int = 50265
    positions: int = 514

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


SIZES = {
    "base": Size("base", hidden=768, inner=3072, heads=12),
    "large": Size("large", hidden=1024, inner=4096, heads=16),
    "quick": Size("quick", hidden=256, inner=1024, heads=4, vocabulary=1000),
}


@dataclass(frozen=True)
class Batch:
    """The lengths of the sequences of one batch."""

    name: str
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def padded_tokens(self) -> int:
        return len(self.lengths) * max(self.lengths)

    @property
    def even(self) -> bool:
        return len(set(self.lengths)) == 1


def _even(count: int, length: int) -> Batch:
    return Batch(f"{count}x{length}", (length,) * count)


def _mixed(count: int, shortest: int, longest: int) -> Batch:
    """Lengths drawn evenly from shortest to longest, the longest among them; the same in every run."""
    draw = random.Random(0)
    lengths = [draw.randint(shortest, longest) for _ in range(count - 1)]
    return Batch(f"mixed{count}", (*lengths, longest))


_BATCHES = [_even(1, 16), _even(1, 128), _even(8, 128), _even(4, 512), _mixed(32, 4, 128)]
_GPU_BATCHES = [*_BATCHES, _even(32, 512), _mixed(64, 16, 512)]
_QUICK_BATCHES = [_even(1, 16), _mixed(8, 4, 24)]
BATCHES = {batch.name: batch for batch in (*_GPU_BATCHES, *_QUICK_BATCHES)}


@dataclass(frozen=True)
class Case:
    """One op on one batch in one direction: what all contenders compute."""

    op: str
    size: Size
    batch: Batch
    direction: str
    dtype_name: str
    device: str

    @property
    def id(self) -> str:
        return f"{self.op}-{self.size.name}-{self.dtype_name}-{self.direction}-{self.batch.name}"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def backward(self) -> bool:
        return self.direction == "forward_backward"


@dataclass(frozen=True)
class Cost:
    """The useful work of a case: what any implementation has to do (docs/performance.md).

    flops: of the matrix products over real tokens, or an operation count of the row-wise formula.
    bytes: every input read once and every output written once, per direction.
    products: the operations are matrix products, and torch.mm's rate bounds them. Row-wise ops are bound by memory.
    """

    flops: int
    bytes: int
    products: bool


# (size, dtype) -> batches of a full run. On a CPU the whole grid would take half an hour.
_CPU_RUN = {
    ("base", "float32"): ("1x16", "1x128", "8x128", "4x512", "mixed32"),
    ("large", "float32"): ("1x16", "8x128", "mixed32"),
    ("base", "bfloat16"): ("8x128", "mixed32"),
}
_GPU_RUN = {
    ("base", "bfloat16"): ("1x16", "1x128", "8x128", "4x512", "mixed32", "32x512", "mixed64"),
    ("large", "bfloat16"): ("1x16", "8x128", "mixed32", "32x512", "mixed64"),
    ("base", "float16"): ("8x128", "mixed32", "32x512"),
    ("base", "float32"): ("8x128", "mixed32", "32x512"),
}
_QUICK_RUN = {("quick", "float32"): tuple(batch.name for batch in _QUICK_BATCHES)}


def plan(
    device: str,
    *,
    quick: bool = False,
    everything: bool = False,
    ops: Sequence[str] = (),
    sizes: Sequence[str] = (),
    batches: Sequence[str] = (),
    directions: Sequence[str] = (),
    dtypes: Sequence[str] = (),
) -> list[Case]:
    """The cases of a run; those that share a compilation stand together. An empty filter lets all through."""
    if quick:
        run = _QUICK_RUN
    elif everything:
        served = ("float32", "bfloat16") if device == "cpu" else ("bfloat16", "float16", "float32")
        names = tuple(batch.name for batch in (_BATCHES if device == "cpu" else _GPU_BATCHES))
        run = dict.fromkeys(itertools.product(("base", "large"), served), names)
    else:
        run = _CPU_RUN if device == "cpu" else _GPU_RUN
    return [
        Case(op, SIZES[size], BATCHES[batch], direction, dtype, device)
        for op in OPS
        if not ops or op in ops
        for (size, dtype), names in run.items()
        if (not sizes or size in sizes) and (not dtypes or dtype in dtypes)
        for direction in DIRECTIONS
        if not directions or direction in directions
        for batch in names
        if not batches or batch in batches
    ]
