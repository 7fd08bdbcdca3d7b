"""verify: it passes right models, finds wrong ones, and leaves what it was given as it was."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import transformers
from torch import nn

import roberta_kernels as rk
from roberta_kernels import backends, encoder_call, ops, tolerance, verification
from roberta_kernels.hf.families import FAMILIES
from roberta_kernels.quantized import QUANTIZATIONS
from roberta_kernels.verification import GRADIENT, LAYERWISE, ORDINARY, VerificationError, verify

TASKS = (
    "Model",
    "ForMaskedLM",
    "ForCausalLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)


def tiny(task: str = "Model", family: str = "Roberta", **options) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=120,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=50,
        **options,
    )
    return getattr(transformers, f"{family}{task}")(config)


def perturb(monkeypatch, op: str, scale: float) -> None:
    """The fused op, wrong by a factor of 1 + scale."""
    holder, name = (encoder_call.EncoderCall, "run") if op == "encoder" else (ops, op)
    right = getattr(holder, name)
    monkeypatch.setattr(holder, name, lambda *args, **kwargs: right(*args, **kwargs) * (1 + scale))


# Of inference on a CPU, or the ops that it is without the compiled kernels.
ONE_CALL = backends.missing_op("cpu", "encoder") is None
LAST_OP = "encoder" if ONE_CALL else "add_layer_norm"


def layer_by_layer(monkeypatch) -> None:
    monkeypatch.setattr(backends, "missing_op", lambda *_: "left out by a test")


@pytest.mark.parametrize("task", TASKS)
def test_every_task_holds(task):
    report = verify(tiny(task), gradients=True)
    assert report.holds, str(report)
    names = [entry.name for entry in report.entries if entry.call == LAYERWISE]
    assert {"embeddings", "layer 0", "layer 1"} <= set(names)
    assert any(entry.call == ORDINARY for entry in report.entries)
    gradients = {entry.name for entry in report.entries if entry.call == GRADIENT}
    assert any(name.endswith("word_embeddings.weight") for name in gradients)
    assert ("loss" in names) == (task != "Model")


OWN_OPTIONS = {
    "Xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "RoCBert": {"pronunciation_embed_dim": 8, "shape_embed_dim": 8},
}


@pytest.mark.parametrize("family", sorted({family.prefix for family in FAMILIES.values()} - {"Roberta"}))
def test_other_families_hold(family):
    task = "Encoder" if family == "BertGeneration" else "ForSequenceClassification"
    report = verify(tiny(task, family, **OWN_OPTIONS.get(family, {})))
    assert report.holds, str(report)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("task", ["Model", "ForSequenceClassification"])
def test_low_precision_holds(task, dtype):
    report = verify(tiny(task).to(dtype), gradients=True)
    assert report.holds, str(report)
    assert report.dtype == str(dtype).removeprefix("torch.")
    if dtype == torch.float16:
        assert "1024 times the loss" in str(report)


@pytest.mark.parametrize("op", ["attention", "add_layer_norm", "gelu_ffn", "embedding_layer_norm", "encoder"])
def test_a_wrong_kernel_is_found(monkeypatch, op):
    if op == "encoder" and not ONE_CALL:
        pytest.skip("no compiled CPU kernels")
    if op != "encoder":
        layer_by_layer(monkeypatch)
    perturb(monkeypatch, op, 1e-3)
    report = verify(tiny("ForMaskedLM"))
    assert not report.holds
    assert "BROKEN" in str(report)
    first = "embeddings" if op == "embedding_layer_norm" else "layer 0"
    assert next(entry for entry in report.broken if entry.call == LAYERWISE and entry.name != "logits").name == first


def test_a_wrong_kernel_is_found_on_a_single_number(monkeypatch):
    """The score of one sentence is one number, and the yardstick is drawn again; not so far as to excuse an error."""
    layer_by_layer(monkeypatch)
    perturb(monkeypatch, "gelu_ffn", 1e-2)
    model = tiny("ForSequenceClassification", num_labels=1)
    ids = torch.tensor([[0, 5, 9, 33, 2]])
    report = verify(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert "logits" in {entry.name for entry in report.broken}


def test_a_wrong_gradient_is_found(monkeypatch):
    """Right forward, wrong backward: only the gradients can tell."""
    right = ops.gelu_ffn

    def wrong(x, *args, **kwargs):
        out = right(x, *args, **kwargs)
        return out + 0.01 * (out - out.detach())

    monkeypatch.setattr(ops, "gelu_ffn", wrong)
    assert verify(tiny("ForMaskedLM")).holds
    report = verify(tiny("ForMaskedLM"), gradients=True)
    assert not report.holds
    assert {entry.call for entry in report.broken} == {GRADIENT}


def test_the_model_and_the_random_state_stay_as_they_are():
    model = tiny("ForSequenceClassification").train()
    before = copy.deepcopy(model)
    model.classifier.dense.weight.grad = torch.ones_like(model.classifier.dense.weight)
    random = torch.get_rng_state()
    batch = verification.generated_batch(model)
    kept = {key: value.clone() for key, value in batch.items()}
    verify(model, batch, gradients=True)
    assert model.training
    assert not rk.is_patched(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert bool((model.classifier.dense.weight.grad == 1).all())
    assert model.classifier.dense.bias.grad is None
    assert model.config.to_dict() == before.config.to_dict()
    for (name, left), right in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right), name
    assert all(torch.equal(batch[key], value) for key, value in kept.items())


def test_a_patched_model_stays_patched_and_is_compared_with_its_original(monkeypatch):
    model = tiny()
    rk.patch(model)
    assert verify(model).holds
    assert rk.is_patched(model)
    perturb(monkeypatch, LAST_OP, 1e-3)
    assert not verify(model).holds


def test_a_drop_in_model_is_compared_with_its_namesake(monkeypatch):
    model = rk.FastRobertaForMaskedLM(tiny("ForMaskedLM").config)
    assert verify(model).holds
    perturb(monkeypatch, LAST_OP, 1e-3)
    assert not verify(model).holds
    assert type(model) is rk.FastRobertaForMaskedLM


@pytest.mark.parametrize("side", ["right", "left"])
def test_only_real_positions_are_compared(side):
    ids, mask = torch.full((2, 6), 1), torch.zeros(2, 6, dtype=torch.long)
    ids[0], mask[0] = torch.tensor([0, 7, 8, 9, 10, 2]), 1
    short = slice(0, 3) if side == "right" else slice(3, 6)
    ids[1, short], mask[1, short] = torch.tensor([0, 11, 2]), 1
    report = verify(tiny("ForTokenClassification"), {"input_ids": ids, "attention_mask": mask})
    assert report.holds, str(report)
    assert "9 real tokens of 12" in report.batch


def test_a_batch_without_a_mask_and_with_one_sequence():
    report = verify(
        tiny("ForSequenceClassification"), {"input_ids": torch.tensor([[0, 5, 9, 2]]), "return_dict": False}
    )
    assert report.holds, str(report)


def test_an_encoder_decoder_holds():
    encoder, decoder = tiny().config, tiny(is_decoder=True, add_cross_attention=True).config
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    report = verify(transformers.EncoderDecoderModel(config))
    assert report.holds, str(report)
    names = {entry.name for entry in report.entries}
    assert {"encoder layer 1", "decoder layer 1", "logits"} <= names


# -- modules around a model --------------------------------------------------------------------------------------------


class Around(nn.Module):
    """A module of the user's own: a model, and an embedding of each text."""

    def __init__(self, model: nn.Module | None = None):
        super().__init__()
        self.transformer = tiny() if model is None else model
        self.projection = nn.Linear(32, 8)


class MeanOfRealRows(Around):
    def forward(self, input_ids, attention_mask):
        hidden = self.transformer(input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return self.projection((hidden * mask).sum(1) / mask.sum(1))


class MeanOfAllRows(Around):
    def forward(self, input_ids, attention_mask):
        hidden = self.transformer(input_ids, attention_mask=attention_mask).last_hidden_state
        return self.projection(hidden.mean(1))


@pytest.mark.parametrize("gradients", [False, True])
def test_a_module_around_a_model_is_called_itself(gradients):
    report = verify(MeanOfRealRows(), gradients=gradients)
    assert report.holds, str(report)
    assert report.model == "MeanOfRealRows"
    calls = {(entry.call, entry.name) for entry in report.entries}
    assert (ORDINARY, "output") in calls
    assert {(LAYERWISE, "embeddings"), (LAYERWISE, "layer 1")} <= calls
    assert ((GRADIENT, "projection.weight") in calls) == gradients
    assert "layers are those of transformer, the transformers model inside MeanOfRealRows" in str(report)


def test_a_module_that_reads_rows_at_padding_is_found_out():
    """Zeros there are another mean, though the model inside keeps its promise."""
    report = verify(MeanOfAllRows(), padded_rows="zeros")
    assert {(entry.call, entry.name) for entry in report.broken} == {(ORDINARY, "output")}
    assert verify(MeanOfAllRows()).holds
    unpadded = {"input_ids": torch.tensor([[0, 5, 9, 2]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    assert verify(MeanOfAllRows(), unpadded, padded_rows="zeros").holds


class Features(Around):
    """Takes and gives a dict, as a SentenceTransformer does."""

    def forward(self, features, **options):
        output = self.transformer(features["input_ids"], features["attention_mask"], return_dict=False)
        features["tokens"], features["first"] = output[0], self.projection(output[0][:, 0])
        return features


class Tuple(Around):
    def forward(self, **batch):
        output = self.transformer(**batch)
        return self.projection(output.last_hidden_state[:, 0]), {"pooled": [output.pooler_output]}, None


class TakesIds(Around):
    """The mask is its own; and a task's labels are none of its arguments."""

    def __init__(self):
        super().__init__(tiny("ForTokenClassification"))

    def forward(self, input_ids):
        return self.transformer(input_ids, attention_mask=(input_ids != 1).long())


@pytest.mark.parametrize(
    ("around", "names"),
    [
        (Features, {"tokens", "first"}),
        (Tuple, {"output 0", "output 1.pooled 0"}),
        (TakesIds, {"logits"}),
    ],
)
def test_what_modules_around_a_model_take_and_give(around, names):
    report = verify(around())
    assert report.holds, str(report)
    assert {entry.name for entry in report.entries if entry.call == ORDINARY} == names
    assert any(entry.name == "layer 1" for entry in report.entries)


class Parts(Around):
    """Calls the parts of its model, and never the model."""

    def forward(self, input_ids):
        return self.transformer.encoder(self.transformer.embeddings(input_ids)).last_hidden_state


class Two(MeanOfRealRows):
    def __init__(self):
        super().__init__()
        self.other = tiny()

    def forward(self, input_ids, attention_mask):
        return super().forward(input_ids, attention_mask) + self.other(input_ids, attention_mask)[1][:, :8]


def test_a_model_that_is_called_in_parts_is_compared_by_the_batch():
    report = verify(Parts(), {"input_ids": torch.tensor([[0, 5, 9, 33, 2], [0, 7, 8, 6, 2]])})
    assert report.holds, str(report)
    assert {entry.call for entry in report.entries} == {ORDINARY, LAYERWISE}


def test_a_module_around_two_models_is_compared_by_what_it_returns():
    ids = torch.tensor([[0, 5, 9, 33, 2], [0, 7, 8, 6, 2]])
    report = verify(Two(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert report.holds, str(report)
    assert {entry.call for entry in report.entries} == {ORDINARY}
    assert "it does not call one transformers model" in str(report)


class Numbers(Around):
    def forward(self, input_ids, attention_mask):
        return self.transformer(input_ids, attention_mask).last_hidden_state.sum().item()


class Needy(Around):
    def forward(self, input_ids, topic):
        return self.transformer(input_ids)


@pytest.mark.parametrize(
    ("around", "words"),
    [
        (Around, "cannot be called with this batch.*the model inside it, transformer"),
        (Numbers, "must return tensors, .*, got float"),
        (Needy, "'topic'.*pass as batch the keyword arguments"),
        (Two, "contains 2 of them; verify each on its own, or pass a batch"),
    ],
)
def test_a_module_that_cannot_be_compared_is_refused(around, words):
    with pytest.raises(VerificationError, match=words):
        verify(around())


def test_the_report_says_what_runs_and_what_was_left():
    report = verify(tiny(), backend="reference")
    assert report.backend.startswith("reference")
    text = str(report)
    assert "kernels: reference" in text
    assert "\x1b" not in text
    assert json.loads(json.dumps(report.as_dict()))["holds"] is True


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Linear(3, 3), "not a transformers model"),
        (
            transformers.AlbertModel(
                transformers.AlbertConfig(
                    vocab_size=50, embedding_size=16, hidden_size=16, intermediate_size=32, num_attention_heads=2
                )
            ),
            "nothing to replace",
        ),
    ],
)
def test_what_cannot_be_verified_is_refused(model, words):
    with pytest.raises(VerificationError, match=words):
        verify(model)


@pytest.mark.skipif(not ONE_CALL, reason="no compiled CPU kernels")
@pytest.mark.parametrize("how", ["asked for", "patched"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_quantised_weights_are_measured_and_not_judged(quantization, how):
    model = tiny("ForMaskedLM")
    if how == "patched":
        rk.patch(model, quantization=quantization)
        report = verify(model)
        assert model._rk_state.options.quantization == quantization
    else:
        report = verify(model, quantization=quantization)
    assert report.quantization == quantization
    assert report.holds
    judged = [entry for entry in report.entries if not entry.quantised]
    assert report.worst in judged
    assert {entry.call for entry in judged} == {ORDINARY, LAYERWISE}
    errors = {(e.call, e.name): e for e in report.entries if e.quantised}
    for name in ("logits", "loss"):
        assert (quantization, name) in errors
    assert (f"{quantization}, layerwise", "layer 1") in errors
    off = errors[quantization, "logits"]
    assert 1e-5 < off.relative < 0.2
    assert off.comparison.max_error > 10 * off.comparison.max_error_original
    assert errors[f"{quantization}, layerwise", "embeddings"].comparison.holds, "the layers' weights are rounded only"
    text = str(report)
    assert "The promise holds with the float32 weights" in text
    assert f"The {quantization} weights are not held to it" in text
    found = json.loads(json.dumps(report.as_dict()))
    assert found["quantization"] == quantization
    assert len(found["quantised_entries"]) == len(errors)


@pytest.mark.skipif(not ONE_CALL, reason="no compiled CPU kernels")
def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(VerificationError, match="float32 model on a CPU"):
        verify(tiny().bfloat16(), quantization="int8")
    with pytest.raises(VerificationError, match=r"quantization must be None or one of .*, got 'int3'"):
        verify(tiny(), quantization="int3")


def test_prepack_is_accepted_with_a_warning():
    with pytest.warns(FutureWarning, match="prepack has no effect") as warned:
        report = verify(tiny(), prepack=False)
    assert report.holds
    assert [warning.filename for warning in warned if warning.category is FutureWarning] == [__file__]


def test_an_unavailable_backend_is_refused():
    if rk.available_backends()["cuda"]:
        pytest.skip("cuda is available here")
    with pytest.raises(rk.BackendError):
        verify(tiny(), backend="cuda")


def test_nudge_moves_weights_by_one_rounding_at_most():
    model = tiny().to(torch.bfloat16)
    moved = copy.deepcopy(model)
    verification.nudge(moved, seed=0)
    share = []
    for before, after in zip(model.parameters(), moved.parameters(), strict=True):
        ulp = torch.finfo(torch.bfloat16).eps * before.double().abs()
        assert bool(((after.double() - before.double()).abs() <= ulp).all())
        share.append(float((before != after).double().mean()))
    assert max(share) > 0.4


def comparison(error: float, original: float) -> tolerance.Comparison:
    return tolerance.Comparison("x", error, original, 2 * original, error, original, 2 * original)


def judged_over_draws(*draws: tuple[float, float]) -> bool:
    return verification.over_draws([comparison(*draw) for draw in draws]).holds


def test_luck_is_not_a_fault_and_a_fault_is_not_luck():
    assert judged_over_draws((2.1, 1.0), (0.9, 1.1), (1.0, 0.8))  # noise of one size: large once
    assert not judged_over_draws((2.5, 1.0), (2.9, 1.1), (2.6, 0.8))  # always larger
    assert not judged_over_draws((9.0, 1.0), (0.1, 1.1), (0.2, 0.8))  # rarely, and then far off
    assert not judged_over_draws((math.inf, 1.0), (0.1, 1.1), (0.2, 0.8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gradients_that_are_rounding_alone(dtype):
    """The keys' bias moves all scores of a row alike: its gradient is zero in exact arithmetic, and noise otherwise."""
    for seed in range(6):
        model = tiny().to(dtype)
        verification.nudge(model, seed=seed)
        report = verify(model, gradients=True)
        assert report.holds, str(report)
