"""Of a test with many parameters, the combinations that `make test` runs: every pair of values, not every product. Of
the tests of models, where each takes a second or more: every value.

A fault that shows in one combination alone is seldom; that one value, or two together, do not go is what tests find. So
of each test those combinations stay in which a pair, or a value, comes first, and all others get the mark `full`
(`make test-full`). Of the tests of ops and kernels, one with one or two parameters keeps all. What an interpreter runs
comes last, as it takes longest: it keeps the pairs that nothing else has.
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


def beyond(combinations: Iterable[Iterable[tuple[str, Hashable]]], together: int) -> Iterator[bool]:
    """Of each combination: whether those before it hold every `together` of its values that stand in it."""
    seen: set[Any] = set()
    for combination in combinations:
        values = sorted(combination, key=lambda one: one[0])
        groups = set(itertools.combinations(values, min(together, len(values))))
        yield len(values) > together and groups <= seen
        seen |= groups


def interpreted(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    return callspec is not None and any(getattr(value, "interpreted", False) for value in callspec.params.values())


def mark(items: list[pytest.Item]) -> None:
    """Adds the mark `full` to what is beyond pairs, or beyond values."""
    tests = defaultdict(list)
    for item in items:
        tests[item.nodeid.partition("[")[0]].append(item)
    for name, combinations in tests.items():
        together = 1 if name.startswith("tests/models/") else 2
        combinations.sort(key=interpreted)
        for item, more in zip(combinations, beyond(map(factors, combinations), together), strict=True):
            if more:
                item.add_marker("full")
