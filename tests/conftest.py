"""Set before any test imports triton: without a GPU its kernels run in Triton's interpreter, on CPU tensors. And what
`make test` leaves to `make test-full`, and that to several runs: `--share 2/3` is the second of three.
"""

from __future__ import annotations

import os
import signal

import covering
import pytest
import shares
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Threads of the test workers multiply: two each is plenty for small shapes, and torch's results do not depend on it.
# Under pytest-xdist the workers are the threads.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))
# In the background of a shell without job control Ctrl-C is ignored, and what the tests start would ignore it too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--share", type=shares.share, default=(1, 1), help="which of how many shares of the tests runs, as 2/3"
    )


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    keys = {item: shares.key_of(item) for item in items}
    covering.mark(items)
    share = config.getoption("--share")
    left_out = {item for item, key in keys.items() if not shares.is_in(key, share)}
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]
