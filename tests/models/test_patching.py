"""patch and unpatch: what is reported, what is left alone, and that nothing stays behind."""

from __future__ import annotations

import copy
import inspect

import forks
import pytest
import torch
import transformers
from model_cases import HEADS, Case, assert_promise, batch_for, batches_for, build, hf_class, log, logged, patched
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModel,
    AutoModelForSequenceClassification,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    RobertaConfig,
    RobertaModel,
)
from transformers.models.roberta import modeling_roberta

import roberta_kernels as rk
from roberta_kernels.hf import attention_interface

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "hidden_act": "gelu"}


def model_and_batch(head="pooler", mask="right", seed=1, **kwargs):
    case = Case(seed=seed, head=head, mask=mask, config=SMALL | kwargs.pop("config", {}), **kwargs)
    model = build(case)
    return model, batch_for(case, model.config)


def snapshot(model):
    """Classes, attribute names and hooks of every module; state dict; names and identities of the parameters."""
    modules = {
        name: (
            type(module),
            sorted(key for key in module.__dict__ if key != "_output_capturing_hooks_installed"),
            dict(module._buffers),
        )
        for name, module in model.named_modules()
    }
    state = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    return modules, state, {name: id(parameter) for name, parameter in model.named_parameters()}


def assert_restored(before, after):
    assert before[0] == after[0]
    assert list(before[1]) == list(after[1])
    for name, (pointer, tensor) in before[1].items():
        assert pointer == after[1][name][0], name
        assert torch.equal(tensor, after[1][name][1]), name
    assert before[2] == after[2]


def outputs(model, inputs, **kwargs):
    with torch.no_grad():
        return [t for t in model(**inputs, **kwargs).to_tuple() if isinstance(t, torch.Tensor)]


def assert_bitwise(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


# --- restoring ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["roberta", "xlm_roberta"])
@pytest.mark.parametrize("head", HEADS)
def test_unpatch_leaves_no_trace(head, family):
    model, inputs = model_and_batch(head, family=family)
    before, want = snapshot(model), outputs(model, inputs)
    signature = inspect.signature(model.forward)
    rk.patch(model)
    assert rk.is_patched(model)
    assert inspect.signature(model.forward) == signature
    assert list(model.state_dict()) == list(before[1])
    assert type(model).__name__ == type(build(Case(head=head, family=family))).__name__
    outputs(model, inputs)
    outputs(model, inputs, output_hidden_states=True)
    rk.unpatch(model)
    assert not rk.is_patched(model)
    assert_restored(before, snapshot(model))
    assert_bitwise(want, outputs(model, inputs))
    rk.unpatch(model)  # harmless
    assert_restored(before, snapshot(model))


def test_unpatch_after_training_keeps_what_was_learnt():
    model, inputs = model_and_batch("masked_lm", train=True)
    rk.patch(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**inputs).loss.backward()
    optimizer.step()
    learnt = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rk.unpatch(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, learnt[name])
    assert model.lm_head.decoder.weight is model.roberta.embeddings.word_embeddings.weight


def test_patching_twice_holds_the_last_options():
    model, inputs = model_and_batch()
    before = snapshot(model)
    first = rk.patch(model)
    want = outputs(model, inputs)
    second = rk.patch(model, padded_rows="zeros")
    assert [replaced.name for replaced in first.replaced] == [replaced.name for replaced in second.replaced]
    assert [replaced.original for replaced in first.replaced] == [replaced.original for replaced in second.replaced]
    real = inputs["attention_mask"].bool()
    got = outputs(model, inputs)
    torch.testing.assert_close(got[0][real], want[0][real], rtol=1e-4, atol=1e-5)
    assert want[0][~real].abs().min() > 0
    assert got[0][~real].abs().max() == 0
    rk.unpatch(model)
    assert_restored(before, snapshot(model))


def test_tied_weights_stay_tied():
    model, _ = model_and_batch("masked_lm")
    rk.patch(model)
    assert model.lm_head.decoder.weight is model.roberta.embeddings.word_embeddings.weight
    assert model.lm_head.decoder.bias is model.lm_head.bias
    model.resize_token_embeddings(120)
    assert model.lm_head.decoder.weight is model.roberta.embeddings.word_embeddings.weight
    assert model(input_ids=torch.tensor([[2, 119, 3]])).logits.shape == (1, 3, 120)


def test_an_error_inside_patch_leaves_the_model_as_it_was(monkeypatch):
    model, inputs = model_and_batch("single_label")
    before, want = snapshot(model), outputs(model, inputs)
    make_fast, calls = rk.patching.make_fast, []

    def failing(module, state):
        calls.append(module)
        if len(calls) == 4:
            raise RuntimeError("halfway")
        return make_fast(module, state)

    monkeypatch.setattr(rk.patching, "make_fast", failing)
    with pytest.raises(RuntimeError, match="halfway"):
        rk.patch(model)
    assert_restored(before, snapshot(model))
    assert_bitwise(want, outputs(model, inputs))
    monkeypatch.undo()

    rk.patch(model, padded_rows="zeros")
    patched_before = snapshot(model)
    calls.clear()
    monkeypatch.setattr(rk.patching, "make_fast", failing)
    with pytest.raises(RuntimeError, match="halfway"):
        rk.patch(model)
    assert_restored(patched_before, snapshot(model))
    rows = {module._rk_state.options.padded_rows for module in model.modules() if "_rk_state" in module.__dict__}
    assert rows == {"zeros"}


@pytest.mark.parametrize("option", ["padded_rows", "packed"])
@pytest.mark.parametrize("value", ["yes", None, 2, 1, 0, "True"])
def test_bad_padded_rows(value, option):
    model, _ = model_and_batch()
    before = snapshot(model)
    with pytest.raises(ValueError, match=option):
        rk.patch(model, **{option: value})
    with pytest.raises(ValueError, match=option):
        rk.patch_transformers(**{option: value})
    assert_restored(before, snapshot(model))


@pytest.mark.parametrize(("packed", "padded_rows"), [(True, "zeros"), (False, "exact"), ("auto", "exact")])
def test_the_former_option_is_translated_with_a_warning(packed, padded_rows):
    model, inputs = model_and_batch()
    with pytest.warns(FutureWarning, match=f'padded_rows="{padded_rows}"') as warned:
        report = rk.patch(model, packed=packed)
    assert [warning.filename for warning in warned] == [__file__]
    assert report.state.options.padded_rows == padded_rows
    with pytest.warns(FutureWarning, match="padded_rows"):
        assert rk.verify(model, inputs, packed=packed).patch_report.state.options.padded_rows == padded_rows
    other = "exact" if padded_rows == "zeros" else "zeros"
    with pytest.raises(ValueError, match="contradicts"):
        rk.patch(model, packed=packed, padded_rows=other)


def test_bad_backend_and_bad_model():
    model, _ = model_and_batch()
    before = snapshot(model)
    with pytest.raises(rk.BackendError, match="no-such"):
        rk.patch(model, backend="no-such")
    with pytest.raises(rk.BackendError, match="no-such"):
        rk.patch_transformers(backend="no-such")
    if not rk.available_backends()["cuda"]:
        with pytest.raises(rk.BackendError, match="not available"):
            rk.patch(model, backend="cuda")
    with pytest.raises(TypeError, match="Module"):
        rk.patch("roberta-base")
    assert_restored(before, snapshot(model))


# --- the report -----------------------------------------------------------------------------------------------------


def test_the_report_names_every_part():
    model, _ = model_and_batch("masked_lm")
    report = rk.patch(model, backend="reference")
    assert report
    names = {replaced.name: replaced.original for replaced in report.replaced}
    assert names[""] == "RobertaForMaskedLM"
    assert names["roberta"] == "RobertaModel"
    assert names["roberta.embeddings"] == "RobertaEmbeddings"
    assert names["roberta.encoder.layer.1"] == "RobertaLayer"
    assert report.left == []
    assert report.backend == "reference"
    text = str(report)
    assert "RobertaLayer" in text
    assert "roberta.encoder.layer.0 and 1 more" in text
    assert "reference" in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_the_report_says_which_activation_is_left():
    model, _ = model_and_batch(config={"hidden_act": "relu"})
    report = rk.patch(model)
    assert any("ReLU" in replaced.fused for replaced in report.replaced)


def test_a_model_of_another_family_is_left_untouched():
    config = AlbertConfig(vocab_size=50, embedding_size=16, hidden_size=16, intermediate_size=32, num_attention_heads=2)
    model = AlbertModel(config).eval()
    before, want = snapshot(model), outputs(model, {"input_ids": torch.tensor([[2, 7, 3]])})
    report = rk.patch(model)
    assert not report
    assert not rk.is_patched(model)
    assert any("albert" in left.reason for left in report.left)
    assert "albert" in str(report)
    assert_restored(before, snapshot(model))
    assert_bitwise(want, outputs(model, {"input_ids": torch.tensor([[2, 7, 3]])}))


def test_a_module_without_any_encoder():
    report = rk.patch(nn.Linear(3, 3))
    assert not report
    assert report.left[0].original == "Linear"
    assert "known family" in report.left[0].reason


class OwnModel(RobertaModel):
    def forward(self, input_ids=None, **kwargs):
        return super().forward(input_ids=input_ids.flip(0), **kwargs)


class OwnLayer(modeling_roberta.RobertaLayer):
    def forward(self, hidden_states, *args, **kwargs):
        return super().forward(hidden_states, *args, **kwargs) * 1.5


def test_a_users_subclass_keeps_its_own_code():
    model, inputs = model_and_batch()
    own = OwnModel(model.config).eval()
    own.load_state_dict(model.state_dict())
    ours = copy.deepcopy(own)
    report = rk.patch(ours)
    assert type(ours) is OwnModel
    assert any(left.original == "OwnModel" and "RobertaModel" in left.reason for left in report.left)
    del inputs["attention_mask"]
    assert_promise(ours, own, inputs)


def test_a_users_layer_keeps_its_own_code():
    model, _ = model_and_batch()
    model.encoder.layer[0].__class__ = OwnLayer
    ours = copy.deepcopy(model)
    report = rk.patch(ours)
    assert any(left.original == "OwnLayer" for left in report.left)
    for mask in ("none", "right", "left"):
        assert_promise(ours, model, batches_for(Case(seed=1, mask=mask, config=SMALL), model.config))


def test_a_layer_put_in_after_patching_keeps_its_own_code():
    model, _ = model_and_batch()
    ours = patched(model)
    model.encoder.layer[1].__class__ = OwnLayer
    ours.encoder.layer[1] = copy.deepcopy(model.encoder.layer[1])
    assert_promise(ours, model, batches_for(Case(seed=1, mask="right", config=SMALL), model.config))


def doubled(name):
    """A subclass of a Hugging Face part whose output is twice as large."""
    base = getattr(modeling_roberta, name)

    def forward(self, *args, **kwargs):
        output = base.forward(self, *args, **kwargs)
        if isinstance(output, tuple):
            return (output[0] * 2, *output[1:])
        if not isinstance(output, torch.Tensor):
            output.last_hidden_state = output.last_hidden_state * 2
            return output
        return output * 2

    return type(f"Own{name}", (base,), {"forward": forward})


PARTS = {
    "encoder": "RobertaEncoder",
    "embeddings": "RobertaEmbeddings",
    "pooler": "RobertaPooler",
    "encoder.layer.1.attention": "RobertaAttention",
    "encoder.layer.1.attention.self": "RobertaSelfAttention",
    "encoder.layer.1.attention.output": "RobertaSelfOutput",
    "encoder.layer.1.intermediate": "RobertaIntermediate",
    "encoder.layer.1.output": "RobertaOutput",
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("part", PARTS)
def test_no_part_with_code_of_its_own_is_skipped(part, when):
    # The way a model gets a longer attention, an early exit or an adapter: a part is replaced by a subclass.
    model, _ = model_and_batch()
    original = copy.deepcopy(model)
    original.get_submodule(part).__class__ = doubled(PARTS[part])
    if when == "before":
        ours = patched(original)
    else:
        ours = patched(model)
        ours.set_submodule(part, copy.deepcopy(original.get_submodule(part)))
    for mask in ("none", "right"):
        assert_promise(ours, original, batches_for(Case(seed=1, mask=mask, config=SMALL), model.config))


def test_a_class_that_is_not_the_known_code_is_refused(monkeypatch):
    class RobertaLayer(modeling_roberta.RobertaLayer):
        def forward(self, hidden_states, rotary, attention_mask=None, **kwargs):
            return super().forward(hidden_states, attention_mask, **kwargs)

    RobertaLayer.__module__ = modeling_roberta.__name__
    model, _ = model_and_batch()
    for layer in model.encoder.layer:
        layer.__class__ = RobertaLayer
    before = snapshot(model)
    report = rk.patch(model)
    reasons = [left.reason for left in report.left if left.original == "RobertaLayer"]
    assert len(reasons) == 2
    assert all("not the code that is known" in reason for reason in reasons)
    assert all(type(layer) is RobertaLayer for layer in model.encoder.layer)
    with pytest.raises(TypeError, match="RobertaLayer"):
        rk.models.fast_class(RobertaLayer)
    rk.unpatch(model)
    assert_restored(before, snapshot(model))


def test_unknown_class_is_a_clear_error():
    with pytest.raises(TypeError, match="not a class that roberta_kernels knows"):
        rk.models.fast_class(AlbertModel)
    with pytest.raises(AttributeError, match="FastNothing"):
        _ = rk.models.FastNothing


# --- fallbacks are visible ------------------------------------------------------------------------------------------


def test_fallbacks_are_counted_and_warned_about_once():
    model, inputs = model_and_batch(attention="eager")
    report = rk.patch(model)
    assert report.fallbacks() == {}
    with logged("attention weights were asked for"):
        model(**inputs, output_attentions=True)
    with log() as messages:
        model(**inputs, output_attentions=True)
    assert messages == []
    (reason, count), *_ = report.fallbacks().items()
    assert "attention weights" in reason
    assert count == 2
    assert rk.patch(model).fallbacks() == {}  # counted anew


def test_fallbacks_are_counted_for_each_layer():
    model, inputs = model_and_batch()
    model.encoder.layer[1].attention.self.register_forward_hook(lambda *_: None)
    report = rk.patch(model)
    with torch.no_grad(), log() as messages:
        for _ in range(3):
            model(**inputs)
    reason = "hooks on a module that fusing would skip"
    assert report.fallbacks_by_module() == {"encoder.layer.1": {reason: 3}}
    assert report.fallbacks() == {f"RobertaLayer: {reason}": 3}
    assert len(messages) == 1, messages
    assert rk.patch(nn.ModuleDict({"inner": model})).fallbacks_by_module() == {}  # counted anew, under new names
    with torch.no_grad():
        model(**inputs)
    assert model.encoder.layer[1]._rk_name == "inner.encoder.layer.1"


def test_nothing_is_counted_where_all_runs_fused(monkeypatch):
    # What a fallback costs where none is taken: nothing is formatted, counted or looked up.
    model, inputs = model_and_batch()
    report = rk.patch(model)
    monkeypatch.setattr(type(report.state), "fell_back", None)
    monkeypatch.setattr(type(report.state), "stayed_padded", None)
    with torch.no_grad():
        model(**inputs)
    assert (report.fallbacks(), report.padded(), report.fallbacks_by_module()) == ({}, {}, {})


def test_padded_passes_are_counted():
    model, inputs = model_and_batch(mask="left")
    report = rk.patch(model)
    with log() as messages:
        model(**inputs, output_hidden_states=True)
        model(**inputs, output_hidden_states=True)
    assert messages == [], "staying padded is no fallback"
    assert report.padded() == {"output_hidden_states=True": 2}
    assert report.fallbacks() == {}


# --- whole models in other models -----------------------------------------------------------------------------------


class TwoEncoders(nn.Module):
    """A bi-encoder: two models of two families, compared by their pooled output."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, **inputs):
        return self.first(**inputs).last_hidden_state[:, 0] @ self.second(**inputs).last_hidden_state[:, 0].T


def test_a_wrapper_that_holds_two_models():
    first, inputs = model_and_batch("no_pooler")
    second, _ = model_and_batch("no_pooler", family="xlm_roberta")
    wrapper = TwoEncoders(first, second)
    before = snapshot(wrapper)
    with torch.no_grad():
        want = wrapper(**inputs)
        report = rk.patch(wrapper)
        got = wrapper(**inputs)
    originals = {replaced.original for replaced in report.replaced}
    assert {"RobertaModel", "XLMRobertaModel", "RobertaLayer", "XLMRobertaLayer"} <= originals
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    rk.unpatch(wrapper)
    assert_restored(before, snapshot(wrapper))
    with torch.no_grad():
        assert torch.equal(wrapper(**inputs), want)


def test_one_model_in_two_places():
    model, inputs = model_and_batch("no_pooler")
    wrapper = TwoEncoders(model, model)
    with torch.no_grad():
        want = wrapper(**inputs)
        rk.patch(wrapper)
        torch.testing.assert_close(wrapper(**inputs), want, rtol=1e-4, atol=1e-4)
    rk.unpatch(wrapper)
    assert not rk.is_patched(model)


def encoder_decoder():
    encoder = RobertaConfig(**SMALL, vocab_size=60, intermediate_size=40, max_position_embeddings=40)
    decoder = RobertaConfig(
        **SMALL,
        vocab_size=60,
        intermediate_size=40,
        max_position_embeddings=40,
        is_decoder=True,
        add_cross_attention=True,
    )
    config = EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 1, 3
    torch.manual_seed(0)
    model = EncoderDecoderModel(config=config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def test_encoder_decoder_with_cross_attention():
    model = encoder_decoder()
    before = snapshot(model)
    ids, mask = torch.randint(6, 60, (2, 7)), torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    inputs = {
        "input_ids": torch.where(mask.bool(), ids, 1),
        "attention_mask": mask,
        "decoder_input_ids": torch.randint(6, 60, (2, 5)),
        "labels": torch.randint(6, 60, (2, 5)),
    }
    ours = patched(model)
    report = rk.patch(ours)
    with torch.no_grad():
        want, got = model(**inputs), ours(**inputs)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
    fallbacks = "".join(report.fallbacks())
    assert ("cross-attention" in fallbacks) == (attention_interface.unavailable is not None)
    generated = [m.generate(inputs["input_ids"], attention_mask=mask, max_new_tokens=6) for m in (model, ours)]
    assert torch.equal(*generated)
    rk.unpatch(ours)
    assert_restored(
        [before[0], {name: (0, t) for name, (_, t) in before[1].items()}, 0],
        [
            {name: (cls, keys, before[0][name][2]) for name, (cls, keys, _) in snapshot(ours)[0].items()},
            {name: (0, t) for name, (_, t) in snapshot(ours)[1].items()},
            0,
        ],
    )


# --- every model from now on ----------------------------------------------------------------------------------------


def test_patch_transformers_as_a_context():
    config = model_and_batch("single_label")[0].config
    with rk.patch_transformers(padded_rows="zeros"):
        inside = AutoModelForSequenceClassification.from_config(config)
        bare = AutoModel.from_config(config)
        own = OwnModel(config)
    outside = AutoModelForSequenceClassification.from_config(config)
    assert rk.is_patched(inside)
    assert rk.is_patched(bare)
    assert type(own) is OwnModel
    assert not rk.is_patched(outside)
    assert inside._rk_state is inside.roberta._rk_state is inside.roberta.encoder.layer[0]._rk_state
    assert inside._rk_state.options.padded_rows == "zeros"
    rk.unpatch(inside)
    assert type(inside) is type(outside)


def test_patch_transformers_as_a_function(tmp_path):
    model, inputs = model_and_batch("token")
    model.save_pretrained(tmp_path)
    constructor = type(model).__init__
    rk.patch_transformers()
    try:
        loaded = type(model).from_pretrained(tmp_path)
        assert rk.is_patched(loaded)
        made = type(model)(model.config)
        assert rk.is_patched(made)
        for got, want in zip(outputs(loaded, inputs), outputs(patched(model), inputs), strict=True):
            assert torch.equal(got, want)
    finally:
        rk.unpatch_transformers()
    assert type(model).__init__ is constructor
    assert not rk.is_patched(type(model)(model.config))
    rk.unpatch_transformers()  # harmless


def test_patch_transformers_contexts_nest():
    config = model_and_batch()[0].config
    with rk.patch_transformers(padded_rows="zeros"):
        with rk.patch_transformers():
            assert RobertaModel(config)._rk_state.options.padded_rows == "exact"
        assert RobertaModel(config)._rk_state.options.padded_rows == "zeros"
    assert not rk.is_patched(RobertaModel(config))


def test_patch_transformers_is_undone_after_an_error():
    config = model_and_batch()[0].config
    with pytest.raises(KeyError), rk.patch_transformers():
        raise KeyError
    assert not rk.is_patched(RobertaModel(config))


def test_drop_in_classes_inside_patch_transformers():
    config = model_and_batch("single_label")[0].config
    with rk.patch_transformers():
        model = rk.FastRobertaForSequenceClassification(config)
    assert type(model) is rk.FastRobertaForSequenceClassification
    assert model.roberta._rk_state is model._rk_state


def test_hf_names_are_kept():
    # Device maps, auto classes and pipelines look classes up by name.
    for family in ("roberta", "xlm_roberta"):
        for head in HEADS:
            cls = hf_class(family, head)
            model = build(Case(head=head, family=family, config=SMALL))
            rk.patch(model)
            assert type(model).__name__ == cls.__name__
            assert model._no_split_modules == cls(model.config)._no_split_modules
            kinds = {type(module).__name__ for module in model.modules()}
            assert f"{cls.__name__[: cls.__name__.index('Roberta')]}RobertaLayer" in kinds
            assert transformers.AutoModel._model_mapping[type(model.config)].__name__.endswith("RobertaModel")


FRESH = """
import logging, torch, transformers
import roberta_kernels as rk
logging.getLogger("roberta_kernels").addHandler(logging.StreamHandler())
rk.patch_transformers()
config = transformers.RobertaConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
)
assert rk.is_patched(transformers.RobertaForMaskedLM(config))
"""


def test_patch_transformers_before_any_other_call():
    """In a process of its own: what is found out about a class is found out while the first model of it is made."""
    done = forks.python("-c", FRESH)
    assert done.returncode == 0, done.stderr
    assert "roberta_kernels" not in done.stderr
