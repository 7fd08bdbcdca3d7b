"""One module for each op, named as the op.

Each has `problem(case)` (the data), `cost(case)` (the useful work), `ours(problem)`, `eager(problem)` and PEERS (what
else torch offers for it).
"""

from __future__ import annotations

from benchmarks.ops import add_layer_norm, attention, embedding_layer_norm, gelu_ffn

OPS = {
    "attention": attention,
    "add_layer_norm": add_layer_norm,
    "gelu_ffn": gelu_ffn,
    "embedding_layer_norm": embedding_layer_norm,
}
