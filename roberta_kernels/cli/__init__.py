"""The command `roberta-kernels`: what is here, a demo, does the promise hold for a model, a corpus into
embeddings, and the benchmarks.

Exit codes: 0 all is well; 1 the promise is broken; 2 the request cannot be carried out (one line says why);
130 interrupted.
"""

from __future__ import annotations

from roberta_kernels.cli.commands import app

__all__ = ["app", "main"]


def main() -> None:
    app()
