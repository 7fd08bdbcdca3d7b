"""What the commands print on, and how one that cannot be carried out ends: with one line that says why."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

import typer
from rich.console import Console
from rich.text import Text

BROKEN, NOT_WRITTEN, BAD_REQUEST, INTERRUPTED = 1, 1, 2, 130

out = Console(highlight=False)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def say(message: str, style: str = "yellow") -> None:
    """A line on stderr."""
    err.print(Text(message, style))


def fail(message: str) -> NoReturn:
    err.print(Text("error: ", "bold red") + Text(" ".join(message.split())))
    raise typer.Exit(BAD_REQUEST)


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


# -- interrupts and streams that cannot be written ---------------------------------------------------------------------


def end_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """The handler of Ctrl-C while modules are imported and weights are read. There is nothing to save yet, and an
    exception out of the middle of an import may be taken for another, or be printed and forgotten."""
    os._exit(INTERRUPTED)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Work that Ctrl-C ends by KeyboardInterrupt, so that it can save what it has."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def keep_closed_streams_closed() -> None:
    """A standard stream that is closed leaves its number to the next file that is opened, which a library that prints
    would then write to: the output, say."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def finish_streams() -> str | None:
    """Writes out what is still in stdout and stderr; what went wrong with stdout. Nothing is left for the interpreter,
    which would end in a message of its own."""
    problem = "standard output is closed" if sys.stdout is None else None
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError) as error:
            if number == 1:
                problem = f"cannot write to standard output: {error}"
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)  # takes what the stream still holds
    return problem
