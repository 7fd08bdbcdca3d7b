"""A pytest plugin for the suite (`-p benchmarks.gpu_suite.outcomes`): every outcome goes to a file as it comes, so that
a run that is stopped, or dies with the GPU, has told what it had. It can also take a few of many tests.

Environment: RK_SUITE_OUTCOMES, the file; RK_SUITE_TAKE, how many tests to run, spread evenly over those selected;
RK_SUITE_VARIANT, "op=variant" of the CUDA library to run them with.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest


def _write(event: dict[str, Any]) -> None:
    with open(os.environ["RK_SUITE_OUTCOMES"], "a") as stream:
        stream.write(json.dumps(event) + "\n")


def pytest_sessionstart(session: pytest.Session) -> None:
    op, _, variant = os.environ.get("RK_SUITE_VARIANT", "").partition("=")
    if variant:
        from roberta_kernels import backends

        try:
            backends.use_cuda_variant(op, variant).__enter__()
        except backends.BackendError as error:
            pytest.exit(str(error), returncode=pytest.ExitCode.NO_TESTS_COLLECTED)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    take = int(os.environ.get("RK_SUITE_TAKE", 0))
    if 0 < take < len(items):
        kept = [items[i * len(items) // take] for i in range(take)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def pytest_collection_finish(session: pytest.Session) -> None:
    _write({"collected": len(session.items)})


def pytest_runtest_logstart(nodeid: str) -> None:
    _write({"begin": nodeid})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or (report.when == "setup" and report.skipped) or report.failed:
        text = report.longreprtext.strip().splitlines()[-1:] if report.failed else []
        _write({"test": report.nodeid, "outcome": report.outcome, "says": " ".join(text)[:300]})
