"""torch.set_float32_matmul_precision for the kernels that can multiply float32 in fewer steps than float32 takes.

That is the instruction set "amx" (docs/design.md, section 10): "highest", torch's default, is float32; "high" keeps two
bfloat16 parts of each number, "medium" one. Other kernels always multiply float32. In a traced graph it is always
"highest".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_PARTS = {"high": 2, "medium": 1}


def call(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), which may run a kernel of the CPU namespace, at the precision in force."""
    if torch.compiler.is_compiling() or torch.get_float32_matmul_precision() not in _PARTS:
        return function(*args)
    return call_in_parts(_PARTS[torch.get_float32_matmul_precision()], function, *args)


def call_in_parts(parts: int, function: Callable[..., Any], *args: Any) -> Any:
    """The same with that many bfloat16 parts of a float32 number where kernels can, whatever precision is in force."""
    set_parts = getattr(torch.ops.roberta_kernels_cpu, "set_float32_parts", None)
    if set_parts is None:  # no compiled kernels
        return function(*args)
    before = set_parts(parts)
    try:
        return function(*args)
    finally:
        set_parts(before)
