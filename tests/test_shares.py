"""Every test is in one share, and what takes long in a file in one together."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import shares


def item(nodeid, *marks):
    return SimpleNamespace(nodeid=nodeid, get_closest_marker=lambda name: name in marks)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_test_is_in_one_share(count):
    keys = [shares.key_of(item(f"tests/test_x.py::test_y[{i}]")) for i in range(300)]
    parts = [[key for key in keys if shares.is_in(key, (number + 1, count))] for number in range(count)]
    assert sorted(itertools.chain(*parts)) == sorted(keys)
    assert min(map(len, parts)) > 200 / count


def test_long_tests_of_a_file_have_one_share():
    assert len({shares.key_of(item(f"tests/test_x.py::test_y[{i}]", "full")) for i in range(9)}) == 1


@pytest.mark.parametrize("text", ["1/3", "3/3", "1/1"])
def test_shares(text):
    assert shares.share(text) == (int(text[0]), int(text[2]))


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/10", ""])
def test_what_is_no_share(text):
    with pytest.raises(pytest.UsageError, match="--share must be"):
        shares.share(text)
