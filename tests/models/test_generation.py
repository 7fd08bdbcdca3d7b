"""generate: token for token what the original gives, greedy and beam, with a cache and without."""

from __future__ import annotations

import copy
from pathlib import Path

import forks
import pytest
import torch
from model_cases import SENTENCES, Case, batch_for, build, byte_tokenizer, patched, randomise
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


def encoder_decoder(encoder="roberta", decoder="roberta", words=60):
    """RoBERTa2RoBERTa and its like, whose weights make the answer depend on every part."""
    sides = [
        AutoConfig.for_model(name, vocab_size=words, max_position_embeddings=40, pad_token_id=1, **SMALL, **extra)
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
    # Attention runs fused by transformers' interface; what does not is counted: queries against a static cache's slots.
    assert report.padded()["a key/value cache or cross-attention"] > 0
    others = {reason for reason in report.fallbacks() if not reason.startswith("RobertaEmbeddings")}
    assert others <= {f"RobertaSelfAttention: {reason}" for reason in ("a mask that is not one of keys",)}
    rk.unpatch(ours)
    assert ours.decoder.config._attn_implementation == "sdpa"


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


# --- attn_implementation="roberta_kernels": attention of several queries is fused with a cache too --------------------


class Queries:
    """Of each call of the attention op in which queries and keys differ in number, or a decoder's prompt is read: the
    longest query and key."""

    def __init__(self, monkeypatch):
        self.lengths, op = [], rk.ops.attention

        def run(q, k, v, *ends, max_seqlen_q, max_seqlen_k=None, **kwargs):
            self.lengths.append((max_seqlen_q, max_seqlen_k))
            return op(q, k, v, *ends, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, **kwargs)

        monkeypatch.setattr(rk.ops, "attention", run)


def switched(model):
    """(a patched copy whose decoder was loaded with the implementation, its report)"""
    ours = copy.deepcopy(model)
    (ours.decoder if isinstance(ours, EncoderDecoderModel) else ours).set_attn_implementation("roberta_kernels")
    return ours, rk.patch(ours)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("search", ["greedy", "beam"])
def test_roberta2roberta_by_the_interface(search, cache):
    model = encoder_decoder()
    ours, report = switched(model)
    options = {"max_new_tokens": 8} | SEARCHES[search] | CACHES[cache]
    for padding in ("right", "left"):
        inputs = documents(padding)
        assert torch.equal(ours.generate(**inputs, **options), model.generate(**inputs, **options))
    assert {reason.partition(":")[0] for reason in report.fallbacks()} <= {"RobertaEmbeddings", "RobertaSelfAttention"}
    assert report.padded()["a key/value cache or cross-attention"] > 0


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("cache", CACHES)
def test_a_causal_language_model_by_the_interface(cache, padding, monkeypatch):
    """The prompt is read by the op, whatever is kept of it; then one query after the other, in place."""
    case = Case(seed=4, head="causal_lm", mask=padding, config=SMALL | {"hidden_act": "gelu"})
    model = build(case)
    inputs = batch_for(case, model.config, length=7)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
    ours, report = switched(model)
    queries = Queries(monkeypatch)
    options = {"max_new_tokens": 6, "do_sample": False} | CACHES[cache]
    assert torch.equal(ours.generate(**inputs, **options), model.generate(**inputs, **options))
    if cache == "dynamic":
        assert queries.lengths == [(7, 7)] * 2, "a call for each layer"
        assert report.padded() == {"a key/value cache or cross-attention": 6}


def test_a_prompt_in_pieces(monkeypatch):
    """Several queries against keys that are there: the last query is at the last key."""
    case = Case(seed=4, head="causal_lm", mask="none", config=SMALL | {"hidden_act": "gelu"})
    model = build(case)
    ours, report = switched(model)
    exact = copy.deepcopy(model).double()
    ids = batch_for(case, model.config, length=9)["input_ids"]
    queries = Queries(monkeypatch)
    logits = []
    for one in (ours, model, exact):
        first = one(input_ids=ids[:, :5], use_cache=True)
        cache = first["cache"] if "cache" in first else first["past_key_values"]
        name = "cache" if "cache" in first else "past_key_values"
        logits.append(one(input_ids=ids[:, 5:], use_cache=True, **{name: cache}).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)
    assert queries.lengths == [(5, 5)] * 2 + [(4, 9)] * 2
    assert {reason.partition(":")[0] for reason in report.fallbacks()} <= {"RobertaEmbeddings"}


def test_training_by_the_interface(monkeypatch):
    """Cross-attention of all target tokens at once is fused, with its gradients."""
    model = encoder_decoder()
    ours, _ = switched(model)
    inputs, labels = documents(), torch.randint(6, 60, (3, 5), generator=torch.Generator().manual_seed(2))
    queries = Queries(monkeypatch)
    gradients = []
    for one in (model, ours):
        one(**inputs, labels=labels).loss.backward()
        gradients.append([p.grad for p in one.parameters() if p.grad is not None])
    for want, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()) + 1e-6)
    assert queries.lengths.count((5, 9)) == 2, "a call for each layer of the decoder"


# --- the example and the benchmark ------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]


@pytest.mark.full
def test_the_example(tmp_path):
    tokenizer = byte_tokenizer()
    model = encoder_decoder(words=len(tokenizer))
    model.generation_config.decoder_start_token_id, model.generation_config.pad_token_id = 2, 1
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, text in zip(files, SENTENCES, strict=False):
        file.write_text(text, encoding="utf-8")
    command = ["examples/summarise.py", *files, "--model", tmp_path / "model", "--beams", "2", "--new-tokens", "6"]
    done = forks.python(*command, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "the same tokens: True" in done.stdout
    assert "2 texts: " in done.stdout
    assert "RobertaEmbeddings: cache_length was given" in done.stdout


@pytest.mark.full
def test_the_benchmark(tmp_path):
    done = forks.python("-m", "benchmarks", "generation", "--smoke", "--out", tmp_path, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("times as fast") == 9
    assert (tmp_path / "generation.json").is_file()
