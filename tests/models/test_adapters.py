"""PEFT: LoRA and modules_to_save, attached before or after patching, merged, switched off, saved, loaded."""

from __future__ import annotations

import copy

import pytest
import torch
from model_cases import Case, assert_case, assert_promise, batches_for, build, exact_copy, log, logged, run

import roberta_kernels as rk

peft = pytest.importorskip("peft", reason="needs roberta_kernels[test]")

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "hidden_act": "gelu"}
PROJECTIONS = ["query", "value"]
EVERY_PRODUCT = ["query", "key", "value", "dense"]
# What is said of an adapter's product; all that is around it stays fused.
OWN = "not a plain nn.Linear"


def case_of(family="roberta", **kwargs):
    return Case(seed=4, family=family, head="single_label", config=SMALL, **kwargs)


def adapted(model, targets=PROJECTIONS, **options):
    """The model inside a PeftModel, with adapters that change what it gives."""
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=16, lora_dropout=0.0, target_modules=targets, **options
    )
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(6)) * 0.3)
    return wrapped


def pair(order, family="roberta", targets=PROJECTIONS, train=False, **options):
    """A patched PEFT model, its report, one that is not patched, and batches."""
    case = case_of(family, train=train)
    plain = build(case)
    original = adapted(copy.deepcopy(plain), targets, **options).train(train)
    ours = copy.deepcopy(plain)
    if order == "before":
        ours = adapted(ours, targets, **options)
        report = rk.patch(ours)
    else:
        report = rk.patch(ours)
        ours = adapted(ours, targets, **options)
    assert report
    return ours.train(train), report, original, batches_for(case, plain.config, 2)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(
    ("family", "targets"),
    [("roberta", PROJECTIONS), ("roberta", EVERY_PRODUCT), ("bert", EVERY_PRODUCT), ("xmod", PROJECTIONS)],
)
def test_outputs_and_gradients(order, family, targets):
    ours, report, original, _ = pair(order, family, targets, train=True)
    assert_case(case_of(family, train=True), ours, original)
    with_gradient = {name for name, parameter in ours.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, parameter in original.named_parameters() if parameter.grad is not None}
    assert all("lora_" in name or "modules_to_save" in name for name in with_gradient)
    assert any("lora_" in name for name in with_gradient)
    assert report.fallbacks(), "an adapter's own code is no secret"
    assert all(OWN in reason for reason in report.fallbacks())
    if family != "xmod":
        assert report.padded() == {}, "adapters do not cost the packed pass"


@pytest.mark.parametrize("order", ["before", "after"])
def test_modules_to_save(order):
    # The whole classifier, trained beside the adapters; and one layer's product, which is then a wrapper.
    ours, _, original, _ = pair(order, train=True, modules_to_save=["classifier", "layer.1.output.dense"])
    assert_case(case_of(train=True), ours, original)
    saved = [name for name, parameter in ours.named_parameters() if parameter.requires_grad and "lora_" not in name]
    assert any("layer.1.output.dense.modules_to_save" in name for name in saved)
    assert any("classifier.modules_to_save" in name for name in saved)
    assert all(ours.get_parameter(name).grad.abs().max() > 0 for name in saved)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("family", ["roberta", "electra", "ernie"])
@pytest.mark.parametrize(
    "wrapped", ["word_embeddings", "embeddings", "layer.1", "layer.0.attention", "layer.0.attention.output"]
)
def test_any_part_saved_beside_the_adapters(wrapped, family, order):
    # A wrapper with two copies of a part in it takes that part's place: it runs its own code, and is reported.
    ours, report, original, batches = pair(order, family, train=True, modules_to_save=[wrapped])
    assert_case(case_of(family, train=True), ours, original)
    assert report.fallbacks() or report.padded()
    rk.unpatch(ours)
    assert not rk.is_patched(ours)
    assert torch.equal(run(ours, batches[0])["logits"], run(original, batches[0])["logits"])


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("family", ["roberta", "electra", "ernie"])
def test_an_adapter_on_the_embeddings(family, order):
    ours, _, original, _ = pair(order, family, ["word_embeddings", "query"], train=True)
    assert_case(case_of(family, train=True), ours, original)


@pytest.mark.parametrize("order", ["before", "after"])
def test_disabled_and_merged(order):
    ours, report, original, batches = pair(order, targets=EVERY_PRODUCT)
    exact = exact_copy(original)
    adapted_logits = run(ours, batches[0])["logits"]
    with ours.disable_adapter(), original.disable_adapter(), exact.disable_adapter():
        assert_promise(ours, original, batches, exact=exact, head="single_label")
        assert not torch.allclose(run(ours, batches[0])["logits"], adapted_logits, rtol=1e-2)
    for model in (ours, original, exact):
        model.merge_adapter()
    assert_promise(ours, original, batches, exact=exact, head="single_label")
    for model in (ours, original, exact):
        model.unmerge_adapter()
    ours, original, exact = (model.merge_and_unload() for model in (ours, original, exact))
    assert rk.is_patched(ours)
    before = report.fallbacks()
    assert_promise(ours, original, batches, exact=exact, head="single_label")
    torch.testing.assert_close(run(ours, batches[0])["logits"], adapted_logits, rtol=1e-3, atol=1e-4)
    assert report.fallbacks() == before, "merged, all products are plain again, and all runs fused"
    rk.unpatch(ours)
    assert torch.equal(run(ours, batches[0])["logits"], run(original, batches[0])["logits"])


@pytest.mark.parametrize("order", ["before", "after"])
def test_saved_and_loaded(order, tmp_path):
    ours, _, original, batches = pair(order, targets=EVERY_PRODUCT)
    for name, model in (("ours", ours), ("original", original)):
        model.save_pretrained(tmp_path / name)
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("ours", "original")]
    assert files[0].keys() == files[1].keys()
    assert files[0]["adapter_model.safetensors"] == files[1]["adapter_model.safetensors"]
    plain = build(case_of())
    assert rk.patch(plain)
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
    assert_promise(again, original, batches, exact=exact_copy(original), head="single_label")
    unpatched = peft.PeftModel.from_pretrained(build(case_of()), tmp_path / "ours").eval()
    assert torch.equal(run(unpatched, batches[0])["logits"], run(original, batches[0])["logits"])


@pytest.mark.parametrize("order", ["before", "after"])
def test_unpatched_with_its_adapters(order):
    ours, _, original, batches = pair(order)
    run(ours, batches[0])
    rk.unpatch(ours)
    assert not rk.is_patched(ours)
    assert torch.equal(run(ours, batches[0])["logits"], run(original, batches[0])["logits"])


def test_transformers_own_adapters():
    # model.add_adapter and model.load_adapter: PEFT's layers inside a transformers model that nothing wraps.
    case = case_of()
    original = build(case)
    ours = copy.deepcopy(original)
    try:
        copy.deepcopy(original).add_adapter(peft.LoraConfig(target_modules=["query"]))
    except ValueError as error:  # transformers asks for a PEFT that there may not be yet
        pytest.skip(f"needs a PEFT that this transformers takes: {error}")
    rk.patch(ours)
    for model in (ours, original):
        torch.manual_seed(7)
        model.add_adapter(peft.LoraConfig(r=4, target_modules=EVERY_PRODUCT, init_lora_weights=False))
    batches = batches_for(case, original.config, 2)
    assert_promise(ours, original, batches, head="single_label")
    for model in (ours, original):
        model.disable_adapters()
    assert_promise(ours, original, batches, head="single_label")


def test_a_trained_adapter_comes_to_the_same_place():
    ours, report, original, batches = pair("after", targets=EVERY_PRODUCT, train=True)
    for model in (ours, original):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for inputs in batches * 2:
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, got), want in zip(ours.named_parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4, msg=name)
    assert report.fallbacks()


def test_an_adapter_is_said_once():
    ours, _, _, (inputs, *_) = pair("after")
    with logged(r"query, key or value is not a plain nn\.Linear"):
        run(ours, inputs)
    with log() as messages:
        run(ours, inputs)
    assert messages == []


def test_compiled_in_one_graph():
    ours, report, original, batches = pair("after", targets=EVERY_PRODUCT)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got, want = compiled(**batches[0]).logits, original(**batches[0]).logits
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)
    assert report.fallbacks() == {}, "a graph counts nothing"
