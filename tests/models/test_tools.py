"""Tools that meet a patched model: they look at its classes, run it with fake tensors, make errors of warnings."""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import json
import logging
import pickle
import warnings
from pathlib import Path

import forks
import pytest
import torch
import transformers
from model_cases import Case, Ops, assert_promise, batch_for, build, heads_of, patched, run
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode

import roberta_kernels as rk

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "hidden_act": "gelu"}
# Of each kind of family: all of it fused, another way to count positions, embeddings left, attention only.
FAMILIES = ("roberta", "bert", "ernie", "xmod")


def model_and_batch(head="pooler", mask="right", seed=1, **kwargs):
    case = Case(seed=seed, head=head, mask=mask, config=SMALL | kwargs.pop("config", {}), **kwargs)
    model = build(case)
    return model, batch_for(case, model.config)


def both_and_batch(head="pooler", family="roberta", **kwargs):
    original, inputs = model_and_batch(head, family=family, **kwargs)
    return patched(original), original, inputs


def close(got, want):
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)


def pairs(ours, original):
    """Each patched module and the one that it was."""
    return list(zip(ours.modules(), original.modules(), strict=True))


# --- what is asked of a class ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", ["pooler", "masked_lm", "single_label", "choice", "span"])
def test_classes_are_named_as_the_originals(head, family):
    ours, original, inputs = both_and_batch(head, family)
    assert rk.is_patched(ours)
    for when in ("before a call", "after a call"):
        for module, before in pairs(ours, original):
            cls, known = type(module), type(before)
            for name in ("__module__", "__name__", "__qualname__"):
                assert getattr(cls, name) == getattr(known, name), when
            assert str(cls) == str(known)
            assert module.__module__ == before.__module__
            assert isinstance(module, known)
            assert issubclass(cls, known)
            assert cls.__doc__ == known.__doc__
        assert str(ours) == str(original)
        run(ours, inputs)


@pytest.mark.parametrize("family", ["roberta", "xmod"])
def test_what_inspect_finds(family):
    ours, original, _ = both_and_batch("single_label", family)
    for known, (module, before) in {type(pair[1]): pair for pair in pairs(ours, original)}.items():
        cls = type(module)
        if known.__module__.startswith("torch."):
            continue
        assert inspect.getmodule(cls) is inspect.getmodule(known)
        assert inspect.getfile(cls) == inspect.getfile(known)
        assert inspect.getsource(cls) == inspect.getsource(known)
        assert inspect.signature(cls) == inspect.signature(known)
        if known.forward is nn.Module.forward:  # a list of layers
            continue
        assert inspect.signature(module.forward) == inspect.signature(before.forward)
        assert inspect.getsource(inspect.unwrap(cls.forward)) == inspect.getsource(inspect.unwrap(known.forward))
        assert cls.forward.__qualname__ == known.forward.__qualname__
        assert cls.forward.__module__ == known.forward.__module__


@pytest.mark.parametrize("family", FAMILIES)
def test_a_class_goes_through_pickle(family):
    ours, original, _ = both_and_batch("single_label", family)
    for module, before in pairs(ours, original):
        found = pickle.loads(pickle.dumps(type(module)))
        assert issubclass(found, type(before))
        assert str(found) == str(type(before))
        assert pickle.loads(pickle.dumps(type(before))) is type(before), "the original must stay what it is"
        assert copy.deepcopy(type(module)) is type(module)


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
@pytest.mark.parametrize("head", ["pooler", "masked_lm"])
def test_a_copied_model_is_patched_and_named_as_before(head, how):
    ours, original, inputs = both_and_batch(head)
    run(ours, inputs)  # what a call leaves behind must not be in the way
    if how == "pickle":
        copied = pickle.loads(pickle.dumps(ours))
    elif how == "deepcopy":
        copied = copy.deepcopy(ours)
    else:
        buffer = io.BytesIO()
        torch.save(ours, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    assert rk.is_patched(copied)
    assert [str(type(module)) for module in copied.modules()] == [str(type(module)) for module in original.modules()]
    assert_promise(copied, original, inputs, head=head)
    rk.unpatch(copied)
    assert [type(module) for module in copied.modules()] == [type(module) for module in original.modules()]


LOAD = """
import pickle, sys, torch
model, inputs, want = pickle.load(open(sys.argv[1], "rb"))
with torch.no_grad():
    got = model(**inputs)[0]
real = inputs["attention_mask"].bool()
assert torch.allclose(got[real], want[real], rtol=1e-4, atol=1e-5)
import roberta_kernels
assert roberta_kernels.is_patched(model)
print(type(model))
"""


def test_a_pickled_model_in_a_process_that_knows_nothing_of_us(tmp_path):
    ours, original, inputs = both_and_batch()
    with torch.no_grad(), open(tmp_path / "model.pickle", "wb") as file:
        pickle.dump((ours, inputs, original(**inputs)[0]), file)
    done = forks.python("-c", LOAD, tmp_path / "model.pickle")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == str(type(original))


def test_patched_classes_do_not_take_the_place_of_the_originals():
    ours, original, _ = both_and_batch("single_label")
    for module, before in pairs(ours, original):
        known = type(before)
        namespace = importlib.import_module(known.__module__)
        assert getattr(namespace, known.__name__) is known
        assert type(module) is known or type(module) is not getattr(namespace, known.__name__)
    assert type(build(Case(head="single_label"))) is type(original)


# --- what other packages look up ------------------------------------------------------------------------------------


def test_looked_up_by_module_and_name_as_adapters_does():
    # It gives modules the class that it has under that name for the file that their own class is in.
    ours, original, _ = both_and_batch("single_label")
    found, known = (
        [
            (type(module).__module__.rpartition(".modeling_")[2], type(module).__name__)
            for module in model.modules()
            if type(module).__module__.startswith("transformers.models")
        ]
        for model in (ours, original)
    )
    assert found == known
    assert ("roberta", "RobertaSelfAttention") in found


@pytest.mark.parametrize("head", heads_of("roberta"))
def test_looked_up_in_transformers_own_tables(head):
    ours, original, _ = both_and_batch(head)
    modules = transformers.models.auto.modeling_auto
    tables = [value for name, value in vars(modules).items() if name.endswith("_MAPPING_NAMES")]
    name = type(ours).__name__
    assert any(name in table.values() for table in tables if isinstance(table, dict))
    assert getattr(importlib.import_module(type(ours).__module__), name) is type(original)
    assert transformers.utils.generic.find_labels(type(ours)) == transformers.utils.generic.find_labels(type(original))


def test_saved_by_the_name_that_loads(tmp_path):
    ours, original, inputs = both_and_batch("single_label")
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(original).__name__]
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is type(original)
    assert_promise(ours, loaded, inputs, head="single_label")


def test_accelerate_finds_the_layers():
    pytest.importorskip("accelerate")
    from accelerate import infer_auto_device_map
    from accelerate.utils.dataclasses import get_module_class_from_name

    ours, original, _ = both_and_batch()
    for name in original._no_split_modules:
        found = get_module_class_from_name(ours, name)
        assert sum(isinstance(module, found) for module in ours.modules()) == sum(
            type(module).__name__ == name for module in original.modules()
        )
    room = {0: "20KB", "cpu": "1GB"}
    kwargs = {"max_memory": room, "no_split_module_classes": original._no_split_modules}
    assert infer_auto_device_map(ours, **kwargs) == infer_auto_device_map(original, **kwargs)


def test_peft_writes_where_the_model_comes_from(tmp_path):
    peft = pytest.importorskip("peft")
    ours, original, inputs = both_and_batch()
    config = {"target_modules": ["query"], "r": 2}
    for name, model in (("ours", ours), ("original", original)):
        peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config)).save_pretrained(tmp_path / name)
    written, known = (
        json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "original")
    )
    assert written["auto_mapping"] == known["auto_mapping"]
    # What PEFT does with it when it loads the adapter by itself.
    cls = getattr(
        importlib.import_module(written["auto_mapping"]["parent_library"]), written["auto_mapping"]["base_model_class"]
    )
    assert cls is type(original)
    assert_promise(peft.PeftModel.from_pretrained(copy.deepcopy(original), tmp_path / "ours"), original, inputs)


# --- fake tensors ---------------------------------------------------------------------------------------------------


def shapes(output):
    return {
        name: (tuple(value.shape), value.dtype) for name, value in output.items() if isinstance(value, torch.Tensor)
    }


def run_fake(model, inputs, *, grad=False):
    """Shapes and dtypes of what the model gives for fake tensors of these inputs, or the error."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.set_grad_enabled(grad):
        output = model(**{name: mode.from_tensor(tensor) for name, tensor in inputs.items()})
    assert all(isinstance(value, FakeTensor) for value in output.values() if isinstance(value, torch.Tensor))
    return shapes(output)


@pytest.mark.parametrize("mask", ["none", "full", "right"])
@pytest.mark.parametrize("head", ["pooler", "masked_lm", "single_label"])
@pytest.mark.parametrize("ran_before", [False, True], ids=["never called", "called before"])
def test_fake_inputs_in_a_real_model(head, mask, ran_before):
    ours, original, inputs = both_and_batch(head, mask=mask)
    inputs.pop("labels", None)
    if ran_before:  # what was decided for real tensors is there
        run(ours, inputs)
    try:
        want = run_fake(original, inputs)
    except Exception as error:  # transformers reads the mask's values in some releases
        pytest.skip(f"the original cannot: {type(error).__name__}")
    assert run_fake(ours, inputs) == want
    # Nothing of it may stay behind.
    assert_promise(ours, original, inputs, head=head)
    assert run_fake(ours, inputs) == want


@pytest.mark.parametrize("options", [{}, {"quantization": "int8"}, {"padded_rows": "zeros"}], ids=str)
def test_a_fake_copy_of_a_model_that_ran(options):
    original, inputs = model_and_batch(mask="none")
    ours = patched(original, **options)
    before = run(ours, inputs)
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        fake = copy.deepcopy(ours)
    with mode, torch.no_grad():
        output = fake(**{name: mode.from_tensor(tensor) for name, tensor in inputs.items()})
    assert all(isinstance(parameter, FakeTensor) for parameter in fake.parameters())
    assert shapes(output) == {name: (tuple(t.shape), t.dtype) for name, t in run(original, inputs).items()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in run(ours, inputs).items())


@pytest.mark.parametrize("family", ["roberta", "bert", "ernie"])  # xmod reads values of its inputs
def test_a_model_made_and_patched_under_fake_tensors(family):
    original, inputs = model_and_batch(mask="none", family=family)
    mode = FakeTensorMode()
    with mode, torch.no_grad():
        fake = type(original)(original.config).eval()
        rk.patch(fake)
        output = fake(**{name: mode.from_tensor(tensor) for name, tensor in inputs.items()})
    assert shapes(output) == {name: (tuple(t.shape), t.dtype) for name, t in run(original, inputs).items()}
    assert_promise(patched(original), original, inputs)


def test_training_under_fake_tensors():
    original, inputs = model_and_batch("masked_lm", mask="none", train=True)
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        fake = copy.deepcopy(patched(original))
    with mode:
        fake(**{name: mode.from_tensor(tensor) for name, tensor in inputs.items()}).loss.backward()
    for name, parameter in fake.named_parameters():
        assert isinstance(parameter.grad, FakeTensor), name
        assert parameter.grad.shape == parameter.shape


# --- warnings -------------------------------------------------------------------------------------------------------


def _of_another_structure(model):
    model.encoder.layer[1].extra = nn.Linear(2, 2)


def _with_a_hook(model):
    model.encoder.layer[0].intermediate.register_forward_hook(lambda module, args, output: None)


def _with_an_adapter(model):
    class Adapter(nn.Linear):
        pass

    old = model.encoder.layer[0].output.dense
    new = Adapter(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    model.encoder.layer[0].output.dense = new


def _nothing(model):
    pass


# What is done to the model, and what is asked of it: some of its code runs as the original.
FALLBACKS = {
    "attention weights": (_nothing, {"output_attentions": True}),
    "is_causal": (_nothing, {"is_causal": True}),
    "a mask of queries": (_nothing, {"attention_mask": torch.ones(4, 1, 9, 9, dtype=torch.bool)}),
    "a hook": (_with_a_hook, {}),
    "an adapter": (_with_an_adapter, {}),
    "another structure": (_of_another_structure, {}),
}


@pytest.mark.parametrize("what", FALLBACKS)
def test_a_fallback_is_no_error_where_warnings_are(what):
    change, kwargs = FALLBACKS[what]
    original, _ = model_and_batch()
    inputs = {"input_ids": torch.randint(6, original.config.vocab_size, (4, 9))}
    change(original)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = patched(original)
        report = rk.patch(ours)
        with torch.no_grad():
            for _ in range(2):
                close(ours(**inputs | kwargs)[0], original(**inputs | kwargs)[0])
    assert report.fallbacks() or report.left, "the test is of a fallback"


@pytest.mark.parametrize("what", FALLBACKS)
def test_a_fallback_is_logged_once(what, caplog):
    change, kwargs = FALLBACKS[what]
    original, _ = model_and_batch()
    inputs = {"input_ids": torch.randint(6, original.config.vocab_size, (4, 9))} | kwargs
    change(original)
    with caplog.at_level(logging.INFO, logger="roberta_kernels"):
        report = rk.patch(original)
        with torch.no_grad():
            for _ in range(3):
                original(**inputs)
    said = [r for r in caplog.records if r.name.partition(".")[0] == "roberta_kernels" and r.levelno >= logging.WARNING]
    messages = [record.getMessage() for record in said]
    assert messages, (report.left, report.fallbacks())
    assert len(set(messages)) == len(messages), "each reason once"
    for counted in report.fallbacks():
        cls, _, reason = counted.partition(": ")
        assert any(reason in message and cls in message for message in messages), counted
    for left in report.left:
        assert any(left.name in message for message in messages), left


def test_two_reasons_are_two_messages(caplog):
    model, inputs = model_and_batch(mask="none")
    report = rk.patch(model)
    with caplog.at_level(logging.WARNING, logger="roberta_kernels"), torch.no_grad():
        for kwargs in ({"is_causal": True}, {"output_attentions": True}, {"is_causal": True}):
            model(**inputs, **kwargs)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("roberta_kernels")]
    assert len(messages) == len(set(messages)) == len(report.fallbacks()) >= 2


def test_nothing_is_logged_where_all_runs_fused(caplog):
    model, inputs = model_and_batch("masked_lm")
    with caplog.at_level(logging.DEBUG, logger="roberta_kernels"), warnings.catch_warnings():
        warnings.simplefilter("error")
        rk.patch(model)
        run(model, inputs)
        model.train()
        run(model, inputs, backward=True)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("roberta_kernels")] == []


def test_importing_is_silent_where_warnings_are_errors():
    code = (
        "import torch, transformers, warnings\n"
        "warnings.simplefilter('error')\n"
        "import roberta_kernels as rk\n"
        "rk.FastRoberta\n"
    )
    done = forks.python("-c", code, cwd=Path(rk.__file__).parents[1])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""


def test_the_ops_that_a_patched_model_runs_are_ours():
    # What the other tests here compare would be equal with nothing fused at all.
    ours, _, inputs = both_and_batch()
    with Ops() as ops:
        run(ours, inputs)
    assert any(name.startswith("roberta_kernels") for name in ops.names)
