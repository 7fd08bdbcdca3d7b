"""Which variants of the CUDA kernels ran: a call that a variant does not take goes to one below it."""

from __future__ import annotations

from roberta_kernels import backends
from roberta_kernels.backends import choosing


class Served:
    """A context; when it has ended, `by_op` holds the variants that ran calls inside, of each op that has some."""

    def __init__(self) -> None:
        self.by_op: dict[str, list[str]] = {}

    def __enter__(self) -> Served:
        self._before = {op: backends.cuda_served(op) for op in choosing.VARIANTS}
        return self

    def __exit__(self, *_: object) -> None:
        for op, before in self._before.items():
            after = backends.cuda_served(op)
            served = dict.fromkeys(variant for (variant, way), count in after.items() if count != before[variant, way])
            if served:
                self.by_op[op] = list(served)
