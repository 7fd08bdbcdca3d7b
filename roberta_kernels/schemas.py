"""The list of ops, from schemas.def: every other place that needs it reads it here.

In a package of Python kernels, and in csrc/, tests/ops/ and benchmarks/ops/, an op has a module of its name. What is
made of the list (KERNELS of such a package, the choosing table's ops, the cases of the benchmarks) cannot miss one;
tests/ops/test_op_list.py holds the rest to it.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

_FORWARD = "_forward"


@functools.cache
def schemas() -> dict[str, str]:
    """Registered name (attention_forward, attention_backward, ...) -> schema, in the order of schemas.def."""
    text = (Path(__file__).parent / "schemas.def").read_text()
    found = re.findall(r'^RK_SCHEMA\("((\w+)\(.*)"\)$', text, re.MULTILINE)
    return {name: schema for schema, name in found}


# "attention", "add_layer_norm", ...: each is registered as <op>_forward and <op>_backward.
OPS: tuple[str, ...] = tuple(name.removesuffix(_FORWARD) for name in schemas() if name.endswith(_FORWARD))


def kernels_of(package: str) -> dict[str, Callable[..., Any]]:
    """The functions of a package of Python kernels: registered name -> the function of that name in the op's module."""
    found = {}
    for op in OPS:
        module = importlib.import_module(f"{package}.{op}")
        for name in (f"{op}_forward", f"{op}_backward"):
            found[name] = getattr(module, name)
    return found
