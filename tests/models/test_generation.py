"""generate: token for token what the original gives, greedy and beam, with a cache and without."""

from __future__ import annotations

import re

import pytest
import torch
from model_cases import Case, batch_for, build, patched, randomise
from transformers import AutoConfig, EncoderDecoderConfig, EncoderDecoderModel

import roberta_kernels as rk

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 40}
SEARCHES = {
    "greedy": {"do_sample": False},
    "beam": {"num_beams": 3, "do_sample": False, "num_return_sequences": 2},
    "beam with a penalty": {"num_beams": 2, "do_sample": False, "length_penalty": 2.0, "no_repeat_ngram_size": 2},
}
CACHES = {
    "dynamic": {"use_cache": True},
    "static": {"use_cache": True, "cache_implementation": "static", "disable_compile": True},
    "none": {"use_cache": False},
}


def encoder_decoder(encoder="roberta", decoder="roberta"):
    """RoBERTa2RoBERTa and its like, whose weights make the answer depend on every part."""
    sides = [
        AutoConfig.for_model(name, vocab_size=60, max_position_embeddings=40, pad_token_id=1, **SMALL, **extra)
        for name, extra in ((encoder, {}), (decoder, {"is_decoder": True, "add_cross_attention": True}))
    ]
    config = EncoderDecoderConfig.from_encoder_decoder_configs(*sides)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 1, 3
    model = EncoderDecoderModel(config=config).eval()
    randomise(model, 0)
    return model


def documents(padding="right"):
    ids = torch.randint(6, 60, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    mask[2, 1:] = 0
    if padding == "left":
        mask = mask.flip(1)
    return {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("search", SEARCHES)
def test_roberta2roberta(search, cache):
    model = encoder_decoder()
    ours = patched(model)
    report = rk.patch(ours)
    options = {"max_new_tokens": 8} | SEARCHES[search] | CACHES[cache]
    for padding in ("right", "left"):
        inputs = documents(padding)
        want, got = model.generate(**inputs, **options), ours.generate(**inputs, **options)
        assert torch.equal(got, want)
        assert want[:, 1:].unique().numel() > 3  # an answer that depends on something
    # The decoder's attention is the original's, and says so; the encoder is fused.
    assert {reason.partition(":")[0] for reason in report.fallbacks()} <= {"RobertaModel", "RobertaEmbeddings"}
    assert report.fallbacks()
    assert all(
        re.search("a key/value cache or cross-attention|(past_key_values|cache)(_length)? was given", reason)
        for reason in report.fallbacks()
    ), report.fallbacks()


@pytest.mark.parametrize(("encoder", "decoder"), [("bert", "bert"), ("xlm-roberta", "roberta"), ("bert", "electra")])
def test_other_pairs(encoder, decoder):
    model = encoder_decoder(encoder, decoder)
    ours = patched(model)
    inputs = documents()
    options = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False}
    assert torch.equal(ours.generate(**inputs, **options), model.generate(**inputs, **options))


def test_training_roberta2roberta():
    model = encoder_decoder()
    ours = patched(model)
    inputs = documents()
    labels = torch.randint(6, 60, (3, 5))
    losses = []
    for one in (model, ours):
        loss = one(**inputs, labels=labels).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    for (name, theirs), mine in zip(model.named_parameters(), ours.parameters(), strict=True):
        assert (theirs.grad is None) == (mine.grad is None), name
        if theirs.grad is not None:
            scale = float(theirs.grad.abs().max())
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4 * scale + 1e-6, msg=name)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("search", SEARCHES)
def test_a_causal_language_model(search, cache, padding):
    case = Case(seed=4, head="causal_lm", mask=padding, config=SMALL | {"hidden_act": "gelu"})
    model = build(case)
    inputs = batch_for(case, model.config, length=7)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
    ours = patched(model)
    options = {"max_new_tokens": 6} | SEARCHES[search] | CACHES[cache]
    assert torch.equal(ours.generate(**inputs, **options), model.generate(**inputs, **options))


@pytest.mark.parametrize("family", ["bert", "electra", "ernie", "bert_generation", "xmod", "xlm_roberta_xl"])
def test_causal_language_models_of_other_families(family):
    case = Case(seed=5, family=family, head="causal_lm", mask="left", config=SMALL | {"hidden_act": "gelu"})
    model = build(case)
    inputs = batch_for(case, model.config, length=7)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    ours = patched(model)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(ours.generate(**inputs, **options), model.generate(**inputs, **options))
