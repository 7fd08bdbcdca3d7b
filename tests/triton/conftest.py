"""The Triton backend's own tests need triton, and nothing else: kernels are interpreted where there is no GPU."""

from __future__ import annotations

import importlib.util

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        return
    for item in items:
        if "triton" in item.path.parent.name:
            item.add_marker(pytest.mark.skip(reason="needs triton (pip install triton)"))
