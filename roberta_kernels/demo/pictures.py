"""The demo's pictures, drawn without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from roberta_kernels.demo.throughput import Throughput
from roberta_kernels.demo.training import Training

ORIGINAL, PATCHED, CONTROL = "#9a9a9a", "#d1495b", "#30638e"
_STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.axisbelow": True,
    "font.size": 10,
    "legend.frameon": False,
    "figure.dpi": 130,
}


def throughput_picture(result: Throughput, lengths: list[int], heading: str, path: Path) -> None:
    with plt.rc_context(_STYLE):
        figure, (rates, text, batches) = plt.subplots(1, 3, figsize=(12.5, 4.0), width_ratios=(0.8, 1.1, 1.1))

        values = (result.real / result.original_seconds, result.real / result.patched_seconds)
        bars = rates.bar(("original", "patched"), values, color=(ORIGINAL, PATCHED), width=0.62)
        rates.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3)
        rates.set(title=f"{result.speedup:.2f} times the throughput", ylabel="real tokens per second")
        rates.margins(y=0.12)

        edges = _powers_of_two(lengths)
        text.hist(lengths, bins=edges, color=CONTROL, edgecolor="white", linewidth=0.6)
        text.set_xscale("log", base=2)
        text.set_xticks([2**i for i in range(1, 10)], [str(2**i) for i in range(1, 10)])
        text.xaxis.minorticks_off()
        text.set(
            title=f"the text: {len(lengths):,} docstrings",
            xlabel="tokens in a docstring (cut off at 512)",
            ylabel="docstrings",
        )

        padding = [batch.padding for batch in result.batches]
        batches.scatter(
            [100 * p for p in padding], [b.speedup for b in result.batches], s=26, color=PATCHED, alpha=0.75, lw=0
        )
        line = sorted({min(padding) * (1 - i / 60) + max(padding) * i / 60 for i in range(61)})
        batches.plot(
            [100 * p for p in line], [1 / (1 - p) for p in line], color="black", lw=1, ls="--",
            label="what leaving out the padding\nwould give alone",
        )  # fmt: skip
        batches.axhline(1, color=ORIGINAL, lw=1)
        batches.set(title="each batch", xlabel="padding in the batch, %", ylabel="original's time / patched's")
        batches.set_ylim(bottom=0)
        batches.legend(loc="upper left", fontsize=9)

        figure.suptitle(heading, x=0.012, ha="left", fontsize=12, fontweight="bold")
        figure.tight_layout()
        figure.savefig(path)
        plt.close(figure)


def _powers_of_two(lengths: list[int]) -> list[float]:
    """Bin edges, four a doubling, wide enough to hold an integer each."""
    edges: list[float] = []
    edge = 2.0
    while edge <= max(lengths) * 1.01:
        if not edges or edge - edges[-1] >= 1:
            edges.append(edge)
        edge *= 2**0.25
    return [*edges, max(edge, edges[-1] + 1)]


def smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    total, norm, smoothed = 0.0, 0.0, []
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        smoothed.append(total / norm)
    return smoothed


def loss_picture(result: Training, heading: str, path: Path) -> None:
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(2, 1, figsize=(8.5, 6.2), sharex=True, height_ratios=(2.1, 1))
        curves: Any = axes[0]
        drift: Any = axes[1]
        steps = range(1, result.steps + 1)
        for name, color, width in (("original", ORIGINAL, 4.5), ("patched", PATCHED, 1.4)):
            curves.plot(steps, result.losses[name], color=color, lw=width * 0.45, alpha=0.4)
            curves.plot(steps, smooth(result.losses[name]), color=color, lw=width, label=name)
        curves.axhline(result.frequencies, color="black", lw=1, ls=":", label="knowing only how frequent each token is")
        curves.set(title="masked-word loss, as it comes and smoothed", ylabel="loss (nats)")
        curves.legend()

        tiny = 1e-7  # equal losses have no logarithm; a rounding of a float32 loss is 5e-7
        for name, color, label in (
            ("patched", PATCHED, "patched"),
            ("control", CONTROL, "the original with eager attention"),
        ):
            drift.plot(steps, [max(value, tiny) for value in result.drift(name)], color=color, lw=1, label=label)
        drift.axhline(result.allowed_difference, color="black", lw=1, ls="--", label="allowed")
        drift.set_yscale("log")
        drift.set_ylim(tiny / 1.3, result.allowed_difference * 3)
        drift.set(title="distance from the original's loss", xlabel="step", ylabel="difference")
        drift.legend(fontsize=9, ncols=3, loc="lower right", bbox_to_anchor=(1, 0.98), borderaxespad=0)

        figure.suptitle(heading, x=0.012, ha="left", fontsize=12, fontweight="bold")
        figure.align_ylabels()
        figure.tight_layout()
        figure.savefig(path)
        plt.close(figure)
