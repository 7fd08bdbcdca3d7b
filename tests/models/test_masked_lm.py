"""patch(return_logits=False): the loss of a masked language model without its logits."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import forks
import pytest
import torch
from model_cases import Case, assert_case, batch_for, build, logged, patched
from torch import nn
from torch.utils.data import Dataset

import roberta_kernels as rk
from roberta_kernels.hf.families import family_classes

FAMILIES = (
    *("roberta", "xlm_roberta", "camembert", "data2vec_text", "bert", "electra", "ernie", "roc_bert"),
    *("distilbert", "mpnet"),
)
SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "hidden_act": "gelu"}


def case_of(family="roberta", mask="right", **kwargs):
    return Case(seed=6, family=family, head="masked_lm", mask=mask, train=True, config=SMALL, **kwargs)


def loss_only(original, **options):
    """(a patched copy, its report)"""
    ours = copy.deepcopy(original)
    return ours, rk.patch(ours, return_logits=False, **options)


class Loss(nn.Module):
    """A model of which only the loss is looked at."""

    def __init__(self, model, without_logits):
        super().__init__()
        self.model, self.config, self.without_logits = model, model.config, without_logits

    def forward(self, **inputs):
        output = self.model(**inputs)
        assert (output.logits is None) == self.without_logits
        return {"loss": output.loss}


class OpCalls:
    """The rows of each call of the op."""

    def __init__(self, monkeypatch):
        self.rows, op = [], rk.ops.linear_cross_entropy

        def run(x, *args, **kwargs):
            self.rows.append(x.shape[0])
            return op(x, *args, **kwargs)

        monkeypatch.setattr(rk.ops, "linear_cross_entropy", run)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(family, dtype):
    """Three-way; tied weights are tied here too."""
    case = case_of(family, {"float32": "right", "bfloat16": "none"}[dtype], dtype=dtype)
    original = build(case)
    ours, report = loss_only(original)
    assert_case(case, Loss(ours, True), Loss(original, False))
    assert report.fallbacks() == {}
    fused = [replaced.fused for replaced in report.replaced if replaced.name == ""]
    assert fused == ["does without padded rows where its loss does; with labels: the loss, without logits"]


def test_every_family_with_such_a_head_is_tested():
    found = {cls.__module__.split(".")[2] for cls in family_classes("masked_lm_head")}
    assert found == {"data2vec" if name == "data2vec_text" else name for name in FAMILIES}


@pytest.mark.parametrize("mask", ["left", "holes", "real_ids", "none"])
def test_masks(mask):
    case = case_of(mask=mask)
    original = build(case)
    ours, report = loss_only(original)
    assert_case(case, Loss(ours, True), Loss(original, False))
    assert report.fallbacks() == {}


def test_only_rows_with_a_label_are_computed(monkeypatch):
    case = case_of()
    ours, _ = loss_only(build(case))
    inputs = batch_for(case, ours.config)
    calls = OpCalls(monkeypatch)
    ours(**inputs)
    assert calls.rows == [int((inputs["labels"] != -100).sum())]
    assert calls.rows[0] < inputs["labels"].numel()


def test_logits_where_somebody_may_read_them(monkeypatch):
    case = case_of()
    original = build(case).eval()
    inputs = batch_for(case, original.config)
    calls = OpCalls(monkeypatch)
    assert patched(original)(**inputs).logits is not None, "the default"
    ours, _ = loss_only(original)
    unlabelled = {name: t for name, t in inputs.items() if name != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(ours(**unlabelled).logits, patched(original)(**unlabelled).logits)
        assert calls.rows == []
        assert ours(**inputs).logits is None, "in evaluation too"
    rk.patch(ours)
    assert ours(**inputs).logits is not None, "the options of the last patch hold"
    rk.unpatch(ours)
    assert ours(**inputs).logits is not None
    assert len(calls.rows) == 1


def test_all_that_is_beside_the_logits():
    case = case_of("bert")
    original = build(case).eval()
    ours, report = loss_only(original)
    inputs = batch_for(case, original.config)
    want = original(**inputs, output_hidden_states=True)
    got = ours(**inputs, output_hidden_states=True)
    assert list(got) == ["loss", "hidden_states"]
    assert len(got.hidden_states) == len(want.hidden_states)
    in_order = ours(**inputs, return_dict=False)
    assert isinstance(in_order, tuple)
    assert len(in_order) == 1
    torch.testing.assert_close(in_order[0], want.loss)
    assert report.fallbacks() == {}


def test_labels_of_padding_and_of_nothing():
    case = case_of()
    original = build(case)
    ours, _ = loss_only(original)
    inputs = batch_for(case, original.config)
    padded = inputs | {"labels": inputs["input_ids"].clone()}
    torch.testing.assert_close(ours(**padded).loss, original(**padded).loss)
    nothing = inputs | {"labels": torch.full_like(inputs["labels"], -100)}
    loss = ours(**nothing).loss
    assert loss.isnan()
    assert original(**nothing).loss.isnan()
    loss.backward()
    assert not any(parameter.grad.any() for parameter in ours.parameters() if parameter.grad is not None)
    bad = inputs | {"labels": inputs["labels"].clone()}
    bad["labels"][0, 0] = ours.config.vocab_size
    for model in (ours, original):
        with pytest.raises(IndexError, match="is out of bounds"):
            model(**bad)


def test_a_frozen_head_and_a_frozen_encoder():
    case = case_of()
    original = build(case)
    inputs = batch_for(case, original.config)
    for freeze in ("lm_head.decoder", "roberta.encoder"):
        ours, _ = loss_only(original)
        theirs = copy.deepcopy(original)
        for model in (ours, theirs):
            model.get_submodule(freeze).requires_grad_(False)
            model(**inputs).loss.backward()
        for (name, got), want in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert (got.grad is None) == (want.grad is None), name
            if got.grad is not None:
                torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_autocast():
    case = case_of()
    original = build(case)
    ours, report = loss_only(original)
    inputs = batch_for(case, original.config)
    losses = []
    for model in (ours, original):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(**inputs).loss)
    assert losses[0].dtype == losses[1].dtype
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-2, atol=2e-2)
    losses[0].backward()
    assert ours.lm_head.decoder.weight.grad.dtype == torch.float32
    assert report.fallbacks() == {}


def test_traced():
    """A graph does not look at labels: every row, and the same loss."""
    torch._dynamo.reset()
    case = case_of()
    original = build(case)
    ours, _ = loss_only(original)
    inputs = batch_for(case, original.config)
    want = original(**inputs).loss
    torch.testing.assert_close(torch.compile(ours, backend="aot_eager", fullgraph=True)(**inputs).loss, want)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_on_other_backends(backend):
    if not rk.available_backends()[backend]:
        pytest.skip(rk.available_backends()[backend].detail)
    case = case_of()
    original = build(case)
    ours, report = loss_only(original, backend=backend)
    inputs = batch_for(case, original.config)
    torch.testing.assert_close(ours(**inputs).loss, original(**inputs).loss)
    assert report.fallbacks() == {}


def test_the_drop_in_class():
    case = case_of()
    original = build(case)
    fast = rk.FastRobertaForMaskedLM(original.config).train()
    fast.load_state_dict(original.state_dict())
    rk.patch(fast, return_logits=False)
    inputs = batch_for(case, original.config)
    output = fast(**inputs)
    assert output.logits is None
    torch.testing.assert_close(output.loss, original(**inputs).loss)


class MyLinear(nn.Linear):
    """Somebody's decoder."""


def _own_decoder(model):
    decoder = model.lm_head.decoder
    model.lm_head.decoder = MyLinear(decoder.in_features, decoder.out_features)
    model.lm_head.decoder.weight, model.lm_head.decoder.bias = decoder.weight, decoder.bias


def _doubled(module, args, out):
    return out * 2.0


def _own_forward(model):
    decoder = model.lm_head.decoder
    model.lm_head.__dict__["forward"] = lambda features, **kwargs: decoder(features)


FALLBACKS = {
    "decoder": _own_decoder,
    "hook on the decoder": lambda model: model.lm_head.decoder.register_forward_hook(_doubled),
    "hook on the head": lambda model: model.lm_head.register_forward_hook(_doubled),
    "hook inside": lambda model: model.lm_head.dense.register_forward_hook(_doubled),
    "forward of its own": _own_forward,
}


@pytest.mark.parametrize("change", FALLBACKS)
def test_what_cannot_be_had_without_logits_runs_the_original_and_is_counted(change):
    case = case_of()
    original = build(case)
    ours, report = loss_only(original)
    for model in (original, ours):
        FALLBACKS[change](model)
    inputs = batch_for(case, original.config)
    with logged("return_logits=False"):
        output = ours(**inputs)
    want = original(**inputs)
    torch.testing.assert_close(output.loss, want.loss)
    assert output.logits is not None
    assert any("return_logits=False" in reason for reason in report.fallbacks())
    ours(**inputs)
    assert set(report.fallbacks().values()) == {2}


def test_an_unknown_argument_runs_the_original():
    case = case_of()
    ours, report = loss_only(build(case))
    inputs = batch_for(case, ours.config)
    assert ours(**inputs, num_items_in_batch=torch.tensor(3)).logits is None, "which is known to change nothing"
    assert ours(**inputs, of_tomorrow=torch.tensor(3)).logits is not None
    assert any("unknown argument of_tomorrow" in reason for reason in report.fallbacks())


def test_options():
    with pytest.raises(ValueError, match="return_logits must be True or False, got 1"):
        rk.patch(build(case_of()), return_logits=1)
    with rk.patch_transformers(return_logits=False):
        model = build(case_of())
    inputs = batch_for(case_of(), model.config)
    assert model(**inputs).logits is None
    assert copy.deepcopy(model)(**inputs).logits is None


class Rows(Dataset):
    def __init__(self, model):
        self.rows = [batch_for(dataclasses.replace(case_of(mask="full"), seed=i), model.config, batch=2, length=9)
                     for i in range(6)]  # fmt: skip

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return {name: t[index % 2] for name, t in self.rows[index // 2].items() if name != "token_type_ids"}


def test_trainer(tmp_path):
    """Training, evaluation and the loss of both are the original's."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    original = build(case_of())
    ours, report = loss_only(original)
    losses, evaluated = [], []
    for name, model in (("original", original), ("ours", ours)):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / name),
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            seed=1,
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Rows(model), eval_dataset=Rows(model))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        evaluated.append(trainer.evaluate()["eval_loss"])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert evaluated[1] == pytest.approx(evaluated[0], rel=1e-3)
    assert report.fallbacks() == {}


@pytest.mark.full
def test_the_benchmark(tmp_path):
    """A tiny model, all contenders: a table with a row for each."""
    small = ("-m", "benchmarks.masked_lm", "--size", "tiny", "--batch", "2", "--length", "16", "--steps", "1")
    done = forks.python(*small, "--adamw", "--out", tmp_path / "results.json", cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert "| patched, return_logits=False |" in done.stdout
    assert (tmp_path / "results.json").exists()
