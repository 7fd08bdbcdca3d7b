from __future__ import annotations

import pytest
import torch

import roberta_kernels as rk


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    yield
    rk.unpatch_transformers()  # a test that failed half-way must not patch the models of the next
