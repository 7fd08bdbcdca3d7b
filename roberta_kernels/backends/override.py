"""Which backend was asked for: by `with backend(...)` in this context, else for the whole process.

A block concerns the context that it is in (contextvars): one thread, one asyncio task. So two threads, each with a
model of another backend, do not meet. A block that has ended has no effect anywhere, in whatever order blocks end
(generators and tasks end them in any) and wherever they do: it is marked as ended, and not merely taken off the context
that it ends in. A thread starts without blocks; a task inherits those of its maker, until they end.

Tracing. Dynamo can neither read nor set a ContextVar. What it can do is read an attribute and compare it again before
each use of the graph: `in_force`, which this module computes when it is asked for (`__getattr__` below). A block inside
of the traced code is kept beside the context, in `_traced`, which only the trace looks at: the ops in the graph are
then those of that backend, and nothing of the block is left to happen when the graph runs. torch.export, where it runs
the code itself, needs none of this.
"""

from __future__ import annotations

import os
import sys
import threading
from contextvars import ContextVar
from types import TracebackType
from typing import Any

from torch.compiler import is_dynamo_compiling

from roberta_kernels.backends.op_namespaces import BackendError, available_backends, status_of

ENVIRONMENT_VARIABLE = "ROBERTA_KERNELS_BACKEND"
FROM_ENVIRONMENT = os.environ.get(ENVIRONMENT_VARIABLE, "auto")  # unchecked: importing the package does not fail
_this = sys.modules[__name__]


class _Asked:
    """That a block asked for a backend: a link of the chain of blocks that a context is in."""

    __slots__ = ("ended", "name", "outer")

    def __init__(self, name: str, outer: _Asked | None) -> None:
        self.name, self.outer, self.ended = name, outer, False


class _Traced(threading.local):
    """The backend of the innermost block inside of the code that this thread traces."""

    def __init__(self) -> None:
        self.name: str | None = None


_innermost: ContextVar[_Asked | None] = ContextVar("roberta_kernels_backend", default=None)
_traced = _Traced()
_default = FROM_ENVIRONMENT  # for the whole process


def check(name: str) -> None:
    """Raises BackendError where no backend has that name ("auto" included), or where it is not available."""
    status = status_of(name)
    if status is not None and not status:
        raise BackendError(f"backend {name!r} is not available: {status.detail}")
    if status is None and name != "auto":
        raise BackendError(f"unknown backend {name!r}: one of auto, {', '.join(available_backends())}")


def check_environment() -> None:
    """Raises BackendError where the environment variable holds what `check` refuses."""
    try:
        check(FROM_ENVIRONMENT)
    except BackendError as error:
        raise BackendError(f"{ENVIRONMENT_VARIABLE}={FROM_ENVIRONMENT}: {error}") from None


def __getattr__(attribute: str) -> Any:
    if attribute == "in_force":
        return _in_force()
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")


def _in_force() -> str:
    asked = _living(_innermost.get())
    return _default if asked is None else asked.name


def current_backend() -> str:
    """What was asked for here: by the innermost block of this context, else by set_backend or the environment variable,
    else "auto".
    """
    if is_dynamo_compiling():
        return _traced.name or _this.in_force
    asked = _innermost.get()
    return _default if asked is None else _in_force()


def set_backend(name: str) -> str:
    """Uses `name` ("auto", "cuda", "triton", "cpu" or "reference") from now on in the whole process, wherever no
    `with backend(...)` block says otherwise; returns what it was before.

    Raises BackendError for an unknown or unavailable backend.
    """
    global _default
    check(name)
    before, _default = _default, name
    return before


class backend:
    """`with backend("reference"): ...` uses that backend inside the block, in this thread or asyncio task.

    A thread that is started inside, a pool's worker too, does not take part: it opens a block of its own, or the whole
    process is set to (set_backend). A task that is made inside takes part until the block ends.

    Raises BackendError, when the block is entered, for an unknown or unavailable backend.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._asked: _Asked | None = None
        self._outer_traced: str | None = None

    def __enter__(self) -> None:
        if is_dynamo_compiling():
            self._outer_traced, _traced.name = _traced.name, self.name
            return
        if self._asked is not None:
            raise RuntimeError(f"this block of backend({self.name!r}) is entered already: make another")
        check(self.name)
        self._asked = _Asked(self.name, _living(_innermost.get()))
        _innermost.set(self._asked)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._asked is None:
            _traced.name = self._outer_traced
            return
        self._asked.ended = True
        _innermost.set(_living(_innermost.get()))
        self._asked = None


def _living(asked: _Asked | None) -> _Asked | None:
    """The innermost block that has not ended."""
    while asked is not None and asked.ended:
        asked = asked.outer
    return asked
