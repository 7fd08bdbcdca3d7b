"""What `make test` leaves out holds no pair of values that it does not have in another combination."""

from __future__ import annotations

import itertools

import covering
import pytest

MATRICES = [(2, 3, 4), (5, 2, 10, 4, 2), (6, 2, 5), (3, 3, 3, 3)]


def combinations(sizes):
    return [tuple((f"p{i}", v) for i, v in enumerate(row)) for row in itertools.product(*map(range, sizes))]


def pairs(rows):
    return {pair for row in rows for pair in itertools.combinations(row, 2)}


@pytest.mark.parametrize("sizes", MATRICES, ids=str)
def test_every_pair_stays(sizes):
    rows = combinations(sizes)
    kept = [row for row, beyond in zip(rows, covering.beyond_pairs(rows), strict=True) if not beyond]
    assert pairs(kept) == pairs(rows)
    assert len(kept) < len(rows)


@pytest.mark.parametrize("sizes", [(7,), (4, 5)], ids=str)
def test_one_or_two_parameters_stay_whole(sizes):
    assert not any(covering.beyond_pairs(combinations(sizes)))
