"""torch.compile and torch.export: one graph, whatever is in the batch."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import inspect

import pytest
import torch
import torch._dynamo.testing
import torch._inductor
from model_cases import PREFIX, Case, assert_promise, batch_for, batches_for, build, exact_copy, patched, run

import roberta_kernels as rk

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "hidden_act": "gelu"}
full = pytest.mark.full
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def case_of(head="single_label", mask="right", **kwargs):
    return Case(seed=3, head=head, mask=mask, config=SMALL, **kwargs)


@pytest.mark.parametrize(
    ("head", "train"), [("pooler", False), ("masked_lm", True), ("single_label", True), ("span", False)]
)
def test_compiled_in_one_graph(head, train):
    case = case_of(head, train=train)
    original = build(case)
    ours = patched(original)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    compiled.zero_grad, compiled.named_parameters = ours.zero_grad, ours.named_parameters
    batches = [batch_for(Case(seed=3 + i, head=head, mask=mask, config=SMALL), original.config, length=9)
               for i, mask in enumerate(["right", "left", "holes", "full"])]  # fmt: skip
    for inputs in batches:
        inputs.pop("token_type_ids", None)
    assert_promise(compiled, original, batches, exact=exact_copy(original), head=head, backward=train)


# Of the families with RoBERTa's code one.
CODES = [family for family in PREFIX if family not in ("xlm_roberta", "camembert", "data2vec_text")]


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f == "bert" else full) for f in CODES])
def test_every_family_compiled_in_one_graph(family):
    # One dynamic graph for batches of different shapes. A family's code is what the graph is made from; what torch then
    # makes of a graph, with its backward, is the same for all, and one of them is trained in.
    case = case_of("pooler", family=family, train=True)
    original = build(case)
    ours = patched(original)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager" if family == "bert" else "eager")
    compiled.zero_grad, compiled.named_parameters = ours.zero_grad, ours.named_parameters
    batches = [batch_for(case, original.config, batch=size, length=length) for size, length in ((4, 9), (3, 14))]
    for inputs in batches:
        inputs.pop("token_type_ids", None)
    exact = exact_copy(original)
    if family == "bert":
        assert_promise(compiled, original, batches, exact=exact, backward=True)
    original.eval()
    ours.eval()
    assert_promise(compiled, original, batches, exact=exact.eval())


@pytest.mark.parametrize("head", ["pooler", "causal_lm"])
def test_attn_implementation_compiled_in_one_graph(head):
    case = case_of(head)
    original = build(case)
    ours = copy.deepcopy(original)
    ours.set_attn_implementation("roberta_kernels")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for inputs in batches_for(case, original.config, 2):
        inputs.pop("labels", None)
        kwargs = {"use_cache": False} if head == "causal_lm" else {}
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            got, want = compiled(**inputs, **kwargs)[0], original(**inputs, **kwargs)[0]
        torch.testing.assert_close(got[real], want[real], rtol=2e-4, atol=2e-5)


def test_compiled_without_a_mask():
    case = case_of("pooler", "none")
    original = build(case)
    compiled = torch.compile(patched(original), fullgraph=True, backend="aot_eager")
    for inputs in batches_for(case, original.config, 2):
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs)[0], original(**inputs)[0], rtol=2e-4, atol=2e-5)


def test_a_new_length_is_no_new_graph():
    case = case_of("pooler")
    original = build(case)
    ours = patched(original)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=counter)
    graphs = set()
    for batch, length in ((4, 9), (3, 12), (5, 17), (2, 30)):
        inputs = batch_for(case, original.config, batch=batch, length=length)
        inputs.pop("token_type_ids", None)
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            got, want = compiled(**inputs), original(**inputs)
        torch.testing.assert_close(got[0][real], want[0][real], rtol=2e-4, atol=2e-5)
        torch.testing.assert_close(got[1], want[1], rtol=2e-4, atol=2e-5)
        graphs.add(counter.frame_count)
    assert len(graphs) == 1


def test_compiled_models_of_several_classes_in_one_process():
    # torch compiles one code object eight times, then gives up; so no two classes may share theirs. Here: twice.
    compiled = []
    with torch._dynamo.config.patch(recompile_limit=2):
        for family in ("roberta", "xlm_roberta", "bert", "electra"):
            case = case_of("pooler", family=family)
            original = build(case)
            compiled.append(torch.compile(patched(original), fullgraph=True, backend="eager"))
            inputs = batch_for(case, original.config)
            real = inputs["attention_mask"].bool()
            with torch.no_grad():  # fullgraph: a limit that is hit is an error
                got, want = compiled[-1](**inputs), original(**inputs)
            torch.testing.assert_close(got[0][real], want[0][real], rtol=2e-4, atol=2e-5)


def test_compiled_layer_by_layer():
    # As model.compile_repeated_blocks does it: all layers of a model run what was compiled of the first.
    case = Case(seed=3, mask="full", config=SMALL | {"num_hidden_layers": 3})
    original = build(case)
    ours = patched(original)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    for layer in ours.encoder.layer:
        layer.compile(backend=counter, fullgraph=True)
    inputs = batch_for(case, original.config)
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs)[0], original(**inputs)[0], rtol=2e-4, atol=2e-5)
    assert counter.frame_count == 1


def test_no_two_classes_share_a_code_object():
    codes = {}
    for family in ("roberta", "bert", "xmod"):
        for head in ("pooler", "token"):
            for cls in {type(module) for module in patched(build(case_of(head, family=family))).modules()}:
                if "_rk_original" not in vars(cls):
                    continue
                for name, function in vars(cls).items():
                    # transformers' own wrappers are one code for all layers there are, as in a model not patched.
                    if inspect.isfunction(function) and "roberta_kernels" in function.__code__.co_filename:
                        assert codes.setdefault(id(function.__code__), (cls, name)) == (cls, name)
    assert len(codes) > 20


def test_compiled_with_dropout():
    case = case_of("masked_lm", train=True)
    original = build(case)
    for module in original.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    ours = patched(original)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    compiled.zero_grad, compiled.named_parameters = ours.zero_grad, ours.named_parameters
    inputs = batch_for(case, original.config)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(run(compiled, inputs, backward=True))
    assert torch.equal(results[0]["loss"], results[1]["loss"])
    assert not torch.equal(results[0]["loss"], results[2]["loss"])
    name = "grad of roberta.encoder.layer.0.output.dense.weight"
    assert torch.equal(results[0][name], results[1][name])


def test_compiled_with_a_backend_of_its_own():
    case = case_of("pooler")
    original = build(case)
    ours = patched(original, backend="reference")
    compiled = torch.compile(ours, backend="aot_eager")
    inputs = batch_for(case, original.config)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs)[1], original(**inputs)[1], rtol=2e-4, atol=2e-5)


def exported(ours, inputs):
    """The model exported with both sizes of its ids and mask free."""
    example = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    size, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=40)
    shapes = {name: {0: size, 1: length} for name in example}
    return torch.export.export(ours, (), example, dynamic_shapes=shapes, strict=False)


def assert_runs_like(module, original, case):
    for mask in ("right", "left", "holes"):
        for batch, length in ((4, 9), (3, 14)):
            inputs = batch_for(dataclasses.replace(case, mask=mask), original.config, batch=batch, length=length)
            example = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            with torch.no_grad():
                torch.testing.assert_close(module(**example).logits, original(**example).logits, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    "family", ["roberta", *(pytest.param(f, marks=full) for f in ("xlm_roberta", "bert", "electra", "ernie", "xmod"))]
)
def test_exported_with_a_mask(family):
    case = case_of("single_label", family=family)
    original = build(case)
    program = exported(patched(original), batch_for(case, original.config, length=9))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("roberta_kernels" in target and "attention" in target for target in targets)
    assert_runs_like(program.module(), original, case)


@pytest.mark.parametrize("head", ["pooler", "token", "span"])
def test_padded_rows_of_a_graph_are_those_of_a_call(head):
    case = case_of(head, "holes")
    original = build(case)
    ours = patched(original)
    module = exported(ours, batch_for(case, original.config, length=9)).module()
    for mask in ("right", "left", "holes"):
        inputs = batch_for(dataclasses.replace(case, mask=mask), original.config, length=12)
        example = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            torch.testing.assert_close(module(**example)[0], ours(**example)[0], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("head", ["masked_lm", "causal_lm"])
def test_a_compiled_loss_that_reads_padding(head):
    case = case_of(head, train=True)
    original = build(case)
    compiled = torch.compile(patched(original), fullgraph=True, backend="aot_eager")
    inputs = batch_for(case, original.config)
    inputs["labels"] = torch.full_like(inputs["input_ids"], 7)
    torch.testing.assert_close(compiled(**inputs).loss, original(**inputs).loss, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("head", ["pooler", "masked_lm", "choice"])
def test_exported_by_transformers(head):
    exporters = pytest.importorskip("transformers.exporters", exc_type=ImportError)
    case = case_of(head, "holes")
    original = build(case)
    ours = patched(original)
    inputs = batch_for(case, original.config)
    inputs.pop("labels", None)
    exported_model = exporters.DynamoExporter().export(ours, dict(inputs), config=exporters.DynamoConfig(dynamic=True))
    with torch.no_grad():
        got, want = exported_model.program.module()(**inputs), ours(**inputs)
    assert got.keys() == want.keys()
    torch.testing.assert_close(got[0], want[0], rtol=2e-4, atol=2e-5)


@full
def test_compiled_ahead_of_time(tmp_path):
    case = case_of("single_label")
    original = build(case)
    with torch.no_grad():
        program = exported(patched(original), batch_for(case, original.config, length=9))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    assert_runs_like(torch._inductor.aoti_load_package(path), original, case)


def test_a_traced_model_does_not_keep_the_padding_it_saw():
    case = case_of("no_pooler")
    original = build(case)
    ours = patched(original)
    ours.config.return_dict = False
    inputs = batch_for(case, original.config, length=9)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        traced = torch.jit.trace(ours, (ids, mask), strict=False, check_trace=False)
        for kind in ("right", "left", "holes", "full"):
            other = batch_for(case_of("no_pooler", kind), original.config, length=9)
            real = other["attention_mask"].bool()
            got = traced(other["input_ids"], other["attention_mask"])[0]
            want = original(input_ids=other["input_ids"], attention_mask=other["attention_mask"])[0]
            torch.testing.assert_close(got[real], want[real], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("family", ["roberta", "bert"])
def test_a_traced_model_takes_other_lengths(family, mask):
    case = case_of("no_pooler", family=family)
    original = build(case)
    original.config.return_dict = False
    ours = patched(original)
    names = ("input_ids", "attention_mask") if mask else ("input_ids",)

    def arguments(batch, length):
        inputs = batch_for(case, original.config, batch=batch, length=length)
        if not mask:
            inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 7)
        return inputs, [inputs[name] for name in names]

    with torch.no_grad():
        traced = torch.jit.trace(ours, tuple(arguments(4, 9)[1]), strict=False, check_trace=False)
        for batch, length in ((4, 40), (6, 5), (1, 17)):
            inputs, given = arguments(batch, length)
            real = inputs["attention_mask"].bool() if mask else torch.ones(batch, length).bool()
            want = original(**dict(zip(names, given, strict=True)))[0]
            torch.testing.assert_close(traced(*given)[0][real], want[real], rtol=2e-4, atol=2e-5)


class Logits(torch.nn.Module):
    """What torch.onnx.export takes: tensors in, a tensor out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=False)[0]


def onnx_inputs(case, config):
    inputs = batch_for(case, config, length=9)
    return inputs["input_ids"], inputs["attention_mask"]


@pytest.mark.parametrize("family", ["roberta", "xmod"])
def test_exported_to_onnx_by_tracing(family, tmp_path, monkeypatch):
    """The original, as no ONNX runtime knows the fused ops: a file like that of the model before it was patched."""
    if importlib.util.find_spec("onnx") is None:  # which adds functions that no such model has
        utils = pytest.importorskip("torch.onnx._internal.torchscript_exporter.onnx_proto_utils")
        monkeypatch.setattr(utils, "_add_onnxscript_fn", lambda content, opsets: content)
    case = case_of("single_label", family=family)
    original = build(case)
    ours = copy.deepcopy(original)
    report = rk.patch(ours)
    for model, name in ((original, "original"), (ours, "ours")):
        torch.onnx.export(Logits(model), onnx_inputs(case, original.config), tmp_path / name, dynamo=False)
    assert (tmp_path / "ours").stat().st_size == (tmp_path / "original").stat().st_size
    assert b"roberta_kernels" not in (tmp_path / "ours").read_bytes()
    assert any("ONNX export" in reason for reason in report.fallbacks())
    inputs = batch_for(case, original.config)
    assert_promise(ours, original, inputs, head="single_label")


def test_exported_to_onnx_by_torch_export(tmp_path):
    case = case_of("single_label")
    original = build(case)
    ours = patched(original)
    given = onnx_inputs(case, original.config)
    flags = pytest.importorskip("torch.onnx._internal.exporter._flags")
    export = flags.set_onnx_exporting_flag(torch.export.export)  # what torch.onnx.export(dynamo=True) starts with
    graph = export(Logits(ours), given, strict=False).graph
    targets = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert not any("roberta_kernels" in target for target in targets), targets
    assert any("scaled_dot_product_attention" in target for target in targets)
    pytest.importorskip("onnxscript")
    torch.onnx.export(Logits(ours), given, tmp_path / "ours", dynamo=True)


def test_compiling_does_not_disturb_what_is_not_compiled():
    case = case_of("pooler")
    original = build(case)
    ours = patched(original)
    inputs = batch_for(case, original.config)
    with torch.no_grad():
        want = ours(**inputs)[0]
        torch.compile(ours, fullgraph=True, backend="aot_eager")(**inputs)
        assert torch.equal(ours(**inputs)[0], want)
    report = rk.patch(ours)
    ours(**inputs)
    assert report.padded() == {}


@full
def test_compiled_for_real():
    case = case_of("single_label", train=True)
    original = build(case)
    ours = patched(copy.deepcopy(original))
    compiled = torch.compile(ours, fullgraph=True)
    compiled.zero_grad, compiled.named_parameters = ours.zero_grad, ours.named_parameters
    inputs = batch_for(case, original.config)
    assert_promise(compiled, original, inputs, exact=exact_copy(original), head="single_label", backward=True)
