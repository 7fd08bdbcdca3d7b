"""The progress bar of encode()."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from roberta_kernels.encoding.sources import Source


class Bar:
    def __init__(self, progress: Any, task: Any) -> None:
        self._progress, self._task = progress, task
        self._texts = self._tokens = 0

    def update(self, texts: int, tokens: int) -> None:
        if self._progress is None:
            return
        self._texts += texts
        self._tokens += tokens
        elapsed = self._progress.tasks[0].elapsed or 0.0
        rate = f"{self._tokens / elapsed:,.0f} tokens/s" if elapsed > 0.5 else ""
        self._progress.update(self._task, completed=self._texts, rate=rate)


@contextlib.contextmanager
def progress_bar(wanted: bool, source: Source) -> Iterator[Bar]:
    if not wanted:
        yield Bar(None, None)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        *("encoding", BarColumn(30), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")),
        *(TimeElapsedColumn(), TimeRemainingColumn()),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield Bar(progress, progress.add_task("encoding", total=source.rows, rate=""))
