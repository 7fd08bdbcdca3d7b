"""Training: dropout, gradient checkpointing, determinism."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from model_cases import Case, assert_case, batch_for, batches_for, build, patched, run

import roberta_kernels as rk

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "hidden_act": "gelu"}
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2}


def case_of(head="masked_lm", mask="right", config=None, **kwargs):
    return Case(seed=6, head=head, mask=mask, train=True, config=SMALL | (config or {}), **kwargs)


def gradients(model, inputs, seed=0, **kwargs):
    torch.manual_seed(seed)
    return run(model, inputs, backward=True, **kwargs)


def assert_bitwise(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("mask", ["none", "right", "left"])
@pytest.mark.parametrize("dropout", [{}, DROPOUT])
@pytest.mark.parametrize("layout", ["unpadded", "padded"])
def test_bitwise_the_same_twice(mask, dropout, layout):
    case = case_of(mask=mask, config=dropout)
    model = patched(build(case), layout=layout)
    inputs = batch_for(case, model.config)
    assert_bitwise(gradients(model, inputs), gradients(model, inputs))


@pytest.mark.parametrize("which", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_follows_the_seed(which):
    case = case_of(config={which: 0.3})
    model = patched(build(case))
    inputs = batch_for(case, model.config)
    first, again, other = gradients(model, inputs, 1), gradients(model, inputs, 1), gradients(model, inputs, 2)
    assert torch.equal(first["loss"], again["loss"])
    assert not torch.equal(first["loss"], other["loss"])
    torch.manual_seed(1)
    with torch.no_grad():
        assert not torch.equal(model(**inputs).loss, model(**inputs).loss), "every call has a mask of its own"


def test_no_dropout_in_evaluation():
    case = case_of(config=DROPOUT)
    original = build(case).eval()
    ours = patched(original)
    inputs = batch_for(case, original.config)
    with torch.no_grad():
        assert torch.equal(ours(**inputs).loss, ours(**inputs).loss)
        torch.testing.assert_close(ours(**inputs).loss, original(**inputs).loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", ["right", "left"])
def test_dropout_has_the_originals_statistics(mask):
    """The mean and the spread of a trained pass over many masks, ours against the original's."""
    case = case_of("pooler", mask, config={"hidden_dropout_prob": 0.15, "attention_probs_dropout_prob": 0.25})
    original = build(case)
    ours = patched(original)
    inputs = batch_for(case, original.config, length=9)
    real = inputs["attention_mask"].bool()
    draws, moments = 400, []
    with torch.no_grad():
        for model in (ours, original):
            torch.manual_seed(7)
            hidden = torch.stack([model(**inputs).last_hidden_state[real] for _ in range(draws)])
            moments.append((hidden.mean(0), hidden.std(0)))
    (mean, spread), (mean_original, spread_original) = moments
    standard_error = (spread_original.square() + spread.square()).sqrt() / math.sqrt(draws)
    deviations = ((mean - mean_original) / standard_error).abs()
    assert deviations.max() < 6
    assert deviations.mean() < 1.2  # 0.8 for a normal distribution
    assert 0.9 < (spread / spread_original).mean() < 1.1


def test_each_dropout_has_a_mask_of_its_own():
    case = case_of("no_pooler", "none", config=DROPOUT)
    model = patched(build(case))
    seeds = []

    def recorded(op):
        def run_op(*args, seed=None, **kwargs):
            seeds.append(seed)
            return op(*args, seed=seed, **kwargs)

        return run_op

    with pytest.MonkeyPatch.context() as patching:
        for name in ("attention", "add_layer_norm", "embedding_layer_norm"):
            patching.setattr(rk.ops, name, recorded(getattr(rk.ops, name)))
        gradients(model, batch_for(case, model.config))
    assert len(seeds) == 1 + 3 * SMALL["num_hidden_layers"]
    assert len({int(seed) for seed in seeds}) == len(seeds)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("mask", ["none", "right", "left"])
@pytest.mark.parametrize("dropout", [{}, DROPOUT])
def test_gradient_checkpointing_changes_nothing(use_reentrant, mask, dropout):
    case = case_of(mask=mask, config=dropout)
    model = patched(build(case))
    inputs = batch_for(case, model.config)
    want = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    handle = model.roberta.encoder.layer[0].attention.self.query.weight.register_hook(lambda grad: calls.append(1))
    got = gradients(model, inputs)
    handle.remove()
    assert calls
    assert_bitwise(want, got)
    model.gradient_checkpointing_disable()
    assert_bitwise(want, gradients(model, inputs))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_is_as_in_the_original(use_reentrant):
    case = case_of("single_label")
    original = build(case)
    ours = patched(original)
    for model in (ours, original):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_case(case, ours, original)


def test_gradient_checkpointing_recomputes_on_the_same_backend():
    # The recomputation runs in backward, outside of the model's forward.
    case = case_of()
    model = patched(build(case), backend="reference")
    inputs, served = batch_for(case, model.config), []
    select = rk.backends.select

    def recorded(*arguments):
        served.append(select(*arguments).name)
        return select(*arguments)

    with pytest.MonkeyPatch.context() as patching, rk.backend("auto"):
        patching.setattr(rk.backends, "select", recorded)
        gradients(model, inputs)
        once = len(served)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        gradients(model, inputs)
    # torch leaves out what follows the last tensor that backward needs.
    assert len(served) - 2 * once >= 3 * SMALL["num_hidden_layers"], "a layer did not run again"
    assert set(served) == {"reference"}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_over_frozen_embeddings(use_reentrant):
    # A reentrant checkpoint whose input needs no gradient would give none to the layers.
    case = case_of("single_label")
    original = build(case)
    ours = patched(original)
    report = rk.patch(ours)
    for model in (ours, original):
        for parameter in model.roberta.embeddings.parameters():
            parameter.requires_grad_(False)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_case(case, ours, original)
    assert ours.roberta.encoder.layer[0].output.dense.weight.grad.abs().max() > 0
    assert report.padded() == report.fallbacks() == {}


def test_gradients_add_up_over_batches():
    case = case_of()
    original = build(case)
    ours = patched(original)
    first, second = batches_for(case, original.config, 2)
    model = ours
    separate = [gradients(model, inputs) for inputs in (first, second)]
    model.zero_grad()
    (model(**first).loss + model(**second).loss).backward()
    for name, parameter in model.named_parameters():
        total = separate[0][f"grad of {name}"] + separate[1][f"grad of {name}"]
        torch.testing.assert_close(parameter.grad, total, rtol=1e-4, atol=1e-5)


def test_padding_rows_of_the_tables_get_no_gradient():
    case = case_of("no_pooler", "none")
    model = patched(build(case))
    ids = torch.full((2, 6), model.config.pad_token_id)
    ids[:, :3] = torch.randint(6, 40, (2, 3))
    model(input_ids=ids).last_hidden_state.pow(2).sum().backward()
    pad = model.config.pad_token_id
    assert model.embeddings.word_embeddings.weight.grad[pad].abs().max() == 0
    assert model.embeddings.position_embeddings.weight.grad[pad].abs().max() == 0


def test_training_comes_to_the_same_place():
    case = case_of("single_label")
    original = build(case)
    ours = patched(original)
    inputs = batch_for(case, original.config)
    losses = []
    for model in (ours, original):
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        losses.append([])
        for _ in range(15):
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[1][-1] < 0.7 * losses[1][0]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-2, atol=1e-3)


def test_a_copy_is_independent():
    case = case_of()
    model = patched(build(case))
    inputs = batch_for(case, model.config)
    other = copy.deepcopy(model)
    with torch.no_grad():
        want = model(**inputs).loss
        for parameter in other.parameters():
            parameter.zero_()
        assert torch.equal(model(**inputs).loss, want)
    assert other._rk_state is not model._rk_state
