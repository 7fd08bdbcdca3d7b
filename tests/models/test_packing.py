"""What packing must not change: batches are taken apart and put together again."""

from __future__ import annotations

import pytest
import torch
from model_cases import Case, Ops, batch_for, build, patched

import roberta_kernels as rk
from roberta_kernels import backends

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "hidden_act": "gelu"}


def model_and_batch(mask="right", head="pooler", **kwargs):
    case = Case(seed=4, head=head, mask=mask, config=SMALL)
    model = patched(build(case), **kwargs)
    return model, batch_for(case, model.config, batch=6, length=11)


def hidden(model, inputs):
    with torch.no_grad():
        return model(**inputs).last_hidden_state


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", ["right", "holes", "left"])
@pytest.mark.parametrize("layout", ["unpadded", "padded"])
def test_a_sequence_in_a_batch_is_the_sequence_alone(mask, layout):
    model, inputs = model_and_batch(mask, layout=layout)
    together = hidden(model, inputs)
    for row, real in enumerate(inputs["attention_mask"].bool()):
        alone = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        close(hidden(model, alone)[0][real], together[row][real])
        if mask == "right":
            cut = {name: tensor[:, real] for name, tensor in alone.items()}
            close(hidden(model, cut)[0], together[row][real])


@pytest.mark.parametrize("mask", ["none", "right", "left", "holes"])
def test_the_order_of_a_batch_changes_nothing(mask):
    model, inputs = model_and_batch(mask)
    order = torch.tensor([3, 0, 5, 2, 1, 4])
    want = hidden(model, inputs)[order]
    got = hidden(model, {name: tensor[order] for name, tensor in inputs.items()})
    close(got, want)


@pytest.mark.parametrize("extra", [1, 7])
def test_more_padding_changes_nothing(extra):
    model, inputs = model_and_batch("right")
    pad = torch.nn.functional.pad
    more = {
        "input_ids": pad(inputs["input_ids"], (0, extra), value=model.config.pad_token_id),
        "attention_mask": pad(inputs["attention_mask"], (0, extra)),
    }
    if "token_type_ids" in inputs:
        more["token_type_ids"] = pad(inputs["token_type_ids"], (0, extra))
    want, got = hidden(model, inputs), hidden(model, more)
    close(got[:, : want.shape[1]], want)


def test_what_stands_in_padding_changes_nothing():
    model, inputs = model_and_batch("right")
    want = hidden(model, inputs)
    padding = inputs["attention_mask"] == 0
    # Padding ids only count in position ids, and those after the last real token count for nobody.
    inputs["input_ids"] = torch.where(padding, 9, inputs["input_ids"])
    close(hidden(model, inputs)[~padding], want[~padding])


def test_padded_positions_are_zeros_where_they_were_asked_for():
    model, inputs = model_and_batch("holes", padded_rows="zeros")
    out = hidden(model, inputs)
    real = inputs["attention_mask"].bool()
    assert out[~real].abs().max() == 0
    assert out[real].abs().min(dim=-1).values.max() > 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_sequence_of_padding_only(attention):
    case = Case(seed=4, mask="right", attention=attention, config=SMALL)
    original = build(case)
    ours = patched(original)
    inputs = batch_for(case, original.config, batch=6, length=11)
    inputs["attention_mask"][2] = 0
    inputs["input_ids"][2] = original.config.pad_token_id
    with torch.no_grad():
        got, want = ours(**inputs), original(**inputs)
    close(got.last_hidden_state, want.last_hidden_state)
    close(got.pooler_output, want.pooler_output)


def test_a_batch_of_padding_only():
    case = Case(seed=4, mask="right", config=SMALL)
    original = build(case)
    inputs = {"input_ids": torch.full((2, 5), original.config.pad_token_id), "attention_mask": torch.zeros(2, 5).long()}
    with torch.no_grad():
        got, want = patched(original)(**inputs), original(**inputs)
    close(got.last_hidden_state, want.last_hidden_state)


@pytest.mark.parametrize("mask", [None, [[1]], [[1, 1, 1]], [[1, 0, 0]], [[1, 0, 1]]])
def test_a_batch_of_one(mask):
    case = Case(seed=4, config=SMALL)
    original = build(case)
    length = 1 if mask is None else len(mask[0])
    inputs = {"input_ids": torch.randint(6, 40, (1, length))}
    if mask is not None:
        inputs["attention_mask"] = torch.tensor(mask)
    with torch.no_grad():
        got, want = patched(original)(**inputs), original(**inputs)
    close(got.last_hidden_state, want.last_hidden_state)
    close(got.pooler_output, want.pooler_output)


def test_sequences_of_one_token():
    case = Case(seed=4, config=SMALL)
    original = build(case)
    ids = torch.randint(6, 40, (5, 4))
    mask = torch.tensor([[1, 0, 0, 0]] * 5)
    with torch.no_grad():
        got, want = (
            model(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0] for model in (patched(original), original)
        )
    close(got, want)


@pytest.mark.parametrize("mask", ["none", "full"])
def test_a_batch_without_padding_stays_as_it_is(mask):
    model, inputs = model_and_batch(mask)
    with Ops() as ops:
        hidden(model, inputs)
    assert not {name for name in ops.names if name.startswith(("aten::index_", "aten::nonzero"))}


@pytest.mark.parametrize("one_call", [True, False])
def test_a_padded_batch_is_unpadded_once(one_call, monkeypatch):
    if not one_call:
        monkeypatch.setattr(backends, "missing_op", lambda *_: "left out by a test")
    model, inputs = model_and_batch("right")
    inputs.pop("token_type_ids", None)
    hidden(model, inputs)
    with Ops() as ops:
        hidden(model, inputs)
    assert ops.names.count("aten::index_copy") + ops.names.count("aten::index_copy_") == 1
    # What the package runs is its own: the fused ops, and the plain products.
    fused = [name for name in ops.names if name.startswith("roberta_kernels_")]
    if one_call and rk.available_backends()["cpu"]:
        names = ("embedding_layer_norm_forward", "encoder")
        assert sorted(fused) == [f"roberta_kernels_cpu::{name}" for name in names]
    else:
        assert len(fused) == 1 + 4 * SMALL["num_hidden_layers"]
    assert not {name for name in ops.names if "native_layer_norm" in name or name.endswith("gelu")} & {
        name for name in ops.names if name.startswith("aten::") and rk.available_backends()["cpu"]
    }


@pytest.mark.parametrize("shape", [(0, 5), (0, 0), (2, 0)])
def test_an_empty_batch(shape):
    case = Case(seed=4, head="no_pooler", config=SMALL)
    original = build(case)
    ours = patched(original)
    ids = torch.zeros(shape, dtype=torch.int64)
    outcomes = []
    for model in (original, ours):
        try:
            with torch.no_grad():
                outcomes.append(model(input_ids=ids).last_hidden_state)
        except (RuntimeError, ValueError, IndexError) as error:
            outcomes.append(type(error))
    if isinstance(outcomes[0], type):
        assert isinstance(outcomes[1], type | torch.Tensor)
    else:
        assert outcomes[0].shape == outcomes[1].shape


def test_a_long_batch_of_many_lengths():
    case = Case(seed=4, head="no_pooler", config=SMALL | {"max_position_embeddings": 300})
    original = build(case)
    lengths = torch.tensor([1, 2, 63, 64, 65, 127, 129, 257])
    mask = (torch.arange(257)[None, :] < lengths[:, None]).long()
    ids = torch.where(mask.bool(), torch.randint(6, 40, mask.shape), original.config.pad_token_id)
    with torch.no_grad():
        got, want = (m(input_ids=ids, attention_mask=mask).last_hidden_state for m in (patched(original), original))
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-4, atol=1e-4)
