"""What `make test` leaves out holds no pair of values, or value, that it does not have in another combination."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

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


def test_an_interpreter_keeps_what_nothing_else_has():
    def item(kernels, dtype, p):
        served = SimpleNamespace(factors={"kernels": kernels, "dtype": dtype}, interpreted=kernels == "slow")
        marks = []
        callspec = SimpleNamespace(params={"served": served, "p": p})
        return SimpleNamespace(
            nodeid="tests/ops/test_x.py::test[x]", callspec=callspec, add_marker=marks.append, marks=marks
        )

    rows = list(itertools.product(("slow", "quick"), "abc", (1, 2, 3)))
    items = [item(*row) for row in rows]
    covering.mark(items)
    kept = [row for row, one in zip(rows, items, strict=True) if not one.marks]
    assert sum(kernels == "slow" for kernels, _, _ in kept) == 5
    assert sum(kernels == "quick" for kernels, _, _ in kept) == 9
