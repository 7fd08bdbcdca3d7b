"""An invented release of transformers: the installed one under another path, with a few of its files edited.

Only folders with an edited file are made; all else in them is a link to what is installed, which nothing here writes
to. So one costs some hundred links and a few milliseconds.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping
from pathlib import Path

# The text of a file -> the text that the invented release has in its place.
Edit = Callable[[str], str]


def installed() -> Path:
    """The folder of the transformers that this interpreter imports."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def make(
    target: Path, edits: Mapping[str, Edit], *, moved: Mapping[str, str] | None = None, source: Path | None = None
) -> Path:
    """Makes `target`/transformers, and returns `target`, which goes in front of sys.path.

    Args:
        edits: path in the package -> what is done to that file.
        moved: path in the package -> another path in the same folder, for files that are renamed.
        source: the package that is edited; the installed one if None.

    Raises ValueError for an edit that changes nothing: it would test the installed release.
    """
    source = source or installed()
    moved = dict(moved or {})
    folders = {Path(".")}
    for path in (*edits, *moved):
        folders.update(Path(path).parents)
    for folder in sorted(folders, key=lambda folder: len(folder.parts)):
        (target / "transformers" / folder).mkdir(parents=True)
        for entry in (source / folder).iterdir():
            relative = folder / entry.name
            name = str(relative)
            # Compiled files of edited sources must not be found, and none must be written beside the installed ones.
            if entry.name == "__pycache__" or relative in folders or name in edits or name in moved:
                continue
            (target / "transformers" / relative).symlink_to(entry)
    for path in {*edits, *moved}:
        text = (source / path).read_text()
        edited = edits[path](text) if path in edits else text
        if edited == text and path not in moved:
            raise ValueError(f"the edit of {path} changes nothing")
        (target / "transformers" / moved.get(path, path)).write_text(edited)
    return target


def sub(pattern: str, replacement: str | Callable[[re.Match[str]], str], *, times: int | None = None) -> Edit:
    """re.sub in lines and across them. times: how often the pattern must be there; None: at least once."""

    def edit(text: str) -> str:
        edited, found = re.subn(pattern, replacement, text, flags=re.MULTILINE)
        if found == 0 or (times is not None and found != times):
            raise ValueError(f"{pattern!r} must be there {times or 'at least once'}, got {found}")
        return edited

    return edit


def word(old: str, new: str) -> Edit:
    """A name as a whole word becomes another; not where it is an attribute, or a string."""
    return sub(rf'(?<![\w."]){old}\b', new)


def chain(*edits: Edit) -> Edit:
    """One edit after the other."""

    def edit(text: str) -> str:
        for one in edits:
            text = one(text)
        return text

    return edit


def within(start: str, edit: Edit) -> Edit:
    """The edit in one block only: the line that begins with `start`, and those after it that are indented further."""

    def edit_block(text: str) -> str:
        found = re.search(rf"^([ ]*){re.escape(start)}.*\n(?:(?:\1[ )].*)?\n)*", text, flags=re.MULTILINE)
        if found is None:
            raise ValueError(f"no line begins with {start!r}")
        return text[: found.start()] + edit(found.group()) + text[found.end() :]

    return edit_block
