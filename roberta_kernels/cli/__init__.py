"""The command `roberta-kernels`: what is here, a demo, does the promise hold for a model, a corpus into
embeddings, and the benchmarks.

Exit codes: 0 all is well; 1 the promise is broken, or the answer could not be written; 2 the request cannot be carried
out (one line says why); 130 interrupted.
"""

from __future__ import annotations

import contextlib
import signal
import sys

__all__ = ["main"]


def main() -> None:
    """Runs the command, and ends the process with its exit code."""
    try:
        from roberta_kernels.cli import console

        console.keep_closed_streams_closed()
        signal.signal(signal.SIGINT, console.end_at_once)
        code = _exit_code()
        signal.signal(signal.SIGINT, console.end_at_once)
        problem = console.finish_streams()
        if problem is not None and code == 0:
            code = console.NOT_WRITTEN
            with contextlib.suppress(OSError):
                console.say(f"error: {problem}")
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _exit_code() -> int | str | None:
    from roberta_kernels.cli import commands, console

    try:
        commands.app()
    except SystemExit as end:
        return end.code or 0
    except OSError as error:  # of the streams: commands see to their files
        with contextlib.suppress(OSError):
            console.say(f"error: {error}")
        return console.NOT_WRITTEN
    return 0
