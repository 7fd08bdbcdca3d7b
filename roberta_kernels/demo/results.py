"""What the demo found: on the terminal, and as JSON."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from roberta_kernels._version import __version__
from roberta_kernels.demo import throughput, training
from roberta_kernels.demo.options import Options


def print_predictions(trained: training.Training, console: Console) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title="docstrings that it has not seen", title_justify="left")
    table.add_column("text", overflow="fold", ratio=3)
    table.add_column("was")
    table.add_column("guesses of the patched model", overflow="fold", ratio=3)
    for prediction in trained.predictions:
        guesses = Text(", ").join(
            Text(f"{word} {chance:.0%}", "bold green" if word == prediction.truth else "")
            for word, chance in prediction.guesses
        )
        table.add_row(Text(prediction.text), Text(prediction.truth), guesses)
    console.print(table)


def print_results(embedded: throughput.Throughput, trained: training.Training, console: Console) -> None:
    def verdict(holds: bool) -> Text:
        return Text("holds", "green") if holds else Text("BROKEN", "bold red")

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading, justify in (("", "left"), ("original", "right"), ("patched", "right"), ("", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    table.add_row(
        f"embedding: {len(embedded.batches)} of {embedded.available} batches, {embedded.padding:.0%} padding",
        f"{embedded.real / embedded.original_seconds:,.0f} tokens/s",
        f"{embedded.real / embedded.patched_seconds:,.0f} tokens/s",
        Text(f"{embedded.speedup:.2f} times", "bold"),
    )
    worst = max(embedded.comparisons, key=lambda c: c.max_error / c.max_allowed if c.max_allowed else 0.0)
    table.add_row(
        f"largest error against float64 (allowed {worst.max_allowed:.1e})",
        f"{worst.max_error_original:.1e}",
        f"{worst.max_error:.1e}",
        verdict(embedded.holds),
    )
    table.add_row(
        f"training: {trained.steps} steps, {trained.padding:.0%} padding",
        f"{1000 * trained.seconds['original'] / trained.steps:,.0f} ms/step",
        f"{1000 * trained.seconds['patched'] / trained.steps:,.0f} ms/step",
        Text(f"{trained.speedup:.2f} times", "bold"),
    )
    table.add_row(
        f"loss on unseen text (at first {trained.losses['original'][0]:.2f}; frequencies {trained.frequencies:.2f})",
        f"{trained.held_out['original']:.4f}",
        f"{trained.held_out['patched']:.4f}",
        "",
    )
    table.add_row(
        f"largest difference of the losses (allowed {trained.allowed_difference:.1e})",
        f"{max(trained.drift('control')):.1e} (eager)",
        f"{trained.largest_difference:.1e}",
        verdict(trained.holds),
    )
    console.print(table)


def print_broken(embedded: throughput.Throughput, trained: training.Training, console: Console) -> None:
    broken = [str(comparison) for comparison in embedded.comparisons if not comparison.holds]
    if not trained.holds:
        broken.append(
            f"the loss curves part by {trained.largest_difference:.2e}, allowed {trained.allowed_difference:.2e}"
        )
    console.print(Text("The promise is BROKEN: " + "; ".join(broken), "bold red"))


def summary(
    options: Options,
    embedder: dict[str, Any],
    embedded: throughput.Throughput,
    trained: training.Training,
    lengths: list[int],
) -> dict[str, Any]:
    """Everything as JSON values. embedder: its device, backend and dtype. lengths: of the texts, in tokens."""
    import transformers

    return {
        "holds": embedded.holds and trained.holds,
        "versions": {
            "roberta_kernels": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": embedder["device"],
        "backend": embedder["backend"],
        "seed": options.seed,
        "quick": options.quick,
        "text": {"docstrings": len(lengths), "tokens": sum(lengths), "longest": max(lengths)},
        "embedding": {"dtype": embedder["dtype"], "batch_size": options.batch_size, **_embedding(embedded)},
        "training": _training(trained),
    }


def _embedding(embedded: throughput.Throughput) -> dict[str, Any]:
    return {
        "parameters": embedded.parameters,
        "batches": len(embedded.batches),
        "batches_in_all": embedded.available,
        "real_tokens": embedded.real,
        "padding": embedded.padding,
        "original_tokens_per_second": embedded.real / embedded.original_seconds,
        "patched_tokens_per_second": embedded.real / embedded.patched_seconds,
        "speedup": embedded.speedup,
        "largest_difference": embedded.difference,
        "three_way": [{**asdict(comparison), "holds": comparison.holds} for comparison in embedded.comparisons],
        "each": [asdict(batch) for batch in embedded.batches],
        "holds": embedded.holds,
    }


def _training(trained: training.Training) -> dict[str, Any]:
    return {
        "parameters": trained.parameters,
        "steps": trained.steps,
        "padding": trained.padding,
        "original_ms_per_step": 1000 * trained.seconds["original"] / trained.steps,
        "patched_ms_per_step": 1000 * trained.seconds["patched"] / trained.steps,
        "speedup": trained.speedup,
        "first_loss": trained.losses["original"][0],
        "held_out_loss": trained.held_out,
        "held_out_loss_of_frequencies": trained.frequencies,
        "largest_difference": trained.largest_difference,
        "allowed_difference": trained.allowed_difference,
        "control_difference": max(trained.drift("control")),
        "losses": trained.losses,
        "predictions": [asdict(prediction) for prediction in trained.predictions],
        "holds": trained.holds,
    }
