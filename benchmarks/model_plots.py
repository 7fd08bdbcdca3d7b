"""The plots of whole models on a CPU: speed by workload, the roofline, and how time grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.model_report import kind
from benchmarks.plots import PALETTE, draw_roofs, machine_name
from benchmarks.report import Row, operations
from benchmarks.roofs import compute_roof

_BASIS = "HF sdpa"
_MARKERS = "osD^vP*X"


def write(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draws everything there is into folder; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(row["contender"] for row in results["models"] + results["scaling"]))
    colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}
    forward = [row for row in results["models"] if row["direction"] == "forward"]
    written, prefix = [], f"models-{kind(results)}"
    if forward:
        written.append(_speed(forward, results, folder / f"{prefix}-speed.png"))
    intensive = [row for row in forward if "bytes" in row and row["contender"] in _ROOFLINE]
    if intensive:
        written.append(_roofline(intensive, results, folder / f"{prefix}-roofline.png"))
    if results["scaling"]:
        written.append(_scaling(results["scaling"], colours, results, folder / f"{prefix}-scaling.png"))
    return written


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


# What is shown beside what: five contenders at most, the float32 ones first.
_PANELS = {
    "float32": ("ours", "HF sdpa", "torch.compile", "ONNX Runtime", "OpenVINO"),
    "bfloat16": (
        "ours, bfloat16 model",
        "ours, autocast",
        "HF bfloat16 model",
        "HF autocast",
        "OpenVINO bfloat16",
    ),
    "less than float32, of a float32 model": (
        "ours high",
        "ours bfloat16",
        "ours int8",
        "ours int8-dynamic",
        "ONNX Runtime int8",
    ),
}


def _panels(rows: list[Row]) -> dict[str, list[str]]:
    """Titles -> contenders that were measured."""
    measured = {row["contender"] for row in rows}
    panels = {title: [name for name in names if name in measured] for title, names in _PANELS.items()}
    return {title: names for title, names in panels.items() if names}


def _speed(rows: list[Row], results: dict[str, Any], path: Path) -> Path:
    """Times over those of transformers as it comes (or of the first contender): a dot for each contender, with the
    range of its turns, a panel for each precision."""
    workloads = list(dict.fromkeys(row["batch"]["name"] for row in rows))
    panels = _panels(rows) or {"": list(dict.fromkeys(row["contender"] for row in rows))[:5]}
    basis = _BASIS if any(row["contender"] == _BASIS for row in rows) else rows[0]["contender"]
    by_case = {(row["batch"]["name"], row["contender"]): row for row in rows}
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(1.0 + 4.6 * len(panels), 1.6 + 0.62 * len(workloads)),
        sharey=True,
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (title, names) in zip(axes[0], panels.items(), strict=True):
        for index, name in enumerate(names):
            ours = name.startswith("ours")
            drawn = {"label": name}
            for place, workload in enumerate(workloads):
                row, base = by_case.get((workload, name)), by_case.get((workload, basis))
                if row is None or base is None:
                    continue
                unit, y = base["median_s"], place + (index - (len(names) - 1) / 2) * 0.15
                colour = PALETTE[index]
                axis.plot([unit / row["p80_s"], unit / row["p20_s"]], [y, y], color=colour, linewidth=1.5)
                axis.plot(
                    unit / row["median_s"],
                    y,
                    "o" if ours else "D",
                    color=colour,
                    markerfacecolor=colour if ours else "white",
                    markersize=6,
                    **drawn,
                )
                drawn = {}
        axis.axvline(1.0, color="black", linewidth=0.9)
        axis.set_xscale("log")
        axis.grid(axis="x", alpha=0.3, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=2, frameon=False)
    low, high = axes[0, 0].get_xlim()
    marks = [m for m in (0.25, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24) if low <= m <= high]
    axes[0, 0].xaxis.set_major_locator(FixedLocator(marks))
    axes[0, 0].xaxis.set_minor_locator(NullLocator())
    axes[0, 0].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} x"))
    axes[0, 0].set_yticks(range(len(workloads)), workloads)
    axes[0, 0].set_ylim(len(workloads) - 0.5, -0.5)
    figure.suptitle(f"{machine_name(results)}: whole models, speed over {basis} in float32", fontsize=11)
    return _save(figure, path)


def _roofline(rows: list[Row], results: dict[str, Any], path: Path) -> Path:
    """Useful operations per second over operations per byte that has to move, under the roof of what is multiplied; a
    marker for each workload."""
    shown = {name: PALETTE[i] for i, name in enumerate(_ROOFLINE) if any(row["contender"] == name for row in rows)}
    # Of rounded weights it has to be known what their products take.
    rows = [row for row in rows if row["contender"] in shown and (row.get("arithmetic") or not row["weights"])]
    workloads = list(dict.fromkeys(row["batch"]["name"] for row in rows))
    markers = dict(zip(workloads, _MARKERS * 2, strict=False))
    figure, axis = plt.subplots(figsize=(9, 6), layout="constrained")
    roofs = {what: compute_roof(results["roofs"], what) for what in dict.fromkeys(map(_arithmetic, rows))}
    roofs = {what: roof for what, roof in roofs.items() if roof}
    rows = [row for row in rows if _arithmetic(row) in roofs]
    top = max(roofs, key=lambda what: roofs[what])
    draw_roofs(axis, results["roofs"], roofs[top], [row["flops"] / row["bytes"] for row in rows], _ROOFS[top])
    for what, roof in roofs.items():
        if what != top:
            axis.axhline(roof, linestyle=":", color="#555555", linewidth=1.1)
            axis.annotate(
                f"{_ROOFS[what]}: {operations(roof)}",
                (axis.get_xlim()[0], roof),
                (4, 2),
                textcoords="offset points",
                fontsize=8,
            )
    for row in rows:
        axis.plot(
            row["flops"] / row["bytes"],
            row["flops_per_s"],
            markers[row["batch"]["name"]],
            color=shown[row["contender"]],
            markerfacecolor=shown[row["contender"]] if row["ours"] else "none",
            markersize=8 if row["ours"] else 7,
        )
    for workload, marker in markers.items():
        axis.plot([], [], marker, color="#333333", label=workload)
    for name, colour in shown.items():
        if not any(row["contender"] == name for row in rows):
            continue
        axis.plot([], [], "s", color=colour, label=name)
    axis.set_ylim(min(row["flops_per_s"] for row in rows) / 2, roofs[top] * 1.6)
    axis.set_title(f"{machine_name(results)}: whole models under the roofs of the same run\nfilled: ours", fontsize=11)
    axis.legend(fontsize=8, loc="lower right", ncols=2)
    return _save(figure, path)


_ROOFLINE = ("ours", "ours, bfloat16 model", "ours int8-dynamic", "HF sdpa", "OpenVINO bfloat16")
_ROOFS = {
    "float32": "float32 products",
    "three parts": "products in three parts",
    "bfloat16": "bfloat16 products",
    "int8": "int8 products",
}


def _arithmetic(row: Row) -> str:
    return row.get("arithmetic") or "float32"


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
