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

import roberta_kernels as rk
from roberta_kernels.encoder_call import EncoderCall
from roberta_kernels.hf.layer import FastLayer
from roberta_kernels.hf.state import PatchState
from roberta_kernels.quantized import QuantizedCall

counts: Counter[str] = Counter()
fallbacks: Counter[str] = Counter()


def _counted(cls: Any, name: str, note: Any) -> None:
    """Has note called before the method, with the same arguments."""
    original = getattr(cls, name)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        note(self, *args)
        return original(self, *args, **kwargs)

    setattr(cls, name, method)


def _layer_by_itself() -> None:
    """A layer may run as an op call, which counts its layers: but it is one call, in whichever way it runs."""
    original = FastLayer._rk_forward

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = counts["attention calls"]
        try:
            return original(self, *args, **kwargs)
        finally:
            counts["attention calls"] = before + 1

    FastLayer._rk_forward = method


def _feed_forward(layer: Any, choice: Any, hidden_states: Any) -> None:
    counts["feed-forward calls"] += 1
    counts["feed-forward fused"] += choice.reason is None


def _op_call(call: Any, *_: Any) -> None:
    """Through all layers of a model, or through one."""
    for what in ("attention calls", "attention fused", "feed-forward calls", "feed-forward fused"):
        counts[what] += call.layer_count


def _fell_back(state: Any, module: Any, reason: str) -> None:
    fallbacks[f"{type(module).__name__}: {reason}"] += 1


def pytest_configure(config: Any) -> None:
    _layer_by_itself()
    _counted(FastLayer, "_rk_attention", lambda *_: counts.update(["attention fused"]))
    _counted(FastLayer, "_rk_feed_forward", _feed_forward)
    for call in (EncoderCall, QuantizedCall):
        _counted(call, "run", _op_call)
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
