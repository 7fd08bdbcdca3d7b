"""Saving and loading: what the fused classes write is what Hugging Face's own write."""

from __future__ import annotations

import copy
import json
import pickle

import forks
import pytest
import torch
from model_cases import HEADS, Case, batch_for, build, fast_class, hf_class, patched
from safetensors import safe_open
from transformers import AutoModel, AutoModelForMaskedLM

import roberta_kernels as rk

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "hidden_act": "gelu"}
ONE_OF_EACH = ("pooler", "masked_lm", "causal_lm", "single_label", "token", "span", "choice")


def case_of(head, family="roberta"):
    return Case(seed=9, head=head, family=family, config=SMALL)


def tensors(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def output(model, inputs):
    with torch.no_grad():
        return [t for t in model(**inputs).to_tuple() if isinstance(t, torch.Tensor)]


def assert_bitwise(first, second):
    assert len(first) == len(second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def assert_close(first, second, mask=None):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        if mask is not None and a.shape[:2] == mask.shape:
            a, b = a[mask.bool()], b[mask.bool()]
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("family", ["roberta", "xlm_roberta"])
@pytest.mark.parametrize("head", ONE_OF_EACH)
def test_from_pretrained_and_save_pretrained(head, family, tmp_path):
    case = case_of(head, family)
    original = build(case)
    inputs = batch_for(case, original.config)
    inputs.pop("labels", None)  # with which the classifier would write the kind of its problem into its config
    original.save_pretrained(tmp_path / "original")

    ours = fast_class(family, head).from_pretrained(tmp_path / "original")
    assert rk.is_patched(ours)
    loaded = hf_class(family, head).from_pretrained(tmp_path / "original")
    assert_close(output(ours, inputs), output(loaded, inputs), inputs.get("attention_mask"))

    for name, model in (("ours", ours), ("patched", patched(original))):
        model.save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config == json.loads((tmp_path / "original" / "config.json").read_text())
        assert config["architectures"] == [hf_class(family, head).__name__]
        saved, want = tensors(tmp_path / name), tensors(tmp_path / "original")
        assert list(saved) == list(want)
        assert all(torch.equal(saved[key], want[key]) for key in want)
        assert sorted(f.name for f in (tmp_path / name).iterdir()) == sorted(
            f.name for f in (tmp_path / "original").iterdir()
        )
    again = hf_class(family, head).from_pretrained(tmp_path / "ours")
    assert_bitwise(output(again, inputs), output(loaded, inputs))


def test_auto_model_loads_what_a_fast_model_saved(tmp_path):
    model = build(case_of("masked_lm"), rk.FastRobertaForMaskedLM)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(loaded) is hf_class("roberta", "masked_lm")
    assert loaded.lm_head.decoder.weight is loaded.roberta.embeddings.word_embeddings.weight
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base.embeddings.word_embeddings.weight, model.roberta.embeddings.word_embeddings.weight)
    ours = rk.FastRobertaForMaskedLM.from_pretrained(tmp_path)
    assert ours.lm_head.decoder.weight is ours.roberta.embeddings.word_embeddings.weight
    assert ours.lm_head.decoder.bias is ours.lm_head.bias


def test_a_base_model_out_of_a_head_and_the_reverse(tmp_path):
    build(case_of("masked_lm")).save_pretrained(tmp_path / "head")
    base = rk.FastRoberta.from_pretrained(tmp_path / "head", add_pooling_layer=False)
    assert base.pooler is None
    base.save_pretrained(tmp_path / "base")
    head = rk.FastRobertaForTokenClassification.from_pretrained(tmp_path / "base")
    assert torch.equal(head.roberta.encoder.layer[0].output.dense.weight, base.encoder.layer[0].output.dense.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_from_pretrained_in_a_dtype(dtype, tmp_path):
    build(case_of("single_label")).save_pretrained(tmp_path)
    model = rk.FastRobertaForSequenceClassification.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_from_pretrained_with_attn_implementation(tmp_path):
    build(case_of("single_label")).save_pretrained(tmp_path)
    model = rk.FastRobertaForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    assert model.roberta.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
def test_copies(head, how, tmp_path):
    case = case_of(head)
    for model in (patched(build(case)), build(case, fast_class("roberta", head))):
        inputs = batch_for(case, model.config)
        if how == "pickle":
            copied = pickle.loads(pickle.dumps(model))
        elif how == "deepcopy":
            copied = copy.deepcopy(model)
        else:
            torch.save(model, tmp_path / "model.pt")
            copied = torch.load(tmp_path / "model.pt", weights_only=False)
        assert type(copied) is type(model)
        assert_bitwise(output(model, inputs), output(copied, inputs))
        states = {id(m._rk_state) for m in copied.modules() if "_rk_state" in m.__dict__}
        assert len(states) == 1
        assert states != {id(model._rk_state)}
        with torch.no_grad():
            assert len(copied(**inputs, output_hidden_states=True).hidden_states) == 2
        rk.unpatch(copied)
        assert type(copied) is hf_class("roberta", head)


@pytest.mark.full
def test_a_pickle_opens_in_a_process_that_never_made_a_model(tmp_path):
    case = case_of("single_label")
    model = patched(build(case))
    inputs = batch_for(case, model.config)
    want = output(model, inputs)
    torch.save((model, inputs, want), tmp_path / "model.pt")
    script = (
        "import sys, torch\n"
        "model, inputs, want = torch.load(sys.argv[1], weights_only=False)\n"
        "import roberta_kernels as rk\n"
        "assert rk.is_patched(model)\n"
        "with torch.no_grad():\n"
        "    got = [t for t in model(**inputs).to_tuple() if isinstance(t, torch.Tensor)]\n"
        "assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(got, want))\n"
        "rk.unpatch(model)\n"
        "assert type(model).__module__.startswith('transformers')\n"
    )
    done = forks.python("-c", script, tmp_path / "model.pt")
    assert done.returncode == 0, done.stderr


def test_state_dicts_go_both_ways():
    original = build(case_of("token"))
    ours = rk.FastRobertaForTokenClassification(original.config).eval()
    assert not ours.load_state_dict(original.state_dict()).missing_keys
    inputs = batch_for(case_of("token"), original.config)
    assert_close(output(ours, inputs), output(original, inputs), inputs["attention_mask"])
    assert not original.load_state_dict(ours.state_dict()).unexpected_keys


def test_the_same_seed_makes_the_same_model():
    config = build(case_of("single_label")).config
    torch.manual_seed(3)
    original = hf_class("roberta", "single_label")(config)
    torch.manual_seed(3)
    ours = rk.FastRobertaForSequenceClassification(config)
    assert all(torch.equal(a, b) for a, b in zip(original.parameters(), ours.parameters(), strict=True))
