"""Set before any test imports triton: without a GPU its kernels run in Triton's interpreter, on CPU tensors. And what
`make test` leaves to `make test-full`, and that to several runs: `--share 2/3` is the second of three.
"""

from __future__ import annotations

import os
import re
import signal
import zlib

import covering
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Threads of the test workers multiply: two each is plenty for small shapes, and torch's results do not depend on it.
# Under pytest-xdist the workers are the threads.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))
# In the background of a shell without job control Ctrl-C is ignored, and what the tests start would ignore it too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def share(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9])/([1-9])", text)
    if match is None or int(match[1]) > int(match[2]):
        raise pytest.UsageError(f"--share must be as 1/3, 2/3 or 3/3, got {text!r}")
    return int(match[1]), int(match[2])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", type=share, default=(1, 1), help="which of how many shares of the tests runs, as 2/3")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # A test's share is found from its name, so that it stays the same when others come and go. Those of a file that take
    # long share what takes long.
    keys = {item: item.path.name if item.get_closest_marker("full") else item.nodeid for item in items}
    covering.mark(items)
    number, shares = config.getoption("--share")
    left_out = {item for item, key in keys.items() if zlib.crc32(key.encode()) % shares != number - 1}
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]
