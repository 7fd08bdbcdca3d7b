"""Every class, on random configs and batches: outputs, losses and gradients keep the numerical promise."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from model_cases import (
    DTYPES,
    FAST,
    HEADS,
    MASKS,
    PREFIX,
    Case,
    all_pairs,
    assert_case,
    assert_promise,
    batch_for,
    batches_for,
    build,
    fast_class,
    heads_of,
    patched,
)
from torch import Tensor

import roberta_kernels as rk

# What a caller may ask for beside the plain call. Attention weights and masks of another shape than [batch, length] are
# computed by the original code, and the report says so; everything else is fused.
OPTIONS = (
    "plain",
    "hidden_states",
    "attentions",
    "inputs_embeds",
    "position_ids",
    "4d_mask",
    "checkpointing",
    "chunked",
)
FALLBACK = ("attentions", "4d_mask")
FACTORS = {
    "head": tuple(HEADS),
    "mask": MASKS,
    "family": tuple(PREFIX),
    "dtype": tuple(DTYPES),
    "train": (False, True),
    "attention": ("sdpa", "eager"),
    "padded_rows": ("exact", "exact", "zeros"),
    "option": ("plain", "plain", *OPTIONS),
}


def case_of(row: dict[str, Any], seed: int) -> tuple[Case, str]:
    """A row of the matrix, made one that can be: a head that the family has, attention that gives its weights."""
    row = dict(row)
    option = row.pop("option")
    if row["head"] not in heads_of(row["family"]):
        row["head"] = heads_of(row["family"])[seed % len(heads_of(row["family"]))]
    if option == "attentions":
        row["attention"] = "eager"
    if option == "4d_mask" and (row["family"], row["head"]) == ("xlm_roberta_xl", "token"):
        option = "plain"  # the original's loss takes any mask for one of [batch, length], and fails
    if row["head"] == "span":
        row["padded_rows"] = "exact"  # its loss reads padded rows
    config = {"chunk_size_feed_forward": 1} if option == "chunked" else {}
    return Case(seed=seed, config=config, **row), option


MATRIX = [case_of(row, index) for index, row in enumerate(all_pairs(FACTORS, seed=20))]


def with_option(option: str, inputs: dict[str, Tensor], case: Case, config: Any) -> dict[str, Tensor]:
    """A batch, changed as the option has it."""
    ids = inputs["input_ids"]
    generator = torch.Generator().manual_seed(case.seed + 2)
    if option == "inputs_embeds":
        size = getattr(config, "embedding_size", config.hidden_size)
        inputs["inputs_embeds"] = torch.randn(*ids.shape, size, generator=generator)
        del inputs["input_ids"]
    elif option == "position_ids":
        inputs["position_ids"] = torch.randint(0, 40, ids.shape, generator=generator)
    elif option == "4d_mask":
        flat = ids.view(-1, ids.shape[-1])
        seen = inputs.get("attention_mask", torch.ones_like(ids)).view(flat.shape).bool()[:, None, None, :]
        seen = seen.expand(-1, 1, ids.shape[-1], -1)
        if case.head == "causal_lm":
            seen = seen & torch.ones(ids.shape[-1], ids.shape[-1], dtype=torch.bool).tril()
        inputs["attention_mask"] = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float16).min)
    return inputs


def check(case: Case, option: str = "plain", **options) -> rk.PatchReport:
    original = build(case)
    ours = patched(original, padded_rows=case.padded_rows, **options)
    report = rk.patch(ours, padded_rows=case.padded_rows, **options)
    if option == "checkpointing":
        for model in (ours, original):
            model.gradient_checkpointing_enable({"use_reentrant": False})
    asked = {"output_hidden_states": option == "hidden_states", "output_attentions": option == "attentions"}
    assert_case(
        case,
        ours,
        original,
        change=lambda inputs: with_option(option, inputs, case, original.config),
        everywhere=case.padded_rows == "exact" and case.head in ("pooler", "no_pooler", "span"),  # without labels
        **{name: True for name, wanted in asked.items() if wanted},
    )
    return report


def name(drawn: tuple[Case, str]) -> str:
    case, option = drawn
    factors = (case.family, case.head, case.dtype, case.mask, option, case.train, case.attention, case.padded_rows)
    return "-".join(str(factor) for factor in factors)


def some(values: Iterable[Any], every: int) -> list[Any]:
    """pytest parameters, of which `make test` runs one of `every`."""
    return [pytest.param(v, marks=pytest.mark.full if i % every else ()) for i, v in enumerate(values)]


@pytest.mark.parametrize("drawn", some(MATRIX, 4), ids=name)
def test_outputs_loss_and_every_gradient(drawn):
    case, option = drawn
    found = check(case, option).fallbacks()
    blind = [reason for reason in found if "a row that sees no key" in reason]
    assert not blind or case.attention == "eager"
    assert (len(found) > len(blind)) == (option in FALLBACK or case.dtype == "float16"), found


@pytest.mark.parametrize("draw", some(range(20), 3))
def test_fresh_random_cases(draw):
    # New ones on every run; a failure prints the case and the option, from which check(case, option) repeats it.
    fresh = random.Random(os.urandom(8))
    row = {factor: fresh.choice(values) for factor, values in FACTORS.items()}
    case, option = case_of(row, fresh.randrange(2**31))
    print(case, option)
    check(case, option)


def on_every_backend() -> list[Any]:
    # Without a GPU, Triton's kernels run in its interpreter: ten seconds each, and heads are no kernels of ours.
    heads = {"reference": HEADS, "cpu": HEADS, "triton": ("masked_lm", "causal_lm")}
    return [(backend, head) for backend, all_heads in heads.items() for head in all_heads]


@pytest.mark.parametrize(("backend", "head"), on_every_backend())
def test_every_head_on_every_backend(backend, head):
    if not rk.available_backends()[backend]:
        pytest.skip(rk.available_backends()[backend].detail)
    small = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "hidden_act": "gelu"}
    mask = MASKS[(list(HEADS).index(head) + 1) % len(MASKS)]
    case = Case(seed=5, head=head, mask=mask, train=True, config=small)
    report = check(case, backend=backend)
    assert report.fallbacks() == {}


@pytest.mark.parametrize("family", ["roberta", "xlm_roberta"])
@pytest.mark.parametrize("head", HEADS)
def test_drop_in_class_is_the_patched_model(head, family):
    case = Case(seed=3, head=head, family=family, train=True)
    original = build(case)
    ours = build(case, fast_class(family, head))
    assert list(ours.state_dict()) == list(original.state_dict())
    assert rk.is_patched(ours)
    assert isinstance(ours, type(original))
    assert_case(case, ours, original)
    inputs = batch_for(case, original.config)
    with torch.no_grad():
        # The same code runs in both, so that nothing but bitwise equality will do.
        for ours_out, patched_out in zip(
            ours(**inputs).to_tuple(), patched(original)(**inputs).to_tuple(), strict=True
        ):
            if isinstance(ours_out, torch.Tensor):
                assert torch.equal(ours_out, patched_out)


def test_every_drop_in_class_is_exported():
    for exported in FAST.values():
        assert exported in rk.__all__


@pytest.mark.parametrize("mask", ["right", "holes"])
@pytest.mark.parametrize("head", ["masked_lm", "causal_lm", "token", "span"])
def test_a_loss_that_reads_padded_positions(head, mask):
    case = Case(seed=11, head=head, mask=mask, train=True)
    original = build(case)
    batches = batches_for(case, original.config, count=16)
    for inputs in batches:
        if head != "span":
            inputs["labels"] = torch.randint(0, 3, inputs["input_ids"].shape)
    ours = patched(original)
    report = rk.patch(ours)
    kwargs = {"use_cache": False} if head == "causal_lm" else {}
    assert_promise(ours, original, batches, head=head, backward=True, **kwargs)
    assert report.fallbacks() == report.padded() == {} or (mask == "holes" and head == "causal_lm"), report.padded()


def test_the_token_before_a_label_is_padding():
    # The label is at a real position, and the logits that predict it are not.
    case = Case(seed=16, head="causal_lm", mask="holes", train=True)
    original = build(case)
    batches = batches_for(case, original.config, count=16)
    for inputs in batches:
        labels = torch.randint(6, 40, inputs["input_ids"].shape)
        inputs["labels"] = torch.where(inputs["attention_mask"].bool(), labels, -100)
    ours = patched(original)
    report = rk.patch(ours)
    assert_promise(ours, original, batches, head="causal_lm", backward=True, use_cache=False)
    assert set(report.padded()) == {"padding before a real token sees fewer keys than padding after it"}


@pytest.mark.parametrize("head", ["masked_lm", "causal_lm", "token"])
def test_a_loss_that_ignores_padding_stays_unpadded(head):
    case = Case(seed=12, head=head, mask="right")
    original = build(case)
    ours = patched(original)
    report = rk.patch(ours)
    kwargs = {"use_cache": False} if head == "causal_lm" else {}
    inputs = batch_for(case, original.config)
    ours(**inputs, **kwargs)
    assert report.padded() == {}
    assert report.fallbacks() == {}


def test_question_answering_keeps_the_logits_of_padded_positions():
    # Answers are picked by a softmax or an argmax over all positions, so that padded ones must not turn to zeros.
    case = Case(seed=13, head="span", mask="right")
    original = build(case)
    inputs = batch_for(case, original.config)
    del inputs["start_positions"], inputs["end_positions"]
    with torch.no_grad():
        want, got = original(**inputs), patched(original)(**inputs)
    assert got.loss is None
    torch.testing.assert_close(got.start_logits, want.start_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.end_logits, want.end_logits, rtol=1e-4, atol=1e-5)


def test_zeros_where_they_were_asked_for():
    case = Case(seed=13, head="span", mask="right")
    original = build(case)
    inputs = batch_for(case, original.config)
    ours = patched(original)
    report = rk.patch(ours, padded_rows="zeros")
    with torch.no_grad():
        got = ours(**inputs).start_logits
    assert report.padded() == {}
    padded = inputs["attention_mask"] == 0
    assert torch.equal(got[padded], original.qa_outputs.bias[0].expand(int(padded.sum())))


def test_shift_labels_that_read_padding():
    # Trainer hands a causal head labels that are shifted already.
    case = Case(seed=14, head="causal_lm", mask="right")
    original = build(case)
    inputs = batch_for(case, original.config)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    shift_labels = torch.randint(0, 9, inputs["labels"].shape)
    with torch.no_grad():
        want = original(**inputs, shift_labels=shift_labels).loss
        got = patched(original)(**inputs, shift_labels=shift_labels).loss
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["single_label", "regression", "multi_label"])
def test_problem_type_is_found_as_in_the_original(kind):
    case = Case(seed=15, head=kind, config={"problem_type": None})
    original = build(case)
    inputs = batch_for(case, original.config)
    ours = patched(original)
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).loss, original(**inputs).loss, rtol=1e-4, atol=1e-5)
    assert ours.config.problem_type == original.config.problem_type is not None
