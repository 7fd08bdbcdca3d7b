"""A pytest plugin that runs transformers' own tests with every model patched, and counts what ran fused.

In a checkout of transformers at the installed version, with this folder's path in PYTHONPATH:

    python -m pytest -p upstream_plugin tests/models/roberta/test_modeling_roberta.py

Without `-p upstream_plugin` the same command is the run to compare with. Under pytest-xdist each worker counts for
itself and none reports, so leave `-n` out for the counts.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

from roberta_kernels.layers import FastLayer, PatchState
from roberta_kernels.packed_weights import Plan

import roberta_kernels as rk

counts: Counter[str] = Counter()
fallbacks: Counter[str] = Counter()


def _counted(cls: Any, name: str, note: Any) -> None:
    original = getattr(cls, name)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        note(self, *args)
        return original(self, *args, **kwargs)

    setattr(cls, name, method)


def _feed_forward(layer: Any, hidden_states: Any) -> None:
    counts["feed-forward calls"] += 1
    counts["feed-forward fused"] += layer.feed_forward_reason(hidden_states) is None


def _plan_run(plan: Any, *_: Any) -> None:
    """One op call: through all layers of a model, or through one, whose call was counted before."""
    layers = plan._layer_count
    counts["attention calls"] += layers
    for what in ("attention fused", "feed-forward calls", "feed-forward fused"):
        counts[what] += layers or 1


def _fell_back(state: Any, module: Any, reason: str) -> None:
    fallbacks[f"{type(module).__name__}: {reason}"] += 1


def pytest_configure(config: Any) -> None:
    _counted(FastLayer, "forward", lambda *_: counts.update(["attention calls"]))
    _counted(FastLayer, "fused_attention", lambda *_: counts.update(["attention fused"]))
    _counted(FastLayer, "feed_forward_chunk", _feed_forward)
    _counted(Plan, "run", _plan_run)
    _counted(PatchState, "fell_back", _fell_back)
    rk.patch_transformers()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section("roberta_kernels")
    for half in ("attention", "feed-forward"):
        calls, fused = counts[f"{half} calls"], counts[f"{half} fused"]
        share = f" ({fused / calls:.1%})" if calls else ""
        terminalreporter.line(f"{half}: {fused} of {calls} calls of a layer ran fused{share}")
    for reason, calls in fallbacks.most_common():
        terminalreporter.line(f"{calls:6} {reason}")
