"""Patched models with backends of their own, run at the same time: each gives its own answers, and none an error."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from model_cases import Case, batch_for, build, patched, run

import roberta_kernels as rk

BACKENDS = ("cpu", "reference", "auto") if rk.available_backends()["cpu"] else ("reference", "auto")


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_models_with_different_backends_in_threads(training):
    case = Case(train=training)
    original = build(case).train(training)
    for module in original.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # its seeds come from one generator for all threads
    inputs = batch_for(case, original.config)
    models = {asked: patched(original, backend=asked) for asked in BACKENDS}

    def answers(model):
        return run(model, inputs, backward=training)

    expected = {asked: answers(model) for asked, model in models.items()}
    barrier = threading.Barrier(len(models))

    def work(asked):
        barrier.wait(60)
        for _ in range(20):
            got = answers(models[asked])
            assert got.keys() == expected[asked].keys()
            assert all(torch.equal(got[name], t) for name, t in expected[asked].items())
            assert rk.backends.current_backend() == "auto"

    with ThreadPoolExecutor(len(models)) as pool:
        for one in [pool.submit(work, asked) for asked in models]:
            one.result(timeout=120)
    assert rk.backends.current_backend() == "auto"


def test_a_call_that_fails_leaves_no_backend_behind():
    case = Case()
    original = build(case).eval()
    ours = patched(original, backend="reference")
    inputs = batch_for(case, original.config)
    for _ in range(2):
        with pytest.raises(IndexError), torch.no_grad():
            ours(input_ids=torch.full((2, 5), 10**6))
        assert rk.backends.current_backend() == "auto"
    assert run(ours, inputs)["last_hidden_state"].isfinite().all()
