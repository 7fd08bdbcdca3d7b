"""What the commands print on, and how one that cannot be carried out ends: with one line that says why."""

from __future__ import annotations

from typing import NoReturn

import typer
from rich.console import Console
from rich.text import Text

BROKEN, BAD_REQUEST, INTERRUPTED = 1, 2, 130

out = Console(highlight=False)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def fail(message: str) -> NoReturn:
    err.print(Text("error: ", "bold red") + Text(" ".join(message.split())))
    raise typer.Exit(BAD_REQUEST)


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
