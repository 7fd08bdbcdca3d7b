"""`roberta-kernels demo`: real text embedded and a model trained, original against patched.

Needs no download and no GPU. What it claims it also checks: `run` returns False where an answer differs by more than
rounding explains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from roberta_kernels.lazy import attributes

if TYPE_CHECKING:
    from roberta_kernels.demo.options import Options
    from roberta_kernels.demo.stages import DemoError, run

__all__ = ["DemoError", "Options", "run"]

__getattr__, __dir__ = attributes(__name__, {"Options": "options", "DemoError": "stages", "run": "stages"})
