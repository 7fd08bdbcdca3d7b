"""`--share 2/3`: the second of three shares of the tests, for those that are too many for every commit.

A test's share follows from its name, so that it stays the same when others come and go. The tests of a file that take
long have one share: what takes long is often what they have in common.
"""

from __future__ import annotations

import re
import zlib

import pytest


def share(text: str) -> tuple[int, int]:
    """ "2/3" -> (2, 3)."""
    match = re.fullmatch(r"([1-9])/([1-9])", text)
    if match is None or int(match[1]) > int(match[2]):
        raise pytest.UsageError(f"--share must be as 1/3, 2/3 or 3/3, got {text!r}")
    return int(match[1]), int(match[2])


def key_of(item: pytest.Item) -> str:
    """Before covering.mark: the mark `full` is then that of a test which takes long."""
    return item.nodeid.partition("::")[0] if item.get_closest_marker("full") else item.nodeid


def is_in(key: str, share: tuple[int, int]) -> bool:
    number, shares = share
    return zlib.crc32(key.encode()) % shares == number - 1
