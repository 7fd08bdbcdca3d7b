"""What every result file has: how it is written, and the commit in it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the GPU suite writes results where there is no rich
    from rich.console import Console

ROOT = Path(__file__).parents[1]


def save(path: Path, results: dict[str, Any]) -> None:
    """As JSON; a reader finds the old file or the new one, never half of one."""
    beside = path.with_suffix(".tmp")
    text = json.dumps(results, indent=1)
    # Lists of numbers on one line: they are most of the file.
    text = re.sub(r"\[([-+.\deE,\s]+)\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    beside.write_text(text + "\n")
    beside.replace(path)


def finish(path: Path, results: dict[str, Any], lines: Iterable[str], console: Console) -> None:
    """The end of a benchmark: its results in a file, whose folder is there, and in words."""
    save(path, results)
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def commit() -> dict[str, Any]:
    """The commit of the tree, from git or from RK_SUITE_COMMIT where the tree came without its history."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    given = os.environ.get("RK_SUITE_COMMIT")
    if given:
        return {"id": given, "dirty": False}
    found = git("rev-parse", "HEAD")
    if found is None:
        return {"id": "unknown", "dirty": True}
    return {"id": found, "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
