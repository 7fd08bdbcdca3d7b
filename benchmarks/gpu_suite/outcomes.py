"""A pytest plugin for the suite (`-p benchmarks.gpu_suite.outcomes`): every outcome goes to a file as it comes, so that
a run that is stopped, or dies with the GPU, has written what it had; at the end, which variants of the kernels ran.

It also takes a part of the tests. Environment:

RK_SUITE_OUTCOMES  the file
RK_SUITE_BACKEND   "cuda" or "triton": only tests of that backend; "others": those of neither
RK_SUITE_SHARD     "i/n": of n equal parts, in their order, the one numbered i from 0. Neighbours mostly need the same
                   kernels, so the parts compile different ones.
RK_SUITE_TAKE      so many tests, spread evenly over those selected
RK_SUITE_VARIANT   "op=variant" of the CUDA library to run them with; that it ran none of them is a failure
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

_FORCED = os.environ.get("RK_SUITE_VARIANT", "")


def _write(event: dict[str, Any]) -> None:
    with open(os.environ["RK_SUITE_OUTCOMES"], "a") as stream:
        stream.write(json.dumps(event) + "\n")


def backend_of(item: pytest.Item) -> str:
    """Whose test it is: "cuda", "triton", or "others" where it is of neither."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    for value in parameters.values():
        name = getattr(value, "backend", value)
        if isinstance(name, str) and name in ("cuda", "triton"):
            return name
    return "triton" if item.path.parent.name == "triton" else "others"


def pytest_sessionstart(session: pytest.Session) -> None:
    op, _, variant = _FORCED.partition("=")
    if variant:
        from roberta_kernels import backends

        try:
            backends.use_cuda_variant(op, variant).__enter__()
        except backends.BackendError as error:
            _write({"missing": str(error)})
            pytest.exit(str(error), returncode=pytest.ExitCode.TESTS_FAILED)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = list(items)
    if backend := os.environ.get("RK_SUITE_BACKEND"):
        kept = [item for item in kept if backend_of(item) == backend]
    if shard := os.environ.get("RK_SUITE_SHARD"):
        number, _, of = shard.partition("/")
        first, end = (len(kept) * i // int(of) for i in (int(number), int(number) + 1))
        kept = kept[first:end]
    take = int(os.environ.get("RK_SUITE_TAKE", 0))
    if 0 < take < len(kept):
        kept = [kept[i * len(kept) // take] for i in range(take)]
    if len(kept) < len(items):
        chosen = set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = kept


def pytest_collection_finish(session: pytest.Session) -> None:
    _write({"collected": len(session.items)})


def pytest_runtest_logstart(nodeid: str) -> None:
    _write({"begin": nodeid})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or (report.when == "setup" and report.skipped) or report.failed:
        text = report.longreprtext.strip().splitlines()[-1:] if report.failed else []
        if report.skipped and isinstance(report.longrepr, tuple):
            text = [report.longrepr[2]]
        _write({"test": report.nodeid, "outcome": report.outcome, "says": " ".join(text)[:300]})


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    from roberta_kernels import backends
    from roberta_kernels.backends import choosing

    served = {
        f"{op} {variant} {direction}": count
        for op in choosing.VARIANTS
        for (variant, direction), count in backends.cuda_served(op).items()
        if count
    }
    _write({"served": served})
    op, _, variant = _FORCED.partition("=")
    if variant and session.items and not any(what.startswith(f"{op} {variant} ") for what in served):
        _write({"missing": f"{op}: {variant} ran no call"})
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
