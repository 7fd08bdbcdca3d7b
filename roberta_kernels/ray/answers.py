"""What comes back from the tasks of a run: values, or why there are none.

Of an exception in a task Ray keeps the text, in the middle of its own. What a task refuses for a reason of ours comes
back as a row like any other, and is raised where the run was started.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from roberta_kernels.encoding.sources import EncodingError

REFUSALS: tuple[type[Exception], ...] = (ValueError, TypeError, OSError)  # EncodingError among them


def answer(work: Callable[[], Any], refusals: tuple[type[Exception], ...] = REFUSALS) -> dict[str, str]:
    """A row for `values`. work: gives JSON values; refusals: what it may raise for a reason of ours."""
    try:
        found = {"value": work()}
    except refusals as error:
        found = {"refused": str(error)}
    return {"answer": json.dumps(found)}


def values(dataset: Any) -> Iterator[Any]:
    """Those of the rows, as they come. Raises EncodingError for the first that is refused, which ends the run."""
    for row in dataset.iter_rows():
        found = json.loads(row["answer"])
        if "refused" in found:
            raise EncodingError(found["refused"])
        yield found["value"]
