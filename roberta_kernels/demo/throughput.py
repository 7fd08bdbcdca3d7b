"""Embedding real text: the original against the patched model, the same batches in the same run, turn by turn."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from roberta_kernels import tolerance
from roberta_kernels.patching import PatchReport, patch

EXACT_BATCHES = 2  # so many also run in float64
FEWEST_BATCHES = 4  # whatever the time they take


@dataclass
class BatchTime:
    """Seconds of one batch, and its tokens: all of them (padded) and the real ones."""

    padded: int
    real: int
    original: float = 0.0
    patched: float = 0.0

    @property
    def padding(self) -> float:
        return 1 - self.real / self.padded

    @property
    def speedup(self) -> float:
        return self.original / self.patched


@dataclass
class Throughput:
    batches: list[BatchTime]
    available: int  # batches that the whole text makes
    difference: float  # largest between the two, at real positions
    comparisons: list[tolerance.Comparison]
    patch_report: PatchReport
    parameters: int = 0
    detours: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return all(comparison.holds for comparison in self.comparisons)

    @property
    def real(self) -> int:
        return sum(batch.real for batch in self.batches)

    @property
    def padding(self) -> float:
        return 1 - self.real / sum(batch.padded for batch in self.batches)

    @property
    def original_seconds(self) -> float:
        return sum(batch.original for batch in self.batches)

    @property
    def patched_seconds(self) -> float:
        return sum(batch.patched for batch in self.batches)

    @property
    def speedup(self) -> float:
        return self.original_seconds / self.patched_seconds


def measure(
    model: Any, encoded: list[list[int]], *, pad: int, batch_size: int, budget: float, console: Console
) -> Throughput:
    """Times model and its patched copy on batches spread evenly over `encoded`, for `budget` seconds."""
    model.eval()
    device = model.device
    fast = copy.deepcopy(model)
    report = patch(fast)
    chunks = [encoded[i : i + batch_size] for i in range(0, len(encoded), batch_size)]
    chunks = [chunk for chunk in chunks if len(chunk) == batch_size] or chunks
    order = spread(len(chunks))
    warming_up = collate(
        min((chunks[i] for i in order[:FEWEST_BATCHES]), key=lambda rows: max(map(len, rows))), pad, device
    )
    for runner in (model, fast):
        timed(runner, warming_up)

    times: list[BatchTime] = []
    kept: list[tuple[int, dict[str, Tensor], Tensor, Tensor]] = []  # the smallest batches, for the float64 model
    difference = 0.0
    columns = ("{task.description}", BarColumn(24), TimeElapsedColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("embedding", total=budget, rate="")
        begin = time.perf_counter()
        for turn, i in enumerate(order):
            if turn >= FEWEST_BATCHES and time.perf_counter() - begin >= budget:
                break
            batch = collate(chunks[i], pad, device)
            seconds, outputs = {}, {}
            # Who goes first changes every batch: what one leaves in caches and clocks, the other inherits in turn.
            for name, runner in (("original", model), ("patched", fast))[:: 1 if turn % 2 == 0 else -1]:
                time.sleep(0.02)  # worker threads spin for a while after a call
                seconds[name], outputs[name] = timed(runner, batch)
            real = batch["attention_mask"].bool()
            times.append(BatchTime(real.numel(), int(real.sum()), seconds["original"], seconds["patched"]))
            ours, theirs = outputs["patched"][real], outputs["original"][real]
            difference = max(difference, float((ours.double() - theirs.double()).abs().max()))
            kept = sorted([*kept, (real.numel(), batch, ours, theirs)], key=lambda item: item[0])[:EXACT_BATCHES]
            so_far = Throughput(times, 0, 0.0, [], report)
            progress.update(
                task,
                completed=min(budget, time.perf_counter() - begin),
                rate=f"{len(times)} batches, {so_far.real / so_far.patched_seconds:,.0f} tokens/s "
                f"against {so_far.real / so_far.original_seconds:,.0f}",
            )
        progress.update(task, completed=budget)

    return Throughput(
        times,
        len(chunks),
        difference,
        _three_way(model, [rest for _, *rest in kept]),
        report,
        sum(p.numel() for p in model.parameters()),
        [*report.fallbacks(), *report.padded()],
    )


def _three_way(model: Any, batches: list[Any]) -> list[tolerance.Comparison]:
    """batches: (batch, ours, the original's) at real positions."""
    exact_model = copy.deepcopy(model).double()
    comparisons = []
    for number, (batch, ours, theirs) in enumerate(batches):
        exact = timed(exact_model, batch)[1][batch["attention_mask"].bool()]
        comparisons.append(tolerance.compare(ours, theirs, exact, name=f"batch {number}"))
    return comparisons


def spread(count: int) -> list[int]:
    """All of range(count), in an order of which every beginning is spread evenly: steps of the golden ratio."""
    places = ((k * 0.6180339887498949) % 1.0 for k in range(8 * count))
    order = list(dict.fromkeys(int(place * count) for place in places))
    return order + sorted(set(range(count)) - set(order))


def collate(rows: list[list[int]], pad: int, device: torch.device) -> dict[str, Tensor]:
    """Rows of token ids as `[rows, longest]`, padded on the right, with their mask."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


@torch.inference_mode()
def timed(model: Any, batch: dict[str, Tensor]) -> tuple[float, Tensor]:
    """Seconds of one call, and its last hidden state."""
    synchronize(batch)
    start = time.perf_counter()
    hidden = model(**batch).last_hidden_state
    synchronize(batch)
    return time.perf_counter() - start, hidden


def synchronize(batch: dict[str, Tensor]) -> None:
    if batch["input_ids"].is_cuda:
        torch.cuda.synchronize()
