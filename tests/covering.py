"""Of a test with many parameters, the combinations that `make test` runs: every pair of values, not every product.

A fault that shows in one combination alone is seldom; that one value, or two together, do not go is what tests find. So
of each test those combinations stay in which a pair of values comes first, and all others get the mark `full`
(`make test-full`). A test with one or two parameters keeps all.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import pytest


def factors(item: pytest.Item) -> Iterator[tuple[str, Hashable]]:
    """A combination's parameters, (name, value). What has `factors` of its own counts as these."""
    callspec = getattr(item, "callspec", None)
    for name, value in callspec.params.items() if callspec is not None else ():
        if hasattr(value, "factors"):
            yield from ((f"{name}.{part}", of_it) for part, of_it in value.factors.items())
            continue
        try:
            hash(value)
            yield name, (type(value), value)
        except TypeError:
            yield name, id(value)  # one object for all the combinations that it is in


def beyond_pairs(combinations: Iterable[Iterable[tuple[str, Hashable]]]) -> Iterator[bool]:
    """Of each combination: whether those before it hold every pair of its values."""
    seen: set[Any] = set()
    for combination in combinations:
        values = sorted(combination, key=lambda one: one[0])
        pairs = set(itertools.combinations(values, 2)) if len(values) > 1 else {tuple(values)}
        yield len(values) > 2 and pairs <= seen
        seen |= pairs


def mark(items: list[pytest.Item]) -> None:
    """Adds the mark `full` to what is beyond pairs."""
    tests = defaultdict(list)
    for item in items:
        tests[item.nodeid.partition("[")[0]].append(item)
    for combinations in tests.values():
        for item, beyond in zip(combinations, beyond_pairs(map(factors, combinations)), strict=True):
            if beyond:
                item.add_marker("full")
