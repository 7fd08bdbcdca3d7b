"""Embedding real text: the original against the patched model, the same batches in the same run, turn by turn."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from roberta_kernels import tolerance
from roberta_kernels.patching import PatchReport, patch

EXACT_BATCHES = 2  # so many also run in float64


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
    """Times model and its patched copy on batches spread evenly over `encoded`, as many as `budget` seconds allow."""
    model.eval()
    device = model.device
    fast = copy.deepcopy(model)
    report = patch(fast)
    chunks = [encoded[i : i + batch_size] for i in range(0, len(encoded), batch_size)]
    chunks = [chunk for chunk in chunks if len(chunk) == batch_size] or chunks
    sizes = [BatchTime(len(chunk) * max(map(len, chunk)), sum(map(len, chunk))) for chunk in chunks]

    # Two ordinary batches tell how fast this machine is; the first is for warming up.
    by_cost = sorted(range(len(chunks)), key=lambda i: sizes[i].padded)
    probe = BatchTime(0, 0)
    for i in (by_cost[len(chunks) // 3], by_cost[len(chunks) // 2]):
        batch = collate(chunks[i], pad, device)
        probe = BatchTime(sizes[i].padded, sizes[i].real, timed(model, batch)[0], timed(fast, batch)[0])
    costs = [s.padded * probe.original / probe.padded + s.real * probe.patched / probe.real for s in sizes]
    chosen = _as_many_as_fit(costs, budget)
    exact_for = set(sorted(chosen, key=lambda i: sizes[i].padded)[:EXACT_BATCHES])

    times: list[BatchTime] = []
    kept: list[tuple[dict[str, Tensor], Tensor, Tensor]] = []
    difference = 0.0
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[rate]}"), console=console) as progress:
        task = progress.add_task("embedding", total=len(chosen), rate="")
        for turn, i in enumerate(chosen):
            batch = collate(chunks[i], pad, device)
            seconds, outputs = {}, {}
            # Who goes first changes every batch: what one leaves in caches and clocks, the other inherits in turn.
            for name, runner in (("original", model), ("patched", fast))[:: 1 if turn % 2 == 0 else -1]:
                time.sleep(0.02)  # worker threads spin for a while after a call
                seconds[name], outputs[name] = timed(runner, batch)
            times.append(BatchTime(sizes[i].padded, sizes[i].real, seconds["original"], seconds["patched"]))
            real = batch["attention_mask"].bool()
            ours, theirs = outputs["patched"][real], outputs["original"][real]
            difference = max(difference, float((ours.double() - theirs.double()).abs().max()))
            if i in exact_for:
                kept.append((batch, ours, theirs))
            so_far = Throughput(times, 0, 0.0, [], report)
            rates = (so_far.real / so_far.original_seconds, so_far.real / so_far.patched_seconds)
            progress.update(task, advance=1, rate="{:,.0f} against {:,.0f} tokens/s".format(*reversed(rates)))

    exact_model = copy.deepcopy(model).double()
    comparisons = []
    for number, (batch, ours, theirs) in enumerate(kept):
        exact = timed(exact_model, batch)[1][batch["attention_mask"].bool()]
        comparisons.append(tolerance.compare(ours, theirs, exact, name=f"batch {number}"))
    return Throughput(
        times,
        len(chunks),
        difference,
        comparisons,
        report,
        sum(p.numel() for p in model.parameters()),
        [*report.fallbacks(), *report.padded()],
    )


def _as_many_as_fit(costs: list[float], budget: float) -> list[int]:
    """Indices spread evenly, the most whose cost is within the budget; two at least, so that both go first once."""
    for count in range(len(costs), 2, -1):
        chosen = [i * len(costs) // count for i in range(count)]
        if sum(costs[i] for i in chosen) <= budget:
            return chosen
    return sorted({0, len(costs) // 2})


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
