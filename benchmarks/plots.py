"""The plots of a run: ratios to the peers, and where the kernels stand under the roof."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.report import TITLES, Row, operations, rows
from benchmarks.roofs import compute_roof, memory_roof

# One colour for each peer in every figure (Okabe and Ito's palette, told apart by colour-blind readers too).
PALETTE = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442"),
    *("#000000", "#8C510A"),  # beyond eight, black and a brown
)
_MARKERS = {
    "attention": "o",
    "add_layer_norm": "s",
    "gelu_ffn": "D",
    "embedding_layer_norm": "^",
    "linear_cross_entropy": "P",
    "linear_log1p_max": "X",
}


def write(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draws everything into folder; returns the files."""
    found = rows(results)
    ours = [row for row in found if row["ours"]]
    peers = list(dict.fromkeys(row["contender"] for row in found if not row["ours"]))
    colours = {peer: PALETTE[i % len(PALETTE)] for i, peer in enumerate(peers)}
    written = []
    folder.mkdir(parents=True, exist_ok=True)
    for backend, direction in dict.fromkeys((row["contender"], row["direction"]) for row in ours):
        chosen = [row for row in ours if (row["contender"], row["direction"]) == (backend, direction)]
        path = folder / f"ratios-{backend}-{direction}.png"
        _ratios(chosen, colours, f"{machine_name(results)}: backend {backend}, {TITLES[direction]}", path)
        written.append(path)
    return written + write_rooflines(results, folder)


def write_rooflines(results: dict[str, Any], folder: Path) -> list[Path]:
    """One for each dtype."""
    found = rows(results)
    written = []
    for dtype in dict.fromkeys(row["dtype"] for row in found if row["ours"]):
        path = folder / f"roofline-{results['machine_info']['device']}-{dtype}.png"
        _roofline([row for row in found if row["dtype"] == dtype], results, dtype, path)
        written.append(path)
    return written


def machine_name(results: dict[str, Any]) -> str:
    machine = results["machine_info"]
    return machine.get("gpu") or f"{machine['cpu']} ({machine['isa_kernels'] or 'no compiled kernels'})"


def _ratios(chosen: list[Row], colours: dict[str, str], title: str, path: Path) -> None:
    """A row of bars for each op; a bar up is a case where the kernel is faster, a bar down one where it is slower."""
    ops = list(dict.fromkeys(row["op"] for row in chosen))
    most = max(len(row.get("ratios", {})) for row in chosen) or 1
    widest = max(sum(row["op"] == op for row in chosen) for op in ops)
    figure, axes = plt.subplots(
        len(ops), 1, figsize=(max(8.0, 1.15 * widest + 2.5), 2.5 * len(ops) + 1.2), squeeze=False, layout="constrained"
    )
    for axis, op in zip(axes[:, 0], ops, strict=True):
        cases = [row for row in chosen if row["op"] == op]
        _ratio_bars(axis, cases, colours, width=0.84 / most)
        axis.set_title(op, loc="left", fontweight="bold", fontsize=11)
    used = [peer for peer in colours if any(peer in row.get("ratios", {}) for row in chosen)]
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[peer]) for peer in used]
    figure.suptitle(f"{title}\nhow many times as long the peer takes (above 1: the kernel is faster)", fontsize=11)
    figure.legend(handles, used, loc="outside lower center", ncols=len(used), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _ratio_bars(axis: Axes, cases: list[Row], colours: dict[str, str], width: float) -> None:
    low, high = 0.9, 1.1
    for place, row in enumerate(cases):
        ratios = row.get("ratios", {})
        for index, peer in enumerate(peer for peer in colours if peer in ratios):
            ratio = ratios[peer]
            middle = ratio["median"]
            x = place + (index - (len(ratios) - 1) / 2) * width
            axis.bar(x, middle - 1.0, bottom=1.0, width=width * 0.92, color=colours[peer])
            axis.plot([x, x], [ratio["p20"], ratio["p80"]], color="black", linewidth=0.8)
            end = max(middle, ratio["p80"]) if middle >= 1.0 else min(middle, ratio["p20"])
            low, high = min(low, ratio["p20"]), max(high, ratio["p80"])
            axis.annotate(
                f"{middle:.2g}" if middle < 10 else f"{middle:.0f}",
                (x, end),
                xytext=(0, 2 if middle >= 1.0 else -2),
                textcoords="offset points",
                ha="center",
                va="bottom" if middle >= 1.0 else "top",
                fontsize=7,
            )
    axis.set_yscale("log")
    margin = (high / low) ** 0.12  # room for the numbers
    axis.set_ylim(low / margin, high * margin)
    axis.yaxis.set_major_locator(FixedLocator(_marks(low, high)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} x"))
    axis.axhline(1.0, color="black", linewidth=1.2)
    axis.grid(axis="y", alpha=0.3, linewidth=0.6)
    axis.set_axisbelow(True)
    short = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
    names = [f"{row['batch']['name']}\n{row['size']['name']} {short[row['dtype']]}" for row in cases]
    axis.set_xticks(range(len(cases)), names, fontsize=8)
    axis.set_xlim(-0.6, len(cases) - 0.4)
    axis.spines[["top", "right"]].set_visible(False)


def _marks(low: float, high: float) -> list[float]:
    """Round numbers on a logarithmic axis, no more than it has room for."""
    if high / low < 4:
        steps = (0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0)
    elif high / low < 100:
        steps = tuple(step * 10.0**power for power in range(-4, 5) for step in (1, 2, 5))
    else:
        steps = tuple(10.0**power for power in range(-4, 5))
    return [step for step in steps if low <= step <= high]


def _roofline(found: list[Row], results: dict[str, Any], dtype: str, path: Path) -> None:
    """Useful operations per second over useful operations per byte; filled: the kernels, hollow: eager torch."""
    roofs = results["roofs"]
    compute = compute_roof(roofs, dtype)
    what = "torch.mm" if compute == roofs["matmul"][dtype] else "arithmetic units"
    shown = [row for row in found if row["ours"] or row["contender"] == "eager"]
    backends = list(dict.fromkeys(row["contender"] for row in shown if row["ours"]))
    colours = {backend: PALETTE[i] for i, backend in enumerate(backends)}
    figure, axis = plt.subplots(figsize=(9, 6), layout="constrained")
    draw_roofs(axis, roofs, compute, [row["flops"] / row["bytes"] for row in shown], what)
    for row in shown:
        colour = colours.get(row["contender"], "#666666")
        axis.plot(
            row["flops"] / row["bytes"],
            row["flops_per_s"],
            _MARKERS[row["op"]],
            markersize=7 if row["direction"] == "forward" else 4.5,
            markerfacecolor=colour if row["ours"] else "none",
            markeredgecolor=colour,
            alpha=0.85,
        )
    for op, marker in _MARKERS.items():
        if any(row["op"] == op for row in shown):
            axis.plot([], [], marker, color="#333333", label=op)
    for backend, colour in colours.items():
        axis.plot([], [], "o", color=colour, label=f"backend {backend}")
    axis.plot([], [], "o", markerfacecolor="none", markeredgecolor="#666666", label="eager torch")
    axis.plot([], [], "o", color="#333333", markersize=4.5, label="small: with backward")
    top = 10 ** math.ceil(math.log10(compute * 1.2))
    axis.set_ylim(min(row["flops_per_s"] for row in shown) / 2, min(top, compute * 4))
    axis.set_title(f"{machine_name(results)}: {dtype} under the roofs of the same run", fontsize=11)
    axis.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_roofs(axis: Axes, roofs: dict[str, Any], compute: float, intensities: list[float], what: str) -> None:
    """Logarithmic axes with the machine's roofs on them, wide enough for these operations per byte.

    compute: the roof of arithmetic, the highest that is drawn; `what` of which it is.
    """
    memory = memory_roof(roofs)
    cached = max(block["bytes_per_s"] for block in roofs["copy"])
    left, right = min(intensities) / 2, max(*intensities, compute / memory) * 2
    for bandwidth, style, name in ((memory, "-", "memory"), (cached, "--", "cache")):
        if name == "cache" and cached < 1.1 * memory:
            continue
        ridge = compute / bandwidth
        label = f"copy, {name}: {bandwidth / 1e9:.3g} GB/s"
        axis.plot([left, ridge], [left * bandwidth, compute], style, color="black", linewidth=1.3, label=label)
    across = [compute / max(memory, cached), right]
    axis.plot(across, [compute, compute], "-.", color="black", linewidth=1.3, label=f"{what}: {operations(compute)}")
    axis.set(xscale="log", yscale="log", xlim=(left, right))
    axis.set_xlabel("useful operations per byte that must move")
    axis.set_ylabel("useful operations per second")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e9:g} G"))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.grid(alpha=0.25, which="both", linewidth=0.5)
