"""The ops in plain torch: their definition, the oracle of the tests (in float64), and what runs when nothing else
can.

Internal arithmetic is float32 for float32, bfloat16 and float16 inputs and float64 for float64.
"""

from __future__ import annotations

from roberta_kernels.schemas import kernels_of

KERNELS = kernels_of(__name__)


def available() -> tuple[bool, str]:
    """(True, what runs): plain torch is always there."""
    return True, "plain torch"
