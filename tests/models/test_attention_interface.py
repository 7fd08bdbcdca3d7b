"""attn_implementation="roberta_kernels": the same answers under transformers' own switch, whatever the mask."""

from __future__ import annotations

import copy

import pytest
import torch
from model_cases import MASKS, PREFIX, Case, assert_promise, batch_for, batches_for, build, in_dtype, logged
from transformers import AutoModel, AutoModelForCausalLM, RobertaConfig, RobertaModel

import roberta_kernels as rk
from roberta_kernels.hf import attention_interface

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "hidden_act": "gelu"}


@pytest.fixture(autouse=True)
def fallbacks():
    """Reasons for which torch's attention ran in this test."""
    attention_interface._state.fallbacks.clear()
    return lambda: {reason.split(": ", 1)[1] for reason in attention_interface.fallbacks()}


def switched(model):
    ours = copy.deepcopy(model)
    ours.set_attn_implementation("roberta_kernels")
    return ours


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head", ["pooler", "causal_lm"])
def test_masks(head, mask, fallbacks):
    case = Case(seed=1, head=head, mask=mask, train=True, config=SMALL)
    original = build(case)
    kwargs = {"use_cache": False} if head == "causal_lm" else {}
    batches = batches_for(case, original.config, 8)
    assert_promise(switched(original), original, batches, head=head, backward=True, **kwargs)
    assert fallbacks() == set()


@pytest.mark.parametrize("family", list(PREFIX))
def test_every_family(family, fallbacks):
    case = Case(seed=2, family=family, config=SMALL)
    original = build(case)
    assert_promise(switched(original), original, batches_for(case, original.config, 2))
    assert fallbacks() == set()


@pytest.mark.parametrize("kind", ["keys", "pattern", "float"])
@pytest.mark.parametrize("head", ["no_pooler", "causal_lm"])
def test_4d_masks(head, kind, fallbacks):
    case = Case(seed=3, head=head, mask="none", config=SMALL)
    original = build(case)
    batches = batches_for(case, original.config, 2)
    for inputs in batches:
        rows, length = inputs["input_ids"].shape
        mask = torch.rand(rows, 1, 1 if kind == "keys" else length, length) < 0.6
        mask[..., 0] = True
        inputs["attention_mask"] = torch.where(mask, 0.0, -1e4) if kind == "float" else mask
        inputs.pop("labels", None)
    ours = switched(original)
    kwargs = {"use_cache": False} if head == "causal_lm" else {}
    with torch.no_grad():
        for inputs in batches:
            want, got = original(**inputs, **kwargs)[0], ours(**inputs, **kwargs)[0]
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert fallbacks() == (set() if kind == "keys" else {"a mask that is not one of keys"})


@pytest.mark.parametrize("mask", ["none", "left", "right"])
@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_generation(mask, cache, fallbacks):
    original = build(Case(seed=4, head="causal_lm", mask=mask, config=SMALL))
    case = Case(seed=4, head="causal_lm", mask=mask, config=SMALL)
    inputs = batch_for(case, original.config, length=7)
    del inputs["labels"]
    inputs.pop("token_type_ids", None)
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": cache is not None, "disable_compile": True}
    if cache is not None:
        options["cache_implementation"] = cache
    want = original.generate(**inputs, **options)
    assert torch.equal(switched(original).generate(**inputs, **options), want)
    if cache == "static":
        assert fallbacks() == {"a mask that is not one of keys"}
    else:
        assert fallbacks() == set()


@pytest.mark.parametrize("head_dim", [8, 16])
@pytest.mark.parametrize("keys", [3, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_the_last_query_is_at_the_last_key(head_dim, keys, masked, fallbacks):
    # A prompt that comes in pieces: the queries are the last of what the cache holds. torch's own causality differs.
    query, key, value = torch.randn(2, 2, 3, head_dim), *torch.randn(2, 2, 2, keys, head_dim)
    module = torch.nn.Module()
    module.is_causal = True
    mask = attention_interface.attention_mask(
        batch_size=2,
        q_length=3,
        kv_length=keys,
        q_offset=keys - 3,
        attention_mask=torch.tensor([[True] * keys, [False, *[True] * (keys - 1)]]) if masked else None,
    )
    got, _ = attention_interface.attention_forward(module, query, key, value, mask)
    seen = torch.ones(3, keys).tril(keys - 3).bool().expand(2, 1, 3, keys).clone()
    if masked:
        seen[1, ..., 0] = False
    scores = (query @ key.transpose(2, 3) / head_dim**0.5).masked_fill(~seen, -1e30)
    want = (scores.softmax(-1) @ value).transpose(1, 2)
    some = seen.any(-1)[:, 0]
    torch.testing.assert_close(got[some], want[some], rtol=1e-4, atol=1e-5)
    assert fallbacks() == ({"head_dim 8 is not supported"} if head_dim == 8 else set())


def test_dropout_is_drawn_from_torchs_generator():
    case = Case(seed=5, mask="right", train=True, config=SMALL | {"attention_probs_dropout_prob": 0.3})
    ours = switched(build(case))
    inputs = batch_for(case, ours.config)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(ours(**inputs).last_hidden_state)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    ours.eval()
    assert torch.equal(ours(**inputs).last_hidden_state, ours(**inputs).last_hidden_state)


def test_dropout_keeps_the_mean():
    # Attention is linear in its probabilities, and these keep their mean under dropout.
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 6, 16).unbind()
    module = torch.nn.Module()
    module.is_causal = False
    want, _ = attention_interface.attention_forward(module, query, key, value, None)
    draws = torch.stack(
        [attention_interface.attention_forward(module, query, key, value, None, dropout=0.25)[0] for _ in range(600)]
    )
    error = (draws.mean(0) - want).abs() / (draws.std(0) / 600**0.5)
    assert draws.std(0).min() > 0
    assert error.mean() < 1.2
    assert error.max() < 6


def test_attention_weights_come_from_the_original(fallbacks):
    case = Case(seed=6, mask="right", attention="eager", config=SMALL)
    original = build(case)
    inputs = batch_for(case, original.config)
    with torch.no_grad():
        want = original(**inputs, output_attentions=True)
        got = switched(original)(**inputs, output_attentions=True)
    assert len(got.attentions) == len(want.attentions) == 2
    real = inputs["attention_mask"].bool()
    for ours, theirs in zip(got.attentions, want.attentions, strict=True):
        torch.testing.assert_close(ours.transpose(1, 2)[real], theirs.transpose(1, 2)[real], rtol=1e-4, atol=1e-5)
    assert fallbacks() == {"attention weights were asked for"}


def test_what_is_not_supported_is_said(fallbacks):
    case = Case(seed=7, mask="left", head="causal_lm", config=SMALL | {"num_attention_heads": 4})
    original = build(case)
    ours = switched(original)
    inputs = batch_for(case, original.config)
    del inputs["labels"]
    with torch.no_grad(), logged("head_dim 8"):
        got = ours(**inputs, use_cache=False).logits
    with torch.no_grad():
        want = original(**inputs, use_cache=False).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-5)
    assert fallbacks() == {"head_dim 8 is not supported"}


def test_from_pretrained(tmp_path, fallbacks):
    case = Case(seed=8, mask="right", config=SMALL)
    original = build(case)
    original.save_pretrained(tmp_path)
    ours = AutoModel.from_pretrained(tmp_path, attn_implementation="roberta_kernels").eval()
    assert type(ours) is RobertaModel
    assert ours.config._attn_implementation == "roberta_kernels"
    assert_promise(ours, original, batches_for(case, original.config, 2))
    assert fallbacks() == set()
    ours.save_pretrained(tmp_path / "again")
    assert "roberta_kernels" not in (tmp_path / "again" / "config.json").read_text()


def test_from_config():
    config = RobertaConfig(vocab_size=50, **SMALL, intermediate_size=40, is_decoder=True)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="roberta_kernels")
    assert model.roberta.encoder.layer[0].attention.self.config._attn_implementation == "roberta_kernels"


def test_bfloat16(fallbacks):
    case = Case(seed=9, mask="right", dtype="bfloat16", config=SMALL)
    original = build(case)
    batches = [in_dtype(inputs, torch.bfloat16) for inputs in batches_for(case, original.config)]
    assert_promise(switched(original), original, batches)
    assert fallbacks() == set()


def test_a_patched_model_fuses_as_ever(fallbacks):
    case = Case(seed=10, mask="right", config=SMALL)
    original = build(case)
    ours = switched(original)
    report = rk.patch(ours)
    assert_promise(ours, original, batches_for(case, original.config, 2))
    assert (report.fallbacks(), report.padded()) == ({}, {})
    assert fallbacks() == set()


def test_another_models_mask_is_its_own(fallbacks):
    # A decoder with a sliding window and heads that share keys: not supported here, and its answer is the same.
    from transformers import MistralConfig, MistralModel

    torch.manual_seed(0)
    config = MistralConfig(
        **{"vocab_size": 40, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 3, "head_dim": 16},
    )
    original = MistralModel(config).eval()
    inputs = {"input_ids": torch.randint(3, 40, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    inputs["attention_mask"][1, :4] = 0
    with torch.no_grad():
        want = original(**inputs).last_hidden_state
        got = switched(original)(**inputs).last_hidden_state
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-5)
    assert fallbacks() == {"a mask that is not one of keys"}
