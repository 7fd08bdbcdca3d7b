"""Quantised products: they run their own code, what is around them stays fused, and the report says so."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from model_cases import Case, assert_promise, batches_for, build, patched, run
from torch import Tensor, nn

import roberta_kernels as rk

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "hidden_act": "gelu"}
OWN = "not a plain nn.Linear"
pytestmark = pytest.mark.filterwarnings("ignore")


class PackedLinear(nn.Linear):
    """Two weights of four bits in a byte, as bitsandbytes keeps them: a parameter of another shape and dtype."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        scale = linear.weight.detach().abs().amax() / 7
        levels = ((linear.weight.detach() / scale).round().clamp(-8, 7) + 8).to(torch.uint8).reshape(-1, 2)
        self.weight = nn.Parameter((levels[:, 0] * 16 + levels[:, 1]).unsqueeze(1), requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        levels = torch.cat([self.weight // 16, self.weight % 16], 1).to(x.dtype) - 8
        return nn.functional.linear(x, (levels * self.scale).view(self.out_features, self.in_features), self.bias)


class PackedTensor(torch.Tensor):
    """A weight that is kept in eight bits and computes as itself, as torchao's: the module is an nn.Linear still."""

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor) -> PackedTensor:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.values, self.scale = values, scale

    @classmethod
    def of(cls, weight: Tensor) -> PackedTensor:
        scale = weight.detach().abs().amax() / 127
        return cls((weight.detach() / scale).round().to(torch.int8), scale)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        plain = torch.utils._pytree.tree_map_only(cls, lambda t: t.values.to(t.scale.dtype) * t.scale, (args, kwargs))
        return function(*plain[0], **(plain[1] or {}))


def packed_linears(model):
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "encoder" in name:
            model.set_submodule(name, PackedLinear(module))


def packed_weights(model):
    for name, module in model.named_modules():
        if type(module) is nn.Linear and "encoder" in name:
            module.weight = nn.Parameter(PackedTensor.of(module.weight), requires_grad=False)


def case_of(family="roberta"):
    return Case(seed=9, family=family, head="single_label", config=SMALL)


def assert_same_beside_the_quantisation(ours, original, batches):
    """Rounding to a few bits hides no error of ours: the same bits are rounded in both."""
    for inputs in batches:
        got, want = run(ours, inputs), run(original, inputs)
        for name, tensor in want.items():
            torch.testing.assert_close(got[name], tensor, rtol=2e-4, atol=2e-5, msg=name)


def assert_reported(report, family="roberta"):
    reasons = report.fallbacks()
    assert reasons
    assert all(OWN in reason for reason in reasons), reasons
    parts = (
        {"query, key or value"} if family == "xmod" else {"query, key or value", "an output product", "feed-forward"}
    )
    assert {part for part in parts if any(part in reason for reason in reasons)} == parts
    assert any("encoder.layer.1" in name for name in report.fallbacks_by_module())


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("family", ["roberta", "electra", "xmod"])
@pytest.mark.parametrize("quantise", [packed_linears, packed_weights])
def test_packed_integers(quantise, family, order):
    original = build(case_of(family))
    ours = copy.deepcopy(original)
    quantise(original)
    if order == "before":
        quantise(ours)
        report = rk.patch(ours)
    else:
        report = rk.patch(ours)
        quantise(ours)
    assert report
    if order == "before" and family != "xmod":
        assert any("feed-forward left" in replaced.fused for replaced in report.replaced)
    batches = batches_for(case_of(family), original.config, 2)
    assert_same_beside_the_quantisation(ours, original, batches)
    assert_reported(report, family)
    if family != "xmod":
        assert report.padded() == {}, "quantised products do not cost the packed pass"
    rk.unpatch(ours)
    assert all(torch.equal(run(ours, inputs)["logits"], run(original, inputs)["logits"]) for inputs in batches)


@pytest.mark.parametrize("order", ["before", "after"])
def test_quantize_dynamic(order):
    def quantised(model):
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)

    case = case_of()
    plain = build(case)
    original = quantised(plain)
    if order == "before":
        ours = copy.deepcopy(original)
        report = rk.patch(ours)
    else:
        ours = quantised(patched(plain))
        assert rk.is_patched(ours)
        report = rk.patch(ours)
    for inputs in batches_for(case, plain.config, 2):
        # These products quantise what comes in by its range over the batch: without padding the range is another, and
        # so is the rounding; so the comparison is with each sequence alone.
        for row in range(len(inputs["input_ids"])):
            length = int(inputs["attention_mask"][row].sum())
            alone = {n: t[row : row + 1, :length] for n, t in inputs.items() if n != "labels"}
            got, want = run(ours, alone)["logits"], run(original, alone)["logits"]
            torch.testing.assert_close(got, want, rtol=5e-3, atol=5e-3)
    assert_reported(report)


def test_half_of_a_model_quantised():
    # One layer only: the other one is fused as ever, and the report names the one.
    case = case_of()
    original = build(case)
    layer = original.roberta.encoder.layer[0]
    layer.intermediate.dense = PackedLinear(layer.intermediate.dense)
    ours = patched(original)
    report = rk.patch(ours)
    assert_same_beside_the_quantisation(ours, original, batches_for(case, original.config, 2))
    assert list(report.fallbacks_by_module()) == ["roberta.encoder.layer.0"]
    assert len(report.fallbacks()) == 1


def torchao_or_skip():
    # transformers imports torchao wherever it finds it, and without a GPU that writes to stderr: `make setup` keeps it
    # in a folder of its own, which `make test-matrices` puts on the path for these tests.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torchao", reason="needs torchao (make test-matrices)")
        import torchao.quantization

    return torchao.quantization


@pytest.mark.full
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao(kind, order):
    quantization = torchao_or_skip()
    case = case_of()
    original = build(case)
    ours = copy.deepcopy(original)
    if order == "after":
        rk.patch(ours)
    for model in (ours, original):
        quantization.quantize_(model, getattr(quantization, kind)())
    report = rk.patch(ours)
    assert type(original.roberta.encoder.layer[0].output.dense.weight) is not nn.Parameter
    batches = batches_for(case, original.config, 2)
    if kind == "Int8WeightOnlyConfig":
        assert_same_beside_the_quantisation(ours, original, batches)
    else:
        # Activations are rounded to eight bits as well: a value at the edge between two goes either way.
        for inputs in batches:
            got, want = run(ours, inputs)["logits"], run(original, inputs)["logits"]
            torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
    assert_reported(report)


def test_what_is_not_quantised_is_not_reported():
    case = case_of()
    original = build(case)
    ours = patched(original)
    report = rk.patch(ours)
    assert_promise(ours, original, batches_for(case, original.config, 2), head="single_label")
    assert report.fallbacks() == {}
