"""The plots of whole models on a CPU: speed by workload, the roofline, and how time grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.plots import PALETTE, draw_roofs, machine_name
from benchmarks.report import Row
from benchmarks.roofs import compute_roof

_BASIS = "HF sdpa"
_MARKERS = "osD^vP*X"


def write(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draws everything there is into folder; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(row["contender"] for row in results["models"] + results["scaling"]))
    colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}
    forward = [row for row in results["models"] if row["direction"] == "forward"]
    written = []
    if forward:
        written.append(_speed(forward, colours, results, folder / "models-cpu-speed.png"))
    intensive = [row for row in forward if "bytes" in row]
    if intensive:
        written.append(_roofline(intensive, colours, results, folder / "models-cpu-roofline.png"))
    if results["scaling"]:
        written.append(_scaling(results["scaling"], colours, results, folder / "models-cpu-scaling.png"))
    return written


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _speed(rows: list[Row], colours: dict[str, str], results: dict[str, Any], path: Path) -> Path:
    """Bars of useful tokens per second over those of transformers as it comes (or of the first contender)."""
    workloads = list(dict.fromkeys(row["batch"]["name"] for row in rows))
    names = [name for name in colours if any(row["contender"] == name for row in rows)]
    basis = _BASIS if _BASIS in names else names[0]
    width = 0.86 / len(names)
    figure, axis = plt.subplots(figsize=(max(8.0, 1.9 * len(workloads) + 1.5), 5.2), layout="constrained")
    shown = []
    for place, workload in enumerate(workloads):
        found = {row["contender"]: row for row in rows if row["batch"]["name"] == workload}
        if basis not in found:
            continue
        for index, name in enumerate(names):
            if name not in found:
                continue
            row, unit = found[name], found[basis]["median_s"]
            x, height = place + (index - (len(names) - 1) / 2) * width, unit / row["median_s"]
            hatch = "//" if row["weights"] else ""
            axis.bar(x, height, width * 0.94, color=colours[name], hatch=hatch, edgecolor="white", linewidth=0.3)
            axis.plot([x, x], [unit / row["p80_s"], unit / row["p20_s"]], color="black", linewidth=0.8)
            shown += [height, unit / row["p20_s"]]
            axis.annotate(
                f"{height:.1f}",
                (x, max(height, unit / row["p20_s"])),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
    for name in names:
        lossy = any(row["weights"] for row in rows if row["contender"] == name)
        axis.bar(0, 0, color=colours[name], hatch="//" if lossy else "", edgecolor="white", label=name)
    axis.set_yscale("log")
    marks = [
        m for m in (0.25, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24) if min(shown) / 1.3 <= m <= max(shown) * 1.3
    ]
    axis.set_ylim(min(*shown, 0.9) / 1.1, max(shown) * 1.25)
    axis.yaxis.set_major_locator(FixedLocator(marks))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} x"))
    axis.axhline(1.0, color="black", linewidth=1.0)
    axis.set_xticks(range(len(workloads)), workloads)
    axis.grid(axis="y", alpha=0.3, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(
        f"{machine_name(results)}: whole models, speed over {basis}\nhatched: weights in bfloat16 or int8", fontsize=11
    )
    figure.legend(loc="outside lower center", ncols=min(5, len(names)), frameon=False, fontsize=9)
    return _save(figure, path)


def _roofline(rows: list[Row], colours: dict[str, str], results: dict[str, Any], path: Path) -> Path:
    """Useful operations per second over operations per byte that has to move; a marker for each workload."""
    workloads = list(dict.fromkeys(row["batch"]["name"] for row in rows))
    markers = dict(zip(workloads, _MARKERS * 2, strict=False))
    figure, axis = plt.subplots(figsize=(9, 6), layout="constrained")
    compute = compute_roof(results["roofs"], "float32")
    draw_roofs(axis, results["roofs"], compute, [row["flops"] / row["bytes"] for row in rows], "multiply-adds")
    for row in rows:
        axis.plot(
            row["flops"] / row["bytes"],
            row["flops_per_s"],
            markers[row["batch"]["name"]],
            color=colours[row["contender"]],
            markerfacecolor=colours[row["contender"]] if row["ours"] else "none",
            markersize=8 if row["ours"] else 7,
        )
    for workload, marker in markers.items():
        axis.plot([], [], marker, color="#333333", label=workload)
    for name in dict.fromkeys(row["contender"] for row in rows):
        axis.plot([], [], "s", color=colours[name], label=name)
    axis.set_ylim(min(row["flops_per_s"] for row in rows) / 2, max(compute, *(r["flops_per_s"] for r in rows)) * 1.6)
    axis.set_title(f"{machine_name(results)}: whole models under the roofs of the same run\nfilled: ours", fontsize=11)
    axis.legend(fontsize=8, loc="lower right", ncols=2)
    return _save(figure, path)


def _scaling(rows: list[Row], colours: dict[str, str], results: dict[str, Any], path: Path) -> Path:
    """Useful tokens per second over the tokens of a sequence, the padding of a batch, and threads."""
    titles = {
        "tokens": "one sequence of so many tokens",
        "padding": "8 sequences, padded to 64: padding",
        "threads": "8 x 64, threads",
    }
    series = [name for name in titles if any(row["series"] == name for row in rows)]
    figure, axes = plt.subplots(1, len(series), figsize=(4.6 * len(series), 4.4), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], series, strict=True):
        for contender in dict.fromkeys(row["contender"] for row in rows):
            found = sorted(
                (r for r in rows if (r["series"], r["contender"]) == (name, contender)), key=lambda r: r["x"]
            )
            if not found:
                continue
            xs, tokens = [row["x"] for row in found], [row["useful_tokens"] for row in found]
            axis.plot(
                xs, [row["useful_tokens_per_s"] for row in found], "o-", color=colours[contender], label=contender
            )
            low = [count / row["p80_s"] for count, row in zip(tokens, found, strict=True)]
            high = [count / row["p20_s"] for count, row in zip(tokens, found, strict=True)]
            axis.fill_between(xs, low, high, color=colours[contender], alpha=0.2, linewidth=0)
        if name == "tokens":
            axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _, n=name: f"{value:.0%}" if n == "padding" else f"{value:g}")
        )
        if name == "threads":
            axis.xaxis.set_major_locator(FixedLocator(sorted({row["x"] for row in rows if row["series"] == name})))
        axis.set_ylim(bottom=0)
        axis.set_title(titles[name], fontsize=10)
        axis.grid(alpha=0.3, linewidth=0.6)
    axes[0, 0].set_ylabel("real tokens per second")
    axes[0, 0].legend(fontsize=9)
    figure.suptitle(f"{machine_name(results)}: whole models in float32", fontsize=11)
    return _save(figure, path)
