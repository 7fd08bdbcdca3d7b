"""What the original takes from tensors we take from the same tensors: attributes that say otherwise change nothing, and
parts that a call does not use are not looked at."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from encoder_cases import CALL, calls, hidden, layouts
from model_cases import (
    Case,
    assert_promise,
    batch_for,
    batches_for,
    build,
    patched,
    run,
    stay_padded,
)
from torch import nn

import roberta_kernels as rk
from roberta_kernels import backends

CONFIG = {
    **{"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 96},
    **{"hidden_act": "gelu", "type_vocab_size": 2},
}
needs_cpu_kernels = pytest.mark.skipif(
    not backends.available_backends()["cpu"], reason="the compiled cpu kernels are not there"
)
# What route a call takes: with gradients or without, unpadded or padded, left padding, through transformers' interface.
ROUTES = {
    "one call": {},
    "layer by layer": {"backward": True},
    "padded": {"layout": "padded"},
    "padded, training": {"layout": "padded", "backward": True},
    "left padding": {"mask": "left"},
    "hidden states": {"output_hidden_states": True},
}


def case_of(family="roberta", **kwargs):
    return Case(seed=11, family=family, config=CONFIG | kwargs.pop("config", {}), **kwargs)


def shrink(linear, rows=None, columns=None):
    """As torch.nn users prune a layer: other parameters, and attributes as they were."""
    weight, bias = linear.weight.detach(), linear.bias.detach()
    if rows is not None:
        weight, bias = weight[rows], bias[rows]
    if columns is not None:
        weight = weight[:, columns]
    linear.weight, linear.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())


def prune_heads(layer, heads, head_dim=16):
    """Takes some heads out of a layer; num_attention_heads and all_head_size stay."""
    core = layer.attention.self
    kept = [i for i in range(core.query.weight.shape[0]) if i // head_dim not in heads]
    for linear in (core.query, core.key, core.value):
        shrink(linear, rows=kept)
    shrink(layer.attention.output.dense, columns=kept)


def narrow(layer, size):
    shrink(layer.intermediate.dense, rows=range(size))
    shrink(layer.output.dense, columns=range(size))


def heads_pruned(model):
    for layer in model.base_model.encoder.layer:
        prune_heads(layer, {1, 2})


def one_layer_pruned(model):
    prune_heads(model.base_model.encoder.layer[1], {0, 3})


def layers_of_different_widths(model):
    layers = model.base_model.encoder.layer
    prune_heads(layers[0], {3})
    prune_heads(layers[2], {0, 1, 2})
    narrow(layers[1], 31)
    narrow(layers[2], 64)


def narrow_feed_forwards(model):
    for size, layer in zip((96, 40, 7), model.base_model.encoder.layer, strict=True):
        narrow(layer, size)


def heads_of_another_size(model):
    """As many in each layer, which are called with one scale."""
    core = model.base_model.encoder.layer[1].attention.self
    kept = [i for i in range(64) if i % 16 < 8]
    for linear in (core.query, core.key, core.value):
        shrink(linear, rows=kept)
    shrink(model.base_model.encoder.layer[1].attention.output.dense, columns=kept)
    core.attention_head_size = 8


SHRUNK = (heads_pruned, one_layer_pruned, layers_of_different_widths, narrow_feed_forwards, heads_of_another_size)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("family", "shrunk"),
    [*(("roberta", shrunk) for shrunk in SHRUNK), ("bert", layers_of_different_widths), ("xmod", one_layer_pruned)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_shrunk_weights(family, shrunk, route):
    settings = dict(ROUTES[route])
    case = case_of(family, mask=settings.pop("mask", "right"))
    original = build(case)
    shrunk(original)
    ours = copy.deepcopy(original)
    report = rk.patch(ours, padded_rows="zeros")
    if settings.pop("layout", "unpadded") == "padded":
        stay_padded(ours)
    assert_promise(ours, original, batches_for(case, original.config, 2), **settings)
    assert not report.fallbacks()


@pytest.mark.parametrize("shrunk", SHRUNK, ids=lambda f: f.__name__)
def test_shrunk_after_patching(shrunk):
    case = case_of()
    original = build(case)
    ours = patched(original)
    batches = batches_for(case, original.config, 2)
    assert_promise(ours, original, batches)
    for model in (original, ours):
        shrunk(model)
    assert_promise(ours, original, batches)


@needs_cpu_kernels
@pytest.mark.parametrize(
    ("shrunk", "count"),
    [(heads_pruned, 1), (narrow_feed_forwards, 1), (one_layer_pruned, 3)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_how_many_calls_shrunk_layers_take(shrunk, count):
    """One for all where they agree in their heads, else one each."""
    case = case_of()
    original = build(case)
    shrunk(original)
    assert calls(patched(original), batch_for(case, original.config))[CALL] == count


@pytest.mark.parametrize("quantization", ["int8", "bfloat16"])
@needs_cpu_kernels
def test_shrunk_and_quantised(quantization):
    case = case_of()
    original = build(case)
    layers_of_different_widths(original)
    ours = copy.deepcopy(original)
    report = rk.patch(ours, quantization=quantization)
    inputs = batch_for(case, original.config)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(hidden(ours, inputs)[real], hidden(original, inputs)[real], rtol=0.05, atol=0.1)
    assert not report.fallbacks()


def key_heads_only(model):
    core = model.base_model.encoder.layer[0].attention.self
    shrink(core.key, rows=range(16))
    shrink(core.value, rows=range(16))


def test_heads_that_share_a_key_run_the_original():
    case = dataclasses.replace(case_of(), attention="eager")
    original = build(case)
    key_heads_only(original)  # one head for all, which eager attention takes
    ours = copy.deepcopy(original)
    report = rk.patch(ours)
    inputs = batch_for(case, original.config)
    assert_promise(ours, original, inputs)
    assert any("different numbers of heads" in reason for reason in report.fallbacks())


def no_whole_head(model):
    core = model.base_model.encoder.layer[0].attention.self
    for linear in (core.query, core.key, core.value):
        shrink(linear, rows=range(40))
    shrink(model.base_model.encoder.layer[0].attention.output.dense, columns=range(40))


def output_left_as_it_was(model):
    core = model.base_model.encoder.layer[0].attention.self
    for linear in (core.query, core.key, core.value):
        shrink(linear, rows=range(32))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("broken", [no_whole_head, output_left_as_it_was], ids=lambda f: f.__name__)
def test_weights_that_do_not_fit_fail_as_in_the_original(broken, backward):
    case = case_of()
    original = build(case)
    broken(original)
    ours = patched(original)
    inputs = batch_for(case, original.config)
    errors = []
    for model in (original, ours):
        with pytest.raises(RuntimeError) as error, torch.set_grad_enabled(backward):
            model(**inputs)
        errors.append(str(error.value))
    assert ("invalid for input of size" in errors[1]) == ("invalid for input of size" in errors[0])
    assert ("cannot be multiplied" in errors[1]) == ("cannot be multiplied" in errors[0])


# --- embeddings -------------------------------------------------------------------------------------------------------


class Given(nn.Module):
    """captum's InterpretableEmbeddingBase: stands in for the word embeddings, and gives back what it gets."""

    def __init__(self, embedding):
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.embedding = embedding

    def forward(self, x):
        return x


class Looked(nn.Module):
    """A table of a user's own, without `weight`."""

    def __init__(self, embedding):
        super().__init__()
        self.rows = nn.Parameter(embedding.weight.detach().clone())

    def forward(self, ids):
        return self.rows[ids] * 1.5


class Gone(nn.Module):
    def forward(self, ids):
        raise AssertionError("the call has inputs_embeds")


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("family", ["roberta", "electra", "xmod"])
@pytest.mark.parametrize("kind", [Given, Looked, lambda embedding: Gone()], ids=["Given", "Looked", "Gone"])
def test_word_embeddings_of_the_users_own(kind, family, order):
    case = case_of(family)
    original = build(case)
    ours = copy.deepcopy(original)
    batches = batches_for(case, original.config, 2)
    embedded = []
    for inputs in batches:
        words = original.get_input_embeddings()(inputs["input_ids"]).detach()
        embedded.append({name: t for name, t in inputs.items() if name != "input_ids"} | {"inputs_embeds": words})
    if order == "after":
        rk.patch(ours)
    for model in (original, ours):
        model.embeddings.word_embeddings = kind(model.embeddings.word_embeddings)
    report = rk.patch(ours)
    for backward in (False, True):
        assert_promise(ours, original, embedded, backward=backward)
    assert not report.fallbacks()
    if kind is Looked:
        assert_promise(ours, original, batches, backward=True)


@pytest.mark.parametrize("padded_rows", ["zeros", "exact"])
@needs_cpu_kernels
def test_words_that_are_not_looked_up_may_be_of_any_dtype(padded_rows):
    case = case_of()
    original = build(case)
    original.embeddings.word_embeddings.bfloat16()
    ours = copy.deepcopy(original)
    report = rk.patch(ours, padded_rows=padded_rows)
    inputs = batch_for(case, original.config)
    inputs["inputs_embeds"] = torch.randn(*inputs.pop("input_ids").shape, 64)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(hidden(ours, inputs)[real], hidden(original, inputs)[real], rtol=2e-4, atol=2e-5)
    if padded_rows == "zeros":
        assert not report.padded()
        assert calls(ours, inputs)[CALL] == 1


def lengthened(model, rows=80):
    """As conversions to long documents do it: the table is longer, and num_embeddings, config and sizes are not."""
    embeddings = model.embeddings
    weight = embeddings.position_embeddings.weight
    weight.data = torch.cat([weight.data, weight.data.flip(0)])[:rows].contiguous()
    for name in ("position_ids", "token_type_ids"):
        setattr(embeddings, name, torch.zeros(1, rows, dtype=torch.long))
    embeddings.position_ids = torch.arange(rows)[None]


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("family", ["roberta", "bert", "electra"])
def test_a_longer_position_table(family, order):
    case = case_of(family)
    original = build(case)
    ours = patched(original)
    for model in (original, ours):
        lengthened(model)
    if order == "before":
        rk.patch(ours)
    inputs = batch_for(case, original.config, length=70)
    inputs.pop("token_type_ids", None)
    assert_promise(ours, original, inputs, backward=True)
    assert_promise(ours, original, inputs)
    too_long = batch_for(case, original.config, length=90)
    for model in (original, ours):
        with pytest.raises((IndexError, RuntimeError)):
            model(**too_long)


def own_token_types(model, rows=1):
    generator = torch.Generator().manual_seed(2)
    shape = (rows, model.embeddings.position_embeddings.weight.shape[0])
    model.embeddings.token_type_ids = torch.randint(0, 2, shape, generator=generator)


@pytest.mark.parametrize("rows", [1, 4])
@layouts
@pytest.mark.parametrize("family", ["roberta", "bert", "electra"])
def test_token_types_of_a_buffer(family, layout, rows):
    """The original reads them, by position, where a call gives none."""
    case = case_of(family)
    original = build(case)
    ours = patched(original, layout=layout, padded_rows="zeros")
    batches = batches_for(case, original.config, 2)
    for inputs in batches:
        inputs.pop("token_type_ids", None)
    before = [run(ours, inputs)["last_hidden_state"] for inputs in batches]
    if rows > 1 and family != "roberta":
        rows = 1  # one position for all sequences: one row
    for model in (original, ours):
        own_token_types(model, rows)
    for backward in (False, True):
        assert_promise(ours, original, batches, backward=backward)
    assert all(not torch.allclose(run(ours, i)["last_hidden_state"], b) for i, b in zip(batches, before, strict=True))
    for model in (original, ours):  # changed where it lies
        model.embeddings.token_type_ids.data.zero_()
    assert all(torch.equal(run(ours, i)["last_hidden_state"], b) for i, b in zip(batches, before, strict=True))
    given = [inputs | {"token_type_ids": torch.ones_like(inputs["input_ids"])} for inputs in batches]
    assert_promise(ours, original, given)


def test_no_buffer_of_token_types():
    case = case_of()
    original = build(case)
    ours = patched(original)
    for model in (original, ours):
        del model.embeddings.token_type_ids
    inputs = batch_for(case, original.config)
    inputs.pop("token_type_ids", None)
    assert_promise(ours, original, inputs)


def test_a_buffer_that_is_too_short_fails_as_in_the_original():
    case = case_of()
    original = build(case)
    ours = patched(original)
    inputs = batch_for(case, original.config)
    inputs.pop("token_type_ids", None)
    for model in (original, ours):
        model.embeddings.token_type_ids = torch.zeros(1, 3, dtype=torch.long)
        with pytest.raises(RuntimeError, match="out of bounds"):
            model(**inputs)


def test_a_wider_vocabulary():
    """Rows added through the tensor: num_embeddings says less."""
    case = case_of()
    original = build(case)
    table = original.embeddings.word_embeddings.weight
    table.data = torch.cat([table.data, table.data])
    ours = patched(original)
    inputs = batch_for(case, original.config)
    real = inputs["attention_mask"].bool()
    inputs["input_ids"][real] += len(table) // 2
    assert_promise(ours, original, inputs, backward=True)


def test_attributes_that_nobody_reads():
    """Those of plain modules that their own forward does not read, either."""
    case = case_of()
    original = build(case)
    ours = copy.deepcopy(original)
    report = rk.patch(ours)
    for model in (original, ours):
        for module in model.modules():
            for name in ("num_attention_heads", "all_head_size", "in_features", "out_features", "num_embeddings"):
                if hasattr(module, name):
                    setattr(module, name, 3)
            if hasattr(module, "embedding_dim"):
                module.embedding_dim = 3
    inputs = batches_for(case, original.config, 2)
    assert_promise(ours, original, inputs, backward=True)
    assert_promise(ours, original, inputs)
    assert not report.fallbacks()
    assert not report.padded()
