"""The options of a run, declared once for both front ends: `python -m benchmarks run` and `pytest benchmarks`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from benchmarks.workloads import BATCHES, DIRECTIONS, DTYPES, OPS, SIZES

_OPTIONS: dict[str, dict[str, Any]] = {
    "--quick": {"action": "store_true", "help": "small shapes and few calls: proves that it runs, measures nothing"},
    "--everything": {"action": "store_true", "help": "the whole grid of sizes, dtypes and batches"},
    "--device": {"choices": ("cpu", "cuda"), "help": "default: cuda where torch has one"},
    "--backend": {
        "action": "append",
        "choices": ("cuda", "triton", "cpu", "reference"),
        "help": "backend to measure (repeatable, as the following); default: all kernels for the device",
    },
    "--op": {"action": "append", "choices": OPS, "help": "only this op"},
    "--size": {"action": "append", "choices": tuple(SIZES)},
    "--batch": {"action": "append", "choices": tuple(BATCHES)},
    "--direction": {"action": "append", "choices": DIRECTIONS},
    "--dtype": {"action": "append", "choices": tuple(DTYPES)},
    "--no-compile": {"action": "store_true", "help": "leave torch.compile out"},
    "--no-rotation": {"action": "store_true", "help": "on a GPU: one set of inputs, which the L2 cache may hold"},
}


def add_options(add: Callable[..., Any]) -> None:
    """add: argparse's add_argument, or addoption of a pytest group."""
    for flag, keywords in _OPTIONS.items():
        add(flag, **keywords)


def as_arguments(values: argparse.Namespace) -> list[str]:
    """The command line that gives these values."""
    found = []
    for flag in _OPTIONS:
        value = getattr(values, flag[2:].replace("-", "_"))
        if value is True:
            found.append(flag)
        else:
            for item in value if isinstance(value, list) else [value] if value else []:
                found += [flag, item]
    return found
