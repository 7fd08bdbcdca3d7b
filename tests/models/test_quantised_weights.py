"""Inference from quantised copies of the layers' weights: how far off it is, that copies follow their weights, and what
becomes of the originals."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref

import pytest
import torch
from encoder_cases import (
    CHANGES,
    PACK,
    PACKED_CALL,
    bias,
    calls,
    case_of,
    hidden,
    in_place,
    layers_of,
    layouts,
    named_change,
    pair,
    resident_growth,
)
from model_cases import assert_promise, batch_for, batches_for, build, exact_copy, log, logged, patched, stay_padded
from safetensors.torch import load_file
from torch import nn
from transformers import RobertaModel

import roberta_kernels as rk
from roberta_kernels import backends, quantized, tolerance
from roberta_kernels.quantized import QUANTIZATIONS, offloading

MISSING = backends.missing_op("cpu", "encoder")
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

quantizations = pytest.mark.parametrize("quantization", QUANTIZATIONS)


def serves(model, inputs):
    return calls(model, inputs).get(PACKED_CALL, 0)


def kept(model):
    """The copies that the model keeps."""
    found = (module.__dict__.get("_rk_memory") for module in model.modules())
    layers = [memory.quantized for memory in found if memory and memory.quantized]
    return [tensor for layer in layers for tensor in layer.copies or ()]


def mapped(model):
    """The parameters that are out of memory."""
    return [
        parameter
        for module in model.modules()
        if (memory := module.__dict__.get("_rk_memory")) and memory.quantized
        for parameter in module.parameters()
        if parameter in memory.quantized.offloaded
    ]


# --- the answers ------------------------------------------------------------------------------------------------------


def rounded(weight, quantization):
    if quantization == "bfloat16":
        return weight.bfloat16().to(weight.dtype)
    if quantization == "int8":  # a scale for every 32 elements of a row
        return torch.cat([rounded(group, "int8-dynamic") for group in weight.split(32, 1)], 1)
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round() * scale


def round_activations(module, args):
    """Each row to 255 steps between its least and its largest value."""
    x = args[0]
    least, largest = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    step = (largest - least) / 255
    zero = (-least / step).round()
    return ((((x / step).round() + zero).clamp(0, 255) - zero) * step,)


def quantised_by_hand(model, quantization):
    """The model with the weights of its layers rounded, in the dtype that they have."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for module in layers_of(model).modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(rounded(module.weight, quantization))
                if quantization == "int8-dynamic":
                    module.register_forward_pre_hook(round_activations)
    return model


@layouts
@pytest.mark.parametrize("family", ["roberta", "bert", "electra", "distilbert"])
@quantizations
def test_the_error_is_what_rounding_the_weights_implies(quantization, family, layout):
    case = case_of(family=family)
    original = build(case)
    ours = patched(original, layout=layout, quantization=quantization)
    by_hand = quantised_by_hand(original, quantization)
    batches = batches_for(case, original.config)
    if quantization != "int8-dynamic":
        assert_promise(ours, by_hand, batches)
    for inputs in batches:
        mask = inputs["attention_mask"].bool()
        exact = hidden(exact_copy(original), inputs)[mask]
        compared = tolerance.compare(hidden(ours, inputs)[mask], hidden(by_hand, inputs)[mask], exact)
        assert compared.rms_error <= 1.5 * compared.rms_error_original, str(compared)
        assert compared.rms_error >= 0.5 * compared.rms_error_original, "the weights are not rounded"
        assert torch.equal(hidden(ours, inputs), hidden(ours, inputs))


@quantizations
def test_instruction_sets(quantization):
    original, ours, batches = pair(quantization=quantization)
    by_hand = quantised_by_hand(original, quantization)
    exact, mask = hidden(exact_copy(original), batches[0]), batches[0]["attention_mask"].bool()
    usual, packed_for = hidden(ours, batches[0]), backends.cpu_isa()
    for isa in backends.cpu_isas():
        with backends.use_cpu_isa(isa):
            assert calls(ours, batches[0]).get(PACK, 0) == (0 if isa == packed_for else 3 * 4)
            packed_for = isa
            got, want = hidden(ours, batches[0]), hidden(by_hand, batches[0])
            compared = tolerance.compare(got[mask], want[mask], exact[mask], name=isa)
            assert serves(ours, batches[0])
            assert 0.5 < compared.rms_error / compared.rms_error_original < 1.5, str(compared)
    assert torch.equal(hidden(ours, batches[0]), usual)


@quantizations
def test_the_saved_weights_are_the_original_ones(quantization, tmp_path):
    original, ours, batches = pair(quantization=quantization)
    hidden(ours, batches[0])
    ours.save_pretrained(tmp_path)
    saved, want = load_file(tmp_path / "model.safetensors"), original.state_dict()
    assert all(torch.equal(saved[name], want[name]) for name in saved)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), original.parameters(), strict=True))


@quantizations
def test_the_report_says_so(quantization):
    model = build(case_of())
    report = rk.patch(model, quantization=quantization)
    assert report.quantization == quantization
    assert f"{quantization} weights" in str(report)
    assert rk.patch(model).quantization is None


WAYS = {
    "gradients are needed": lambda model, inputs: model(**inputs),
    "training mode": lambda model, inputs: hidden(model.train(), inputs),
    "the original attention runs": lambda model, inputs: hidden(model, inputs | {"output_attentions": True}),
    "autocast": lambda model, inputs: hidden(model, inputs),
    "a backend other than the compiled kernels": lambda model, inputs: hidden(model, inputs),
}


@pytest.mark.parametrize("why", WAYS)
def test_float32_weights_are_reported(why):
    original, ours, batches = pair()
    original.config._attn_implementation = ours.config._attn_implementation = "eager"
    report = rk.patch(ours, quantization="int8")
    hidden(ours, batches[0])
    assert report.fallbacks() == {}
    call = WAYS[why]
    with log() as messages:
        for _ in range(2):
            backend = rk.backend("reference" if why == "a backend other than the compiled kernels" else "auto")
            with backend, torch.autocast("cpu", enabled=why == "autocast"):
                got = call(ours, batches[0])
    assert len([message for message in messages if "float32 weights" in message]) == 1, "said once"
    reasons = [reason for reason in report.fallbacks() if "float32 weights" in reason]
    assert len(reasons) == 1
    assert why in reasons[0]
    assert report.fallbacks()[reasons[0]] == 2 * 3
    got = getattr(got, "last_hidden_state", got)
    plain = patched(original).train(ours.training)
    with torch.autocast("cpu", enabled=why == "autocast"):
        want = hidden(plain, batches[0])
    mask = batches[0]["attention_mask"].bool()
    torch.testing.assert_close(got[mask], want[mask], rtol=1e-4, atol=1e-5 if why != "autocast" else 0.1)


@quantizations
def test_an_unpadded_call_and_a_padded_one_share_the_copies(quantization):
    _, ours, batches = pair(quantization=quantization)
    hidden(ours, batches[0])
    padded = batches[0] | {"output_hidden_states": True}
    assert calls(ours, padded).get(PACKED_CALL) == 3
    assert PACK not in calls(ours, padded)
    assert calls(ours, batches[0])[PACKED_CALL] == 1


def test_several_threads_make_the_first_call():
    _, ours, batches = pair(quantization="int8")
    want = hidden(copy.deepcopy(ours), batches[0])
    found = []
    workers = [threading.Thread(target=lambda: found.append(hidden(ours, batches[0]))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    assert all(torch.equal(one, want) for one in found)


@layouts
def test_inference_mode(layout):
    original, ours, batches = pair(layout, quantization="int8")
    with torch.inference_mode():
        inside = ours(**batches[0]).last_hidden_state
    assert torch.equal(inside, hidden(ours, batches[0]))
    assert not any(parameter.is_inference() for parameter in ours.parameters())
    assert_promise(ours, original, batches, backward=True)


@layouts
def test_a_model_made_in_inference_mode(layout):
    """Edits of its weights are not counted, so that copies would not notice them."""
    with torch.inference_mode():
        original, ours, batches = pair(layout, quantization="int8")
        assert not serves(ours, batches[0])
        layers_of(ours)[0].output.dense.weight[0, 0] += 1
        layers_of(original)[0].output.dense.weight[0, 0] += 1
        assert_promise(ours, original, batches[0])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"quantization": "int4"}, "quantization must be None or one of .*, got 'int4'"),
        ({"quantization": True}, "quantization must be .*, got True"),
        ({"quantization": "float32"}, "quantization must be .*, got 'float32'"),
        ({"offload": "yes"}, "offload must be .*, got 'yes'"),
        ({"backend": "reference", "quantization": "int8"}, "backend must be auto or cpu with .*, got 'reference'"),
    ],
    ids=str,
)
def test_bad_options(options, error):
    model = build(case_of())
    for call in (lambda: rk.patch(model, **options), lambda: rk.patch_transformers(**options)):
        with pytest.raises(ValueError, match=error):
            call()
    assert not rk.is_patched(model)
    with pytest.raises(ValueError, match="needs a float32 model on a CPU"):
        rk.patch(model.bfloat16(), quantization="int8")
    assert not rk.is_patched(model)


def test_without_compiled_kernels(monkeypatch):
    monkeypatch.setattr(backends, "missing_op", lambda *_: "not compiled")
    model = build(case_of())
    with pytest.raises(rk.BackendError, match="needs the compiled CPU kernels: not compiled"):
        rk.patch(model, quantization="int8")
    assert not rk.is_patched(model)


def test_prepack_does_not_contradict_it():
    original, ours, batches = pair(quantization="int8")
    for prepack in (True, False):
        with pytest.warns(FutureWarning, match="prepack has no effect"):
            rk.patch(original, prepack=prepack, quantization="int8")
        assert torch.equal(hidden(original, batches[0]), hidden(ours, batches[0]))


def test_models_that_are_made_quantised():
    case = case_of()
    plain = build(case)
    with rk.patch_transformers(quantization="int8"):
        model = type(plain)(plain.config).eval()
        with torch.device("meta"):
            type(plain)(plain.config)
    assert model._rk_state.options.quantization == "int8"
    model.load_state_dict(plain.state_dict())
    inputs = batch_for(case, plain.config)
    assert torch.equal(hidden(model, inputs), hidden(patched(plain, quantization="int8"), inputs))


def test_a_model_without_such_layers_is_not_quantised():
    model = build(case_of(family="xmod"))
    with logged("is not quantised"):
        report = rk.patch(model, quantization="int8")
    assert any("not quantised" in left.reason for left in report.left)


# --- copies follow their weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", [False, True], ids=["in memory", "offloaded"])
@layouts
@pytest.mark.parametrize("change", CHANGES, ids=named_change)
def test_a_change_is_noticed(change, layout, offload):
    """At once: bit for bit as a model that was like that before it was patched. Changed weights run as they are in the
    first call, and from new copies in the next."""
    original, ours, batches = pair(layout, quantization="int8", offload=offload)
    before = hidden(ours, batches[0])
    assert serves(ours, batches[0])
    for model in (original, ours):
        change(model)
    rk.patch(original)
    if layout == "padded":
        stay_padded(original)
    plain = hidden(original, batches[0])
    rk.patch(original, quantization="int8")
    quantised = hidden(original, batches[0])
    after = hidden(ours, batches[0])
    assert (after - before).abs().max() > 1e-3, "the change changes nothing"
    if layout != "padded" or torch.equal(after, quantised):
        assert torch.equal(after, plain) or torch.equal(after, quantised)
    else:  # each layer by itself: those that did not change run from their copies
        assert (after - plain).square().mean() < (after - before).square().mean() / 4
    assert torch.equal(hidden(ours, batches[0]), quantised)
    assert torch.equal(hidden(ours, batches[0]), quantised)


def test_only_what_changed_is_packed_again():
    _, ours, batches = pair(quantization="int8")
    assert calls(ours, batches[0])[PACK] == 3 * 4
    assert PACK not in calls(ours, batches[0])
    in_place(ours)
    assert PACK not in calls(ours, batches[0])
    assert calls(ours, batches[0])[PACK] == 4
    bias(ours)
    assert PACK not in calls(ours, batches[0]), "biases and norms are read where they are"


def test_training_hands_freed_memory_back(monkeypatch):
    trimmed = []
    monkeypatch.setattr(quantized, "trim", lambda: trimmed.append(True))
    _, ours, batches = pair(quantization="int8")
    hidden(ours, batches[0])
    ours.train()
    assert trimmed == [True]
    ours.train()
    assert trimmed == [True], "nothing was there to free"


def test_training_frees_the_copies_and_learns_the_same():
    original, ours, batches = pair(quantization="int8")
    hidden(ours, batches[0])
    alive = [weakref.ref(tensor) for tensor in kept(ours)]
    assert len(alive) == 12
    ours.train()
    assert not [reference for reference in alive if reference() is not None]
    fresh = patched(original).train()
    for model in (ours, fresh):
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for inputs in batches:
            torch.manual_seed(0)
            model(**inputs).last_hidden_state.square().sum().backward()
            optimiser.step()
            optimiser.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), fresh.parameters(), strict=True))
    rk.patch(fresh.eval(), quantization="int8")
    hidden(ours.eval(), batches[0])  # their first call since: on the weights themselves
    assert torch.equal(hidden(ours, batches[0]), hidden(fresh, batches[0]))
    assert serves(ours, batches[0]) == 1


@pytest.mark.parametrize("offload", [False, True], ids=["in memory", "offloaded"])
def test_unpatch_frees_the_copies(offload):
    original, ours, batches = pair(quantization="int8", offload=offload)
    hidden(ours, batches[0])
    alive = [weakref.ref(tensor) for tensor in kept(ours)]
    assert len(alive) == 12
    rk.unpatch(ours)
    assert not [reference for reference in alive if reference() is not None]
    assert not any(name.startswith("_rk") for module in ours.modules() for name in module.__dict__)
    assert torch.equal(hidden(ours, batches[0]), hidden(original, batches[0]))


@pytest.mark.parametrize("offload", [False, True], ids=["in memory", "offloaded"])
def test_nothing_of_it_is_copied_or_saved(offload, tmp_path):
    _, ours, batches = pair(quantization="int8", offload=offload)
    size, names = len(pickle.dumps(ours)), list(ours.state_dict())
    ours.save_pretrained(tmp_path / "before")
    want = hidden(ours, batches[0])
    assert kept(ours)
    assert len(pickle.dumps(ours)) < size + 1500
    assert list(ours.state_dict()) == names
    ours.save_pretrained(tmp_path / "after")
    before, after = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("before", "after"))
    assert before == after
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert not kept(copied)
        assert torch.equal(hidden(copied, batches[0]), want)
        in_place(copied)
        assert not torch.equal(hidden(copied, batches[0]), want)
    assert torch.equal(hidden(ours, batches[0]), want)


# --- weights out of memory --------------------------------------------------------------------------------------------


@layouts
def test_offloaded_weights_are_what_they_were(layout, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    original, ours, batches = pair(layout, quantization="int8")
    parameters = dict(ours.named_parameters())
    views = {name: parameter._version for name, parameter in parameters.items()}
    want = hidden(ours, batches[0])
    assert len(mapped(ours)) == 3 * 6
    assert not list(tmp_path.iterdir()), "the files have no names"
    assert all(parameter is parameters[name] for name, parameter in ours.named_parameters())
    assert {name: parameter._version for name, parameter in ours.named_parameters()} == views
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), original.parameters(), strict=True))

    in_place(ours)
    assert not torch.equal(hidden(ours, batches[0]), want)
    in_place(original)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), original.parameters(), strict=True))
    rk.unpatch(ours)
    assert not mapped(ours)
    assert all(parameter is parameters[name] for name, parameter in ours.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), original.parameters(), strict=True))


def test_offloaded_weights_train():
    original, ours, batches = pair(quantization="int8")
    hidden(ours, batches[0])
    assert mapped(ours)
    fresh = patched(original, quantization="int8", offload=False)
    for model in (ours, fresh):
        model.train()
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-2)
        model(**batches[0]).last_hidden_state.square().sum().backward()
        optimiser.step()
        model.eval()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), fresh.parameters(), strict=True))
    hidden(ours, batches[0])  # its first call since: on the weights themselves
    assert torch.equal(hidden(ours, batches[0]), hidden(fresh, batches[0]))


def test_a_weight_that_is_a_part_of_something_stays_in_memory():
    _, ours, batches = pair(quantization="int8")
    dense = layers_of(ours)[0].output.dense
    whole = torch.stack([dense.weight.detach(), dense.weight.detach()])
    dense.weight.data = whole[0]
    hidden(ours, batches[0])
    assert len(mapped(ours)) == 3 * 6 - 1
    before = hidden(ours, batches[0])
    dense.weight.data.zero_()
    assert whole[0].abs().max() == 0
    assert not torch.equal(hidden(ours, batches[0]), before)


def test_weights_that_are_in_the_models_file_stay_there(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    build(case_of()).save_pretrained(tmp_path / "model")
    content = (tmp_path / "model" / "model.safetensors").read_bytes()
    original, ours = (RobertaModel.from_pretrained(tmp_path / "model").eval() for _ in range(2))
    weight = layers_of(ours)[0].output.dense.weight
    if not any(start <= weight.data_ptr() < end for start, end, _ in offloading._file_mappings()):
        pytest.skip("this transformers reads weights into memory")
    pointer = weight.data_ptr()
    rk.patch(ours, quantization="int8")
    rk.patch(original, quantization="int8", offload=False)
    inputs = batch_for(case_of(), ours.config)
    assert torch.equal(hidden(ours, inputs), hidden(original, inputs))
    assert len(mapped(ours)) == 3 * 6
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    assert weight.data_ptr() == pointer
    for model in (ours, original):
        in_place(model)
    assert torch.equal(hidden(ours, inputs), hidden(original, inputs))
    rk.unpatch(ours)
    assert weight.data_ptr() == pointer
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == content


def test_tied_layers():
    case = case_of()
    original = build(case)
    original.encoder.layer[2] = original.encoder.layer[0]
    ours = patched(original, quantization="int8")
    inputs = batch_for(case, original.config)
    hidden(ours, inputs)
    assert ours.encoder.layer[2] is ours.encoder.layer[0]
    assert len(set(map(id, mapped(ours)))) == 2 * 6
    want = hidden(patched(original, quantization="int8", offload=False), inputs)
    assert torch.equal(hidden(ours, inputs), want)


def test_no_room(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "is not there"))
    _, ours, batches = pair(quantization="int8")
    with logged("weights stay in memory"):
        got = hidden(ours, batches[0])
    assert not mapped(ours)
    with log() as messages:
        assert torch.equal(hidden(ours, batches[0]), got)
    assert messages == []


@pytest.mark.full
@pytest.mark.parametrize(
    ("quantization", "offload", "grows", "loaded"),
    [("bfloat16", None, -0.5, False), ("int8", None, -0.75, True), ("int8", False, 0.25, True)],
)
def test_resident_memory(quantization, offload, grows, loaded, tmp_path):
    """What inference adds to the process, and that unpatch takes it away again."""
    inference, unpatched = resident_growth(quantization, offload, tmp_path / "model" if loaded else None)
    assert abs(inference - grows) < 0.2
    assert unpatched < 0.2
    assert unpatched > -0.2 or (loaded and offload is not False)
