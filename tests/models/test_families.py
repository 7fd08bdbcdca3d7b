"""Every family of models: what runs fused in it, what runs the original code, and that the answers are the same."""

from __future__ import annotations

import copy
import functools
import types

import pytest
import torch
from model_cases import (
    PREFIX,
    Case,
    Ops,
    assert_case,
    assert_promise,
    batch_for,
    batches_for,
    build,
    heads_of,
    hf_class,
    logged,
    patched,
    run,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import roberta_kernels as rk
from roberta_kernels.hf import known_code
from roberta_kernels.hf.families import family_classes, part_class

SAME_LAYERS = tuple(PREFIX)[:10]
ATTENTION_ONLY = tuple(PREFIX)[10:]
OTHERS = tuple(PREFIX)[2:]
OWN_EMBEDDINGS = ("ernie", "bert_generation", "roc_bert")
LAYERS = ("layer", "distilbert_layer", "mpnet_layer")
EMBEDDINGS = ("embeddings", "absolute_embeddings", "typeless_embeddings", "typeless_absolute_embeddings")
SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "hidden_act": "gelu"}


# --- which layout, and what is reported -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SAME_LAYERS)
def test_padding_is_left_out(family):
    case = Case(seed=2, family=family, config=SMALL)
    ours = patched(build(case))
    report = rk.patch(ours, padded_rows="zeros")
    inputs = batch_for(case, ours.config)
    with torch.no_grad():
        hidden = ours(**inputs).last_hidden_state
    assert (report.fallbacks(), report.padded()) == ({}, {})
    assert hidden[inputs["attention_mask"] == 0].abs().max() == 0  # no layer has seen these rows


@pytest.mark.parametrize("family", PREFIX)
def test_the_report_says_what_runs(family):
    model = build(Case(seed=2, family=family, config=SMALL))
    report = rk.patch(model)
    classes = {replaced.original.removeprefix(PREFIX[family]): replaced.fused for replaced in report.replaced}
    classes |= {"Layer": classes["TransformerBlock"]} if family == "distilbert" else {}
    left = {left.original.removeprefix(PREFIX[family]): left.reason for left in report.left}
    if family in ATTENTION_ONLY:
        assert classes["SelfAttention"] == "attention"
        assert set(left) == {"Layer", "Embeddings"}
        assert "only the attention" in left["Layer"]
    else:
        assert "attention, GELU feed-forward" in classes["Layer"]
        assert set(left) == ({"Embeddings"} if family in OWN_EMBEDDINGS else set())
    rk.unpatch(model)
    assert not rk.is_patched(model)
    assert all("_rk_state" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("family", ["ernie", "roc_bert", "distilbert", "xmod"])
def test_arguments_of_their_own(family):
    case = Case(seed=3, family=family, config=SMALL, train=True)
    original = build(case)
    batches = batches_for(case, original.config, 8)
    for inputs in batches:
        ids = inputs["input_ids"]
        if family == "ernie":
            inputs["task_type_ids"] = torch.randint(0, 3, ids.shape)
        elif family == "roc_bert":
            inputs |= {"input_shape_ids": ids.flip(1), "input_pronunciation_ids": ids.flip(0)}
        elif family == "distilbert":
            inputs["token_type_ids"] = ids % 2  # as many a tokenizer gives, and it has no use for
        else:
            inputs["lang_ids"] = torch.arange(len(ids)) % 2
    ours = patched(original)
    report = rk.patch(ours)
    assert_promise(ours, original, batches, backward=True)
    assert report.fallbacks() == {}


@pytest.mark.parametrize("summary", ["first", "last", "mean"])
def test_a_summary_of_electra_that_reads_padding(summary):
    case = Case(seed=4, family="electra", head="choice", train=True, config=SMALL | {"summary_type": summary})
    original = build(case)
    ours = patched(original)
    report = rk.patch(ours)
    assert_case(case, ours, original)
    assert bool(report.padded()) == (summary != "first"), report.padded()


@pytest.mark.parametrize("head", ["ForPreTraining", "ForNextSentencePrediction"])
@pytest.mark.parametrize("family", ["bert", "electra", "ernie", "roc_bert"])
def test_heads_for_pretraining(family, head):
    import transformers

    cls = getattr(transformers, PREFIX[family] + head, None)
    if cls is None:
        pytest.skip(f"there is no {PREFIX[family]}{head}")
    case = Case(seed=5, family=family, config=SMALL, train=True)
    original = build(case, cls)
    batches = batches_for(case, original.config, 8)
    for inputs in batches:
        labels = torch.randint(0, 2, inputs["input_ids"].shape)
        if family == "roc_bert":
            inputs["labels_input_ids"] = labels
            for side in ("attack", "labels"):
                inputs[f"{side}_attention_mask"] = inputs["attention_mask"]
            inputs["attack_input_ids"] = inputs["input_ids"].flip(0)
        elif head == "ForPreTraining":
            inputs["labels"] = labels  # at padded positions too
            if family != "electra":
                inputs["next_sentence_label"] = labels[:, 0]
        else:
            inputs["labels"] = labels[:, 0]
    ours = patched(original)
    report = rk.patch(ours)
    per_token = "masked_lm" if head == "ForPreTraining" else "pooler"
    assert_promise(ours, original, batches, head=per_token, backward=True)
    assert report.fallbacks() == {}


@pytest.mark.parametrize("family", OTHERS)
def test_hidden_states(family):
    case = Case(seed=13, family=family, config=SMALL)
    original = build(case)
    ours = patched(original)
    assert_promise(ours, original, batches_for(case, original.config, 2), output_hidden_states=True)
    inputs = batch_for(case, original.config)
    with torch.no_grad():
        got, want = (model(**inputs, output_hidden_states=True).hidden_states for model in (ours, original))
    assert [t.shape for t in got] == [t.shape for t in want]
    assert len(got) == 3


@pytest.mark.parametrize("family", OTHERS)
def test_tuples(family):
    case = Case(seed=14, family=family, config=SMALL)
    original = build(case)
    ours = patched(original)
    inputs = batch_for(case, original.config)
    with torch.no_grad():
        got, want = ours(**inputs, return_dict=False), original(**inputs, return_dict=False)
    assert [type(value) for value in got] == [type(value) for value in want]
    assert type(ours(**inputs)) is type(original(**inputs))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", OTHERS)
def test_gradient_checkpointing(family, use_reentrant, monkeypatch):
    case = Case(seed=16, family=family, train=True, config=SMALL)
    original = build(case)
    ours = patched(original)
    report = rk.patch(ours)
    inputs = batch_for(case, original.config)
    calls, attention = [], rk.ops.attention
    monkeypatch.setattr(rk.ops, "attention", lambda *args, **kwargs: (calls.append(1), attention(*args, **kwargs))[1])
    want = run(ours, inputs, backward=True)
    assert len(calls) == SMALL["num_hidden_layers"]
    for model in (ours, original):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    got = run(ours, inputs, backward=True)
    assert len(calls) == 3 * SMALL["num_hidden_layers"], "each layer runs once more in backward"
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert_promise(ours, original, batches_for(case, original.config, 8), backward=True)
    assert report.fallbacks() == {}


@pytest.mark.parametrize("family", ["bert", "electra", "ernie", "distilbert", "xmod"])
def test_every_model_from_now_on(family):
    case = Case(seed=15, family=family, head="single_label", config=SMALL)
    with rk.patch_transformers():
        ours = build(case)
    assert rk.is_patched(ours)
    original = build(case)
    assert not rk.is_patched(original)
    assert_promise(ours, original, batches_for(case, original.config, 2), head="single_label")


# --- a family with a bias on the scores -------------------------------------------------------------------------------

PADDED_ROWS_DIFFER = "the bias on the scores makes padded rows differ"
NOT_AT_THE_END = "padding that is not at the end, and a bias on the scores, by position"


def mpnet_pair(head="no_pooler", mask="right", options=None, **kwargs):
    """A model, a patched copy, its report, and batches without labels."""
    case = Case(seed=7, family="mpnet", head=head, mask=mask, config=SMALL | kwargs.pop("config", {}), **kwargs)
    original = build(case)
    ours = patched(original, **(options or {}))
    batches = [
        {name: t for name, t in batch.items() if name in ("input_ids", "attention_mask")}
        for batch in batches_for(case, original.config, 3)
    ]
    return original, ours, rk.patch(ours, **(options or {})), batches


@pytest.mark.parametrize(
    ("head", "mask"),
    [(head, "right") for head in heads_of("mpnet")]
    + [("pooler", mask) for mask in ("left", "holes", "none", "full")]
    + [(head, mask) for head in ("single_label", "masked_lm") for mask in ("left", "holes")],
)
def test_mpnet(head, mask):
    """Trained: every gradient, that of the bias too."""
    case = Case(seed=7, family="mpnet", head=head, mask=mask, train=True, config=SMALL)
    original = build(case)
    ours = patched(original)
    report = rk.patch(ours)
    assert_case(case, ours, original)
    assert report.fallbacks() == {}
    base = ours if head.endswith("pooler") else ours.mpnet
    assert base.encoder.relative_attention_bias.weight.grad.abs().max() > 0
    reads_all = head in ("pooler", "no_pooler", "span")
    if mask in ("none", "full") or (mask == "right" and not reads_all):
        assert report.padded() == {}
    else:
        assert set(report.padded()) == {PADDED_ROWS_DIFFER if reads_all else NOT_AT_THE_END}


@pytest.mark.parametrize("padded_rows", ["exact", "zeros"])
@pytest.mark.parametrize("mask", ["right", "left", "holes"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mpnet_at_every_position(dtype, mask, padded_rows):
    original, ours, report, batches = mpnet_pair("pooler", mask, {"padded_rows": padded_rows}, dtype=dtype)
    assert_promise(ours, original, batches, everywhere=padded_rows == "exact")
    assert report.fallbacks() == {}
    unpadded = padded_rows == "zeros" and mask == "right"
    assert bool(report.padded()) != unpadded
    if unpadded:
        with torch.no_grad():
            got = ours(**batches[0]).last_hidden_state
        assert not got[:, 1:][~batches[0]["attention_mask"][:, 1:].bool()].any()
    assert_promise(ours, original, batches, everywhere=padded_rows == "exact", output_hidden_states=True)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_mpnet_in_one_call(quantization):
    """Without gradients on a CPU: all layers in one op, with the bias; the same bits alone and in a batch."""
    original, ours, report, batches = mpnet_pair(options={"padded_rows": "zeros", "quantization": quantization})
    with torch.no_grad(), Ops() as ops:
        got = ours(**batches[0]).last_hidden_state
    op = "roberta_kernels_cpu::encoder" if quantization is None else "roberta_kernels_cpu::packed_encoder"
    assert sum(name == op for name in ops.names) == 1
    assert report.fallbacks() == {}
    for row, (ids, mask) in enumerate(zip(batches[0]["input_ids"], batches[0]["attention_mask"], strict=True)):
        length = int(mask.sum())
        with torch.no_grad():
            alone = ours(ids[None, :length]).last_hidden_state[0]
        assert torch.equal(got[row, :length], alone)
    if quantization is None:
        assert_promise(ours, original, batches)
    else:
        with torch.no_grad():
            want = original(**batches[0]).last_hidden_state[batches[0]["attention_mask"].bool()]
        error = (got[batches[0]["attention_mask"].bool()] - want).abs().max()
        assert 0 < error < 0.05 * want.abs().max()


@pytest.mark.parametrize("what", ["another number of buckets", "a bias in place of the table's", "frozen"])
def test_the_bias_is_what_the_original_makes(what):
    """It is asked in every call: what is done to its table, or to who looks it up, counts at once."""
    original, ours, report, batches = mpnet_pair(train=what == "frozen")
    assert_promise(ours, original, batches)
    for model in (original, ours):
        table = model.encoder.relative_attention_bias
        if what == "frozen":
            table.weight.requires_grad_(False)
        elif what == "another number of buckets":
            model.encoder.relative_attention_bias = torch.nn.Embedding(64, 2)
            torch.nn.init.constant_(model.encoder.relative_attention_bias.weight, 0.5)
            model.encoder.relative_attention_bias.weight.data[40:] = -2.0
            table.weight.data.mul_(9.0)
        else:
            table.register_forward_hook(lambda module, args, out: out * 3.0 - args[0][..., None] * 0.1)
    assert_promise(ours, original, batches, everywhere=True, backward=what == "frozen")
    assert report.fallbacks() == {}


def test_what_mpnet_alone_is_asked():
    """None for an output is no answer there: the config's counts. And a tuple has a place for the pooled output."""
    for head in ("pooler", "no_pooler"):
        original, ours, _, batches = mpnet_pair(head)
        for asked in ({"return_dict": False}, {"return_dict": False, "output_hidden_states": True}):
            with torch.no_grad():
                got, want = (model(**batches[0], **asked) for model in (ours, original))
            assert [type(one) for one in got] == [type(one) for one in want]
        for name in ("output_hidden_states", "output_attentions"):
            for model in (ours, original):
                setattr(model.config, name, True)
            with torch.no_grad():
                got, want = (model(**batches[0], **{name: None}) for model in (ours, original))
            assert list(got) == list(want)
            for model in (ours, original):
                setattr(model.config, name, False)


def test_an_all_padded_sequence_of_mpnet():
    original, ours, report, batches = mpnet_pair("single_label")
    batches[0]["attention_mask"][1] = 0
    batches[0]["input_ids"][1] = 1
    assert_promise(ours, original, batches, head="single_label")
    assert any("sees no key" in reason for reason in report.fallbacks())


def test_mpnet_compiled():
    case = Case(seed=7, family="mpnet", train=True, config=SMALL)
    original = build(case)
    ours = patched(original)
    batches = batches_for(case, original.config, 8)
    ours.compile(backend="eager")
    assert_promise(ours, original, batches, backward=True)


def test_what_of_mpnet_runs_fused():
    case = Case(seed=7, family="mpnet", config=SMALL)
    original = build(case)
    ours = patched(original)
    report = rk.patch(ours)
    fused = {replaced.original: replaced.fused for replaced in report.replaced}
    assert fused["MPNetLayer"] == "attention, GELU feed-forward, bias + dropout + residual + LayerNorm"
    assert fused["MPNetEmbeddings"] == "embeddings + LayerNorm + dropout"
    assert report.left == []
    inputs = batch_for(case, ours.config)
    with Ops() as ops:
        ours(**inputs)
    ran = [name.split("::")[1] for name in ops.names if name.endswith("_forward") and "roberta_kernels" in name]
    layer = ["attention_forward", "add_layer_norm_forward", "gelu_ffn_forward", "add_layer_norm_forward"]
    assert ran == ["embedding_layer_norm_forward", *layer * SMALL["num_hidden_layers"]]
    with torch.no_grad():
        weights = [model(**inputs, output_attentions=True).attentions for model in (ours, original)]
        hidden = [model(**inputs, output_hidden_states=True).hidden_states for model in (ours, original)]
    for got, want in zip((*weights[0], *hidden[0]), (*weights[1], *hidden[1]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    rk.unpatch(ours)
    assert not rk.is_patched(ours)
    with torch.no_grad():
        assert torch.equal(ours(**inputs)[0], original(**inputs)[0])


@pytest.mark.parametrize("where", ["encoder.layer.0.output", "encoder.layer.0.attention.LayerNorm", "embeddings"])
def test_a_hook_in_mpnet_runs_the_original(where):
    case = Case(seed=7, family="mpnet", config=SMALL)
    original = build(case)
    ours = patched(original)
    report = rk.patch(ours)
    for model in (ours, original):
        model.get_submodule(where).register_forward_hook(lambda module, args, out: out * 1.5)
    assert_promise(ours, original, batches_for(case, original.config, 2))
    assert report.fallbacks()


def test_other_ways_into_mpnet():
    case = Case(seed=7, family="mpnet", head="single_label", config=SMALL)
    with rk.patch_transformers():
        ours = build(case)
    assert rk.is_patched(ours)
    original = build(case)
    batches = batches_for(case, original.config, 2)
    assert_promise(ours, original, batches, head="single_label")
    reference = patched(original, backend="reference")
    with torch.no_grad(), Ops() as ops:
        reference(**batches[0])
    ran = {name.split("::")[0] for name in ops.names if name.endswith("_forward") and "roberta_kernels" in name}
    assert ran == {"roberta_kernels_reference"}


def test_dropout_in_mpnet():
    config = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.0}
    case = Case(seed=7, family="mpnet", train=True, config=SMALL | config)
    ours = patched(build(case))
    inputs = batch_for(case, ours.config)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(ours(**inputs).last_hidden_state)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hidden", "heads"), [(40, 5), (60, 3), (24, 1), (128, 1), (80, 2), (136, 1)])
@pytest.mark.parametrize("family", ["roberta", "bert", "distilbert", "xmod"])
def test_head_dims(family, hidden, heads):
    # 8 and 20 run in kernels for 16 and 24; 136 is not supported, and runs the original attention.
    config = {"hidden_size": hidden, "num_attention_heads": heads, "num_hidden_layers": 1, "hidden_act": "gelu"}
    case = Case(seed=6, family=family, config=config, train=True)
    original = build(case)
    ours = patched(original)
    report = rk.patch(ours)
    assert_promise(ours, original, batches_for(case, original.config, 8), backward=True)
    reasons = {reason.split(": ", 1)[1] for reason in report.fallbacks()}
    assert reasons == ({"head_dim 136 is not supported"} if hidden == 136 else set())


def test_8194_positions():
    # As bge-m3; the longest sequence there can be, beside a short one.
    config = {"max_position_embeddings": 8194, "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 1}
    case = Case(seed=8, family="xlm_roberta", config=config | {"pad_token_id": 1, "hidden_act": "gelu"})
    original = build(case)
    ids = torch.randint(6, 41, (2, 8192), generator=torch.Generator().manual_seed(8))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    ours = patched(original)
    report = rk.patch(ours)
    with torch.no_grad():
        got = ours(input_ids=torch.where(mask.bool(), ids, 1), attention_mask=mask).last_hidden_state
        for row, length in enumerate((8192, 5)):
            want = original(input_ids=ids[row : row + 1, :length]).last_hidden_state
            torch.testing.assert_close(got[row : row + 1, :length], want, rtol=1e-3, atol=1e-4)
        assert (report.fallbacks(), report.padded()) == ({}, {})
        for model in (original, ours):
            with pytest.raises((IndexError, RuntimeError), match="out of"):
                model(input_ids=torch.full((1, 8193), 7))


@pytest.mark.parametrize("family", ["bert", "electra", "distilbert"])
def test_positions_outside_of_the_table(family):
    case = Case(seed=9, family=family, config=SMALL)
    original = build(case)
    ours = patched(original)
    for inputs in (
        {"input_ids": torch.full((2, 49), 7)},
        {"input_ids": torch.full((2, 5), 7), "position_ids": torch.tensor([[0, 1, 48, 2, 3]])},
    ):
        for model in (original, ours):
            with torch.no_grad(), pytest.raises((IndexError, RuntimeError)):
                model(**inputs)


# --- the code that is known -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", [*LAYERS, "self_attention", "self_output", *EMBEDDINGS])
def test_the_classes_of_every_family_compute_what_is_known(role):
    classes = family_classes(role)
    assert classes
    assert [reason for cls in classes if (reason := known_code.difference(cls, role)) is not None] == []


@pytest.mark.parametrize("role", ["model", "attention_model"])
def test_the_models_of_every_family_can_be_handed_sequences(role):
    for cls in family_classes(role):
        assert known_code.difference(cls, role) is None
        facts = known_code.model_facts(cls, role)
        assert facts.masks is None, "the layers' mask can be replaced"
        assert (facts.unpadded is None) == (role == "model"), facts.unpadded


@pytest.mark.parametrize("change", ["a part more", "a part less", "an attribute less"])
@pytest.mark.parametrize("family", ["roberta", "electra", "xmod"])
def test_a_layer_of_another_structure_is_refused(family, change):
    model = build(Case(seed=10, family=family, config=SMALL))
    core = model.encoder.layer[1].attention.self
    if change == "a part more":
        core.rotary = nn.Identity()
    elif change == "a part less":
        model.encoder.layer[1].attention.self.add_module("dropout", None)
        del core._modules["dropout"]
    else:
        del core.scaling
    with logged("not the code that is known"):
        report = rk.patch(model)
    refused = [left for left in report.left if "not the code that is known" in left.reason]
    assert [left.name.split(".")[2] for left in refused] == ["1"]
    assert type(model.encoder.layer[1]).__module__.startswith("transformers.")
    assert type(core).__module__.startswith("transformers.")


@pytest.mark.parametrize("family", ["camembert", "bert", "roberta_prelayernorm"])
def test_a_layer_that_computes_something_else_is_refused(family, monkeypatch):
    # As a future transformers might: the same names, parameters and parts, and another formula.
    case = Case(seed=12, family=family, config=SMALL)
    original = build(case)
    part = part_class(type(original), "SelfAttention" if family in ATTENTION_ONLY else "Output")
    forward = part.forward

    def other(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        return (output[0] * 1.01, *output[1:]) if isinstance(output, tuple) else output * 1.01

    # As code of transformers' own: a monkey patch of somebody else's is known by where it comes from.
    own = types.FunctionType(other.__code__, forward.__globals__, "forward", None, other.__closure__)
    monkeypatch.setattr(part, "forward", own)
    monkeypatch.setattr(known_code, "_known", {})
    ours = copy.deepcopy(original)
    with logged("computes something else"):
        report = rk.patch(ours)
    assert sum("computes something else" in left.reason for left in report.left) == 2
    assert_promise(ours, original, batches_for(case, original.config, 2))


@pytest.mark.parametrize("where", [functools.partial(torch.device, "meta"), FakeTensorMode])
def test_the_probe_leaves_torch_as_it_was(where, monkeypatch):
    monkeypatch.setattr(known_code, "_known", {})
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with where():
        model = build_on_meta()
        assert rk.patch(model).left == []
    assert torch.equal(torch.get_rng_state(), state)


def build_on_meta():
    import transformers

    return transformers.RobertaModel(transformers.RobertaConfig(vocab_size=50, intermediate_size=40, **SMALL))


def test_a_refused_layer_runs_its_own_code():
    case = Case(seed=11, config=SMALL)
    original = build(case)
    original.encoder.layer[1].extra = nn.Identity()
    ours = patched(original)
    assert_promise(ours, original, batches_for(case, original.config, 2))


def test_every_class_that_a_family_has_is_known():
    for family in SAME_LAYERS:
        for head in heads_of(family):
            cls = hf_class(family, head)
            assert rk.models.fast_class(cls).__name__ == cls.__name__
            assert getattr(rk.models, f"Fast{cls.__name__}") is rk.models.fast_class(cls)
