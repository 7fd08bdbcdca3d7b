"""One module for each op, named as the op.

Each has `problem(case)` (the data), `cost(case)` (the useful work), `ours(problem)`, `eager(problem)` and PEERS (what
else torch offers for it).
"""

from __future__ import annotations

import importlib

from roberta_kernels import schemas

OPS = {op: importlib.import_module(f"benchmarks.ops.{op}") for op in schemas.OPS}
