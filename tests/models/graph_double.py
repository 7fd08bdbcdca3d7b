"""What stands in for CUDA graphs where there is no GPU: a recording of ops, replayed without the code that called them.

As a graph it holds addresses and sizes: a replay reads the memory that was read when it was recorded, and writes what
was written, whatever has become of the tensors since.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class _Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = tree_map_only(Tensor, Tensor.detach, ((args, kwargs or {}), out))
        self.calls.append((func, given, made))
        return out


class OpRecorder:
    """A Recorder. recorded, replayed: how often. fails: raised in the place of recording."""

    def __init__(self, fails: Exception | None = None) -> None:
        self.recorded = self.replayed = 0
        self.fails = fails
        self.inside = threading.Lock()

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        if self.fails is not None:
            raise self.fails
        run()
        with _Ops() as ops:
            out = run()
        self.recorded += 1

        def replay() -> None:
            assert self.inside.locked(), "not alone"
            self.replayed += 1
            with torch.no_grad():
                for func, (args, kwargs), made in ops.calls:
                    again = func(*args, **kwargs)
                    for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                        if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                            old.copy_(new)

        return replay, out

    @contextlib.contextmanager
    def alone(self, buffers: list[Tensor]) -> Any:
        assert buffers
        assert self.inside.acquire(blocking=False), "two at once"
        try:
            yield
        finally:
            self.inside.release()
