"""A Ray cluster of two nodes on this machine, for all tests of this folder."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest
import transformers
from encoding.conftest import folder, tokenizer  # noqa: F401  # fixtures

try:
    import ray
    from ray.cluster_utils import Cluster
except ImportError:
    ray = None

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.ray)
            if ray is None:
                item.add_marker(pytest.mark.skip(reason="needs roberta_kernels[ray]"))


@pytest.fixture(scope="session")
def cluster():
    """Its address. Two nodes of two CPUs each, whatever the machine has."""
    node = {"num_cpus": 2, "object_store_memory": 100 << 20}
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    started = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    started.add_node(**node)
    ray.init(address=started.address, log_to_driver=False, logging_level="warning")
    yield started.address
    ray.shutdown()
    started.shutdown()


@pytest.fixture
def load(folder):  # noqa: F811
    """The model and its tokenizer, for workers, to which it is sent as it is: they cannot import tests."""

    def load(path):
        return transformers.AutoModel.from_pretrained(path), transformers.AutoTokenizer.from_pretrained(path)

    return functools.partial(load, str(folder))
