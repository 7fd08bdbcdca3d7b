"""What a caller gets at padded positions: what the original gives there, or, where nobody is known to look, less."""

from __future__ import annotations

import functools

import pytest
import torch
from model_cases import Case, Ops, assert_promise, batch_for, batches_for, build, log, patched
from torch import nn

import roberta_kernels as rk

SMALL = {
    **{"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 96},
    **{"hidden_act": "gelu", "type_vocab_size": 2},
}
SIDES = ("right", "left", "holes")
ROBERTA_LIKE = ("roberta", "xlm_roberta", "camembert", "data2vec_text")
PARTS_RUN_ON = "position embeddings go on through padding"


def case_of(head="no_pooler", mask="right", **kwargs):
    return Case(seed=4, head=head, mask=mask, config=SMALL | kwargs.pop("config", {}), **kwargs)


def pair(head="no_pooler", mask="right", **kwargs):
    """A model, a patched copy, its report, and batches without labels."""
    options = kwargs.pop("options", {})
    case = case_of(head, mask, **kwargs)
    original = build(case)
    ours = patched(original, **options)
    batches = batches_for(case, original.config)
    for inputs in batches:
        inputs.pop("labels", None)
    return original, ours, rk.patch(ours, **options), batches


def output(model, inputs, **kwargs):
    with torch.no_grad():
        return model(**inputs, **kwargs)[0]


# --- one row stands for all -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", SIDES)
@pytest.mark.parametrize("family", ROBERTA_LIKE)
def test_exact_everywhere_without_computing_padding(family, mask, attention):
    original, ours, report, batches = pair("pooler", mask, family=family, attention=attention)
    assert_promise(ours, original, batches, everywhere=True)
    assert (report.padded(), report.fallbacks()) == ({}, {})
    assert report.cost_of_padding() is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("mask", SIDES)
def test_hidden_states_everywhere(mask, dtype):
    original, ours, _, batches = pair("pooler", mask, dtype=dtype)
    assert_promise(ours, original, batches, everywhere=True, output_hidden_states=True)


@pytest.mark.parametrize("mask", SIDES)
def test_a_row_of_each_padded_sequence_is_all_that_is_computed(mask, monkeypatch):
    _, ours, _, batches = pair(mask=mask)
    rows = []
    embed = type(ours.embeddings).embed
    monkeypatch.setattr(
        type(ours.embeddings), "embed", lambda self, ids, *rest: rows.append(len(ids)) or embed(self, ids, *rest)
    )
    for inputs in batches:
        output(ours, inputs)
        real = inputs["attention_mask"].bool()
        assert rows.pop() == real.sum() + (~real.all(1)).sum()


@pytest.mark.parametrize("mask", SIDES)
def test_real_rows_do_not_change_by_a_bit(mask):
    original, ours, _, batches = pair(mask=mask)
    zeros = patched(original, padded_rows="zeros")
    for inputs in batches:
        real = inputs["attention_mask"].bool()
        assert torch.equal(output(ours, inputs)[real], output(zeros, inputs)[real])


@pytest.mark.parametrize("family", ["roberta", "bert"])
@pytest.mark.parametrize("mask", SIDES)
@pytest.mark.parametrize("head", ["no_pooler", "masked_lm", "token"])
def test_a_loss_of_the_users_own_over_all_rows(head, mask, family):
    """Labels of zero at padding: outputs and every gradient, in training without dropout."""
    original, ours, report, batches = pair(head, mask, family=family, train=True)
    original.double(), ours.double()
    for inputs in batches:
        losses = []
        for model in (original, ours):
            model.train().zero_grad()
            rows = model(**inputs)[0]
            labels = torch.zeros(rows.shape[:2], dtype=torch.int64)
            losses.append(nn.functional.cross_entropy(rows.flatten(0, 1), labels.flatten()))
            losses[-1].backward()
        torch.testing.assert_close(losses[1], losses[0])
        wanted = dict(original.named_parameters())
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-9, atol=1e-9, msg=name)
    assert set(report.padded()) == (set() if family == "roberta" else {PARTS_RUN_ON})


def test_the_same_gradients_twice():
    _, ours, _, batches = pair()
    found = []
    for _ in range(2):
        ours.zero_grad()
        ours(**batches[0])[0].square().sum().backward()
        found.append([p.grad for p in ours.parameters() if p.grad is not None])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("mask", SIDES)
def test_a_decoder_is_exact_everywhere(mask):
    """Under a causal mask, padding before a real token sees fewer keys than padding after it."""
    original, ours, report, batches = pair("causal_lm", mask)
    assert_promise(ours, original, batches, everywhere=True, use_cache=False)
    assert bool(report.padded()) == (mask != "right"), report.padded()


# --- padded rows that differ, and who reads them ----------------------------------------------------------------------


def masked_tokens(inputs):
    inputs["input_ids"] = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], 9)


def several_types(inputs):
    inputs["token_type_ids"] = torch.arange(inputs["input_ids"].shape[1]).expand(inputs["input_ids"].shape) % 2


def several_positions(inputs):
    inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]


def embeds(inputs):
    inputs["inputs_embeds"] = torch.randn(*inputs.pop("input_ids").shape, SMALL["hidden_size"])


@pytest.mark.parametrize("mask", SIDES)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (masked_tokens, "masked tokens that are not padding"),
        (several_types, "padded rows have several token types"),
        (several_positions, "padded rows have several positions"),
        (embeds, "inputs_embeds make padded rows differ"),
    ],
)
def test_rows_that_differ_are_computed_and_the_report_says_what_it_costs(change, reason, mask):
    original, ours, report, batches = pair(mask=mask)
    for inputs in batches:
        change(inputs)
    with log() as messages:
        assert_promise(ours, original, batches, everywhere=True)
    assert set(report.padded()) == {reason}
    assert report.fallbacks() == {}
    assert any(reason in message and 'padded_rows="zeros"' in message for message in messages)
    assert 'padded_rows="zeros"' in str(report.cost_of_padding())
    assert "of the rows of padded batches were padding" in " ".join(str(report).split())


@pytest.mark.parametrize("mask", SIDES)
@pytest.mark.parametrize("family", ["bert", "electra", "ernie", "roc_bert"])
def test_families_whose_positions_run_on(family, mask):
    original, ours, report, batches = pair("pooler", mask, family=family)
    assert_promise(ours, original, batches, everywhere=True)
    assert set(report.padded()) == {PARTS_RUN_ON}
    full = {name: tensor[:1] for name, tensor in batches[0].items()} | {"attention_mask": torch.ones(1, 1).long()}
    full = {name: tensor[:, :1] for name, tensor in full.items()}
    before = sum(report.padded().values())
    output(ours, full)
    assert sum(report.padded().values()) == before, "a batch without padding costs nothing"


def test_dropout_is_drawn_for_each_padded_row():
    config = {"hidden_dropout_prob": 0.5}
    _, ours, report, batches = pair(train=True, config=config)
    inputs = batches[0]
    rows = ours.train()(**inputs)[0]
    padded = rows[(inputs["attention_mask"] == 0)]
    assert len({tuple(row.tolist()) for row in padded}) == len(padded)
    assert set(report.padded()) == {"dropout makes padded rows differ"}


@pytest.mark.parametrize("mask", SIDES)
@pytest.mark.parametrize("family", ["roberta", "bert"])
def test_zeros_where_they_were_asked_for(family, mask):
    original, ours, report, batches = pair(mask=mask, family=family, options={"padded_rows": "zeros"})
    for inputs in batches:
        real = inputs["attention_mask"].bool()
        got, want = output(ours, inputs), output(original, inputs)
        torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[:, 0], want[:, 0], rtol=1e-4, atol=1e-5)  # poolers read it
        assert got[:, 1:][~real[:, 1:]].abs().sum() == 0
    assert (report.padded(), report.fallbacks()) == ({}, {})


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("mask", SIDES)
@pytest.mark.parametrize("head", ["single_label", "choice", "masked_lm", "token"])
def test_heads_that_are_known_not_to_look_do_without(head, mask, train):
    """Of a family whose padded rows differ; of token heads, given labels."""
    case = case_of(head, mask, family="bert", train=train)
    original = build(case)
    ours = patched(original)
    report = rk.patch(ours)
    assert_promise(ours, original, batches_for(case, original.config), head=head, backward=train)
    assert (report.padded(), report.fallbacks()) == ({}, {})


@pytest.mark.parametrize("mask", SIDES)
def test_token_heads_give_exact_logits_beside_a_loss_where_it_is_cheap(mask):
    case = case_of("token", mask)
    original = build(case)
    ours = patched(original)
    report = rk.patch(ours)
    assert_promise(ours, original, batches_for(case, original.config), everywhere=True)
    assert report.padded() == {}


class MeanOfAllRows(nn.Module):
    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, features, *args, **kwargs):
        return self.classifier(features.mean(1, keepdim=True))


def identity(model):
    model.classifier = nn.Identity()


def own_classifier(model):
    model.classifier = MeanOfAllRows(model.classifier)


def inner_part(model):
    model.classifier.dense = nn.Sequential(model.classifier.dense)


def hook_on_the_base(model, seen):
    model.base_model.register_forward_hook(lambda module, args, out: seen.append(out[0]))


def hook_on_the_classifier(model, seen):
    model.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", [identity, own_classifier, inner_part])
def test_a_head_of_other_parts_is_a_reader_that_is_not_known(change, when):
    original, ours, _, batches = pair("single_label")
    if when == "before":
        rk.unpatch(ours)
    for model in (original, ours):
        change(model)
    if when == "before":
        rk.patch(ours)
    for inputs in batches:
        torch.testing.assert_close(output(ours, inputs), output(original, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", [hook_on_the_base, hook_on_the_classifier])
def test_a_hook_on_a_heads_parts_sees_every_row(change):
    original, ours, _, batches = pair("single_label")
    seen = [], []
    for model, found in zip((original, ours), seen, strict=True):
        change(model, found)
        output(model, batches[0])
    torch.testing.assert_close(seen[1][0], seen[0][0], rtol=1e-4, atol=1e-5)


# --- what the original makes of what stands at padding ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["input_ids", "token_type_ids"])
@pytest.mark.parametrize("value", [-100, 10**6])
@pytest.mark.parametrize("head", ["no_pooler", "single_label"])
def test_ids_at_padding_are_checked(head, value, name):
    original, ours, _, batches = pair(head)
    inputs = batches[0]
    inputs.setdefault("token_type_ids", torch.zeros_like(inputs["input_ids"]))
    inputs[name] = torch.where(inputs["attention_mask"].bool(), inputs[name], value)
    for model in (original, ours):
        with pytest.raises(IndexError, match="out of range"):
            output(model, inputs)


@pytest.mark.parametrize("head", ["no_pooler", "single_label"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite_pass_on(value, head):
    original, ours, report, batches = pair(head)
    inputs = batches[0]
    embeds(inputs)
    inputs["inputs_embeds"][inputs["attention_mask"] == 0] = value
    got, want = output(ours, inputs), output(original, inputs)
    assert want.isnan().any()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert any("not finite at padding" in reason for reason in report.fallbacks())


# --- sequences of padding only ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [{}, {"output_hidden_states": True}], ids=["", "hidden_states"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["roberta", "bert"])
@pytest.mark.parametrize("head", ["pooler", "choice", "single_label"])
def test_a_sequence_of_padding_only(head, family, attention, asked):
    """A dummy choice of a multiple-choice question, say: nothing of it can be seen, and its row 0 is read."""
    original, ours, report, batches = pair(head, family=family, attention=attention)
    for inputs in batches:
        empty = (0, 1) if head == "choice" else (2,)
        inputs["attention_mask"][empty] = 0
        inputs["input_ids"][empty] = original.config.pad_token_id
        if "token_type_ids" in inputs:
            inputs["token_type_ids"][empty] = 0
    assert_promise(ours, original, batches, everywhere=True, **asked)
    said = "a row that sees no key, of which eager attention takes the mean over all positions"
    counted = [reason.partition(": ")[2] for reason in report.fallbacks()]
    assert counted == ([said] if attention == "eager" else [])


# --- traced ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded_rows", ["exact", "zeros"])
@pytest.mark.parametrize("mask", SIDES)
def test_a_compiled_model_gives_the_same_rows(mask, padded_rows):
    original, ours, _, batches = pair(mask=mask, options={"padded_rows": padded_rows})
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    for inputs in batches[:2]:
        got = output(compiled, inputs)
        torch.testing.assert_close(got, output(ours, inputs), rtol=2e-4, atol=2e-5)
        if padded_rows == "exact":
            torch.testing.assert_close(got, output(original, inputs), rtol=2e-4, atol=2e-5)


# --- readers of other libraries ---------------------------------------------------------------------------------------


def test_encode_computes_no_padded_row():
    transformers_tokens = functools.partial(torch.full, fill_value=7)
    _, ours, report, _ = pair("no_pooler", family="bert")
    from roberta_kernels.encoding.embedding import embed

    rows = [transformers_tokens((n,)).numpy() for n in (3, 5, 1)]
    with torch.no_grad(), Ops() as ops:
        embed(ours, rows, ours.config.pad_token_id, "mean", False)
    assert report.padded() == {}
    assert any(name.startswith("aten::index_copy") for name in ops.names)


@pytest.mark.parametrize("family", ["roberta", "bert"])
def test_an_encoder_in_an_encoder_decoder_does_without(family):
    import transformers

    encoder = build(case_of("no_pooler", family=family))
    decoder = build(case_of("causal_lm", config={"is_decoder": True, "add_cross_attention": True}))
    model = transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    report = rk.patch(model)
    inputs = batch_for(case_of(), encoder.config)
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        model(**inputs, decoder_input_ids=inputs["input_ids"])
    assert PARTS_RUN_ON not in report.padded()
