"""Inference as one op call of the CUDA library: on its emulation here, with the same cases as on the CPU kernels.

python tests/cuda_emulation/build.py --plain -- python -m pytest tests/models/test_encoder_on_cuda.py
"""

from __future__ import annotations

import pytest
import torch
from encoder_cases import CHANGES, UNCOUNTED, case_of, hidden, layouts, named_change, pair
from model_cases import Ops, assert_promise, batches_for, build, patched

import roberta_kernels as rk
from roberta_kernels import backends

CALL = "roberta_kernels_cuda::encoder"
pytestmark = [
    pytest.mark.cuda_source,
    pytest.mark.skipif(not backends.emulating(), reason="runs on the emulation (see the head of this file)"),
]


def serves(model, inputs, **options) -> int:
    with torch.no_grad(), Ops() as ops:
        model(**inputs, **options)
    return ops.names.count(CALL)


@layouts
@pytest.mark.parametrize("mask", ["none", "right", "holes"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_same_answers(mask, dtype, layout):
    """At padded positions too, for which one row of a sequence stands."""
    case = case_of(mask=mask, dtype=dtype)
    original = build(case)
    ours = patched(original, layout=layout, backend="cuda")
    batches = batches_for(case, original.config)
    if dtype == "float16" and original.device.type == "cpu":  # float16 on a CPU runs the original
        assert serves(ours, batches[0]) == 0
        return
    assert_promise(ours, original, batches, what=case, everywhere=True)
    for inputs in batches:
        assert serves(ours, inputs) == (1 if layout == "unpadded" else 3)
        assert torch.equal(hidden(ours, inputs), hidden(ours, inputs)), "the same call twice, bit for bit"


@pytest.mark.parametrize("family", ["xlm_roberta", "bert", "electra", "distilbert"])
def test_families(family):
    case = case_of(family=family)
    original = build(case)
    ours = patched(original, backend="cuda")
    batches = batches_for(case, original.config, 2)
    assert_promise(ours, original, batches, what=case, everywhere=True)
    assert all(serves(ours, inputs) for inputs in batches)


@pytest.mark.parametrize("head", ["masked_lm", "causal_lm", "single_label", "token", "span"])
def test_heads(head):
    case = case_of(head)
    original = build(case)
    ours = patched(original, backend="cuda")
    options = {"use_cache": False} if head == "causal_lm" else {}
    for inputs in batches_for(case, original.config, 2):
        assert_promise(ours, original, inputs, head=head, **options)
        assert serves(ours, inputs, **options)


@pytest.mark.parametrize("change", [*CHANGES, *UNCOUNTED], ids=named_change)
def test_a_change_is_noticed(change):
    """At once, as if the model had been like that before it was patched: no copy of a weight is kept."""
    original, ours, batches = pair(backend="cuda")
    inputs = batches[0]
    mask = inputs["attention_mask"].bool()
    before = hidden(ours, inputs)
    assert serves(ours, inputs)
    for model in (original, ours):
        change(model)
    after = hidden(ours, inputs)
    assert (after - before).abs().max() > 1e-3, "the change changes nothing"
    torch.testing.assert_close(after[mask], hidden(original, inputs)[mask], rtol=2e-5, atol=2e-5)


@layouts
def test_where_it_does_not_run(layout):
    original, ours, batches = pair(layout)
    inputs = batches[0]
    assert serves(ours, inputs) == 0, "the CPU kernels run"
    with rk.backend("cuda"):
        assert serves(ours, inputs), "and the CUDA kernels where they were asked for, of one model in turn"
        with torch.autocast("cpu", torch.bfloat16):
            assert serves(ours, inputs) == 0
        with Ops() as ops:
            assert ours(**inputs).last_hidden_state.requires_grad
        assert CALL not in ops.names
        assert_promise(ours, original, batches, backward=True)
    assert serves(ours, inputs) == 0


def test_a_bias_on_the_scores_goes_layer_by_layer():
    """The CUDA kernels have none; where they alone were asked for, the call is refused as before."""
    case = case_of(family="mpnet", attention="eager")
    ours = patched(build(case))
    inputs = batches_for(case, ours.config, 1)[0]
    assert serves(ours, inputs) == 0
    with rk.backend("cuda"), pytest.raises(rk.BackendError, match="bias"):
        hidden(ours, inputs)
