"""What `make test` leaves out holds no pair of values, or value, that it does not have in another combination."""

from __future__ import annotations

import itertools

import covering
import pytest

MATRICES = [(2, 3, 4), (5, 2, 10, 4, 2), (6, 2, 5), (3, 3, 3, 3)]


def combinations(sizes):
    return [tuple((f"p{i}", v) for i, v in enumerate(row)) for row in itertools.product(*map(range, sizes))]


def groups(rows, together):
    return {group for row in rows for group in itertools.combinations(row, together)}


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("sizes", MATRICES, ids=str)
def test_every_group_of_values_stays(sizes, together):
    rows = combinations(sizes)
    kept = [row for row, more in zip(rows, covering.beyond(rows, together), strict=True) if not more]
    assert groups(kept, together) == groups(rows, together)
    assert len(kept) < len(rows)


@pytest.mark.parametrize("sizes", [(7,), (4, 5)], ids=str)
def test_one_or_two_parameters_stay_whole(sizes):
    assert not any(covering.beyond(combinations(sizes), 2))
