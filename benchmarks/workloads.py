"""What is measured: model sizes, batches, directions, dtypes, and the list of cases that a run goes through."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from roberta_kernels.schemas import OPS

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


def _rows(count: int) -> Batch:
    """So many rows, for the ops that do not see sequences; as few sequences as the position table allows."""
    full, rest = divmod(count, 512)
    return Batch(f"rows{count}", (512,) * full + (rest,) * (rest > 0))


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


def described(case: Case) -> dict[str, Any]:
    """A case as the JSON names it."""
    return {
        "case": case.id,
        "op": case.op,
        "size": dataclasses.asdict(case.size),
        "batch": {"name": case.batch.name, "lengths": list(case.batch.lengths)},
        "direction": case.direction,
        "dtype": case.dtype_name,
    }


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


def _mixed_gpu() -> Batch:
    return dataclasses.replace(_mixed(64, 8, 512), name="mixed8to512")


# Some 16k tokens each, at every length that RoBERTa sees.
_SUITE_ATTENTION = [_even(count, length) for count, length in ((256, 64), (128, 128), (64, 256), (42, 384), (32, 512))]
_SUITE_ATTENTION.append(_mixed_gpu())
_SUITE_ROWS = {
    "add_layer_norm": (128, 512, 2048, 8192, 16384, 65536),
    "gelu_ffn": (64, 256, 1024, 4096, 16384, 65536),
    "embedding_layer_norm": (128, 2048, 16384, 65536),
    "linear_cross_entropy": (128, 2048, 16384, 65536),
    "linear_log1p_max": (128, 2048, 16384),
}


def suite_plan(device: str, slot: int, *, smoke: bool = False, ops: Sequence[str] = ()) -> list[Case]:
    """The cases of a slot of the GPU suite. 1: RoBERTa-base in bfloat16 for every op, as it matters most; 2: -large,
    then the other dtypes at two sizes; 3: none.
    """
    middle = (8192, 65536)
    if smoke:
        tiers = [("quick", "float32", (_even(2, 16), _mixed(4, 4, 24)), (64, 128))] if slot == 1 else []
        tiers += [("quick", "float32", (_even(1, 16),), (16,))] if slot == 2 else []
    elif slot == 1:
        tiers = [("base", "bfloat16", _SUITE_ATTENTION, ())]
    elif slot == 2:
        tiers = [
            ("large", "bfloat16", [_SUITE_ATTENTION[i] for i in (1, 4, 5)], ()),
            ("base", "float16", [_SUITE_ATTENTION[i] for i in (1, 4)], middle),
            ("base", "float32", [_SUITE_ATTENTION[i] for i in (1, 4)], middle),
        ]
    else:
        tiers = []
    return [
        Case(op, SIZES[size], batch, direction, dtype, device)
        for size, dtype, sequences, some_rows in tiers
        for op in OPS
        if not ops or op in ops
        for direction in DIRECTIONS
        for batch in (sequences if op == "attention" else map(_rows, some_rows or _SUITE_ROWS[op]))
    ]


SMOKE_MODEL_BATCHES = [_mixed(3, 2, 12), _even(1, 8)]


def suite_models(slot: int, *, smoke: bool = False) -> list[tuple[str, list[Batch]]]:
    """Whole models in a slot of the GPU suite: directions, each with its batches, those that the targets are about
    first.
    """
    if smoke:
        return [] if slot == 3 else [(direction, SMOKE_MODEL_BATCHES) for direction in DIRECTIONS]
    first = [_even(1, 128), _even(32, 128), _mixed_gpu(), _even(1, 32)]
    rest = [_even(8, 128), _even(32, 512)]
    slots = {1: [("forward", first)], 2: [("forward", rest), ("forward_backward", [*first[1:3], *rest, first[0]])]}
    return slots.get(slot, [])


# -- whole models on a CPU --------------------------------------------------------------------------------------------

CPU_MODEL_BATCHES = [_even(1, 4), *_BATCHES]


def _padded(count: int, longest: int, padding: float) -> Batch:
    """So much of the padded batch is padding: one sequence is `longest`, the others share the rest evenly."""
    tokens = round(count * longest * (1.0 - padding))
    share, more = divmod(tokens - longest, count - 1)
    lengths = [share + (i < more) for i in range(count - 1)]
    return Batch(f"{count}x{longest}, {padding:.0%} padding", (longest, *lengths))


def scaling_plan(cores: int, *, smoke: bool = False) -> dict[str, list[tuple[float, Batch]]]:
    """By what is varied, "tokens", "padding" or "threads": its values, and the batch that is run."""
    if smoke:
        batch = SMOKE_MODEL_BATCHES[0]
        return {"tokens": [(8, _even(1, 8))], "padding": [(0.5, _padded(4, 16, 0.5))], "threads": [(1, batch)]}
    threads = sorted({*(2**i for i in range(cores.bit_length())), cores})
    return {
        "tokens": [(length, _even(1, length)) for length in (4, 8, 16, 32, 64, 128, 256, 512)],
        "padding": [(padding, _padded(8, 64, padding)) for padding in (0.0, 0.25, 0.5, 0.75)],
        "threads": [(count, _even(8, 64)) for count in threads if count <= cores],
    }
