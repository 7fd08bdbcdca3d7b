"""FakeTensorMode over a patched model: shapes without numbers, and nothing of them left in the model afterwards."""

from __future__ import annotations

import pytest
import torch
from model_cases import Case, batch_for, build, patched, run
from torch._subclasses import FakeTensorMode

import roberta_kernels as rk

BACKENDS = ("auto", "reference", *(["cpu"] if rk.available_backends()["cpu"] else []))


@pytest.mark.parametrize("after_a_call", [False, True], ids=["first", "after a call"])
@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "gradients"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_fake_tensors_over_a_real_model(backend, gradients, after_a_call):
    case = Case(mask="none")
    original = build(case).eval()
    ours = patched(original, backend=backend)
    inputs = {"input_ids": batch_for(case, original.config)["input_ids"]}
    expected = run(patched(original, backend=backend), inputs)
    if after_a_call:
        run(ours, inputs)
    with torch.set_grad_enabled(gradients), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for ids in (inputs["input_ids"], mode.from_tensor(inputs["input_ids"])):
            out = ours(input_ids=ids)
            for name, t in expected.items():
                assert torch._subclasses.fake_tensor.is_fake(out[name])
                assert (out[name].shape, out[name].dtype) == (t.shape, t.dtype), name
    got = run(ours, inputs)
    assert all(torch.equal(got[name], t) for name, t in expected.items())


def test_a_model_that_is_fake_itself():
    case = Case(mask="none")
    original = build(case)
    ids = batch_for(case, original.config)["input_ids"]
    with FakeTensorMode() as mode, torch.no_grad():
        model = type(original)(original.config).eval()
        rk.patch(model)
        assert model(input_ids=mode.from_tensor(ids))[0].shape == (*ids.shape, original.config.hidden_size)
