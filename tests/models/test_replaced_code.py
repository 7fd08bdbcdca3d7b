"""Code of transformers or torch that somebody replaces, in a class or in a table, before or after a model is patched:
it takes effect in a patched model as in the original, and fusing is back once it is taken back."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib

import pytest
import torch
import transformers
from model_cases import Case, Ops, batch_for, build, run
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert import modeling_bert
from transformers.models.roberta import modeling_roberta

import roberta_kernels as rk

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "hidden_act": "gelu"}
# (class, method) whose code a fused call steps over, or goes through.
PARTS = [
    (part, "forward")
    for part in (
        *("Embeddings", "SelfAttention", "SelfOutput", "Attention", "Intermediate", "Output", "Layer", "Encoder"),
        *("Pooler", "Model", "ForSequenceClassification"),
    )
]
METHODS = [("Layer", "feed_forward_chunk"), ("Embeddings", "create_position_ids_from_input_ids")]
TORCH = [nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout]
WHEN = ("before patching", "after patching", "after a call")


def scaled(output):
    """Another answer, whatever kind of answer it is, and one that no LayerNorm makes the same again."""
    if isinstance(output, torch.Tensor):
        if not output.is_floating_point():
            return output.flip(-1)
        if output.dim() == 0:
            return output * 1.5
        return output * torch.linspace(0.5, 1.5, output.shape[-1], dtype=output.dtype)
    if isinstance(output, tuple):
        return (scaled(output[0]), *output[1:])
    name = next(iter(output))
    output[name] = scaled(output[name])
    return output


def replacement(original):
    @functools.wraps(original)
    def replaced(*args, **kwargs):
        return scaled(original(*args, **kwargs))

    return replaced


@contextlib.contextmanager
def replaced(owner, name):
    """The method of a class, or function of a module, with `scaled` after it; as if somebody assigned it, and took it
    back."""
    own = vars(owner).get(name)
    function = getattr(owner, name)
    new = replacement(function)
    setattr(owner, name, staticmethod(new) if isinstance(own, staticmethod) else new)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def models(family="roberta", head="single_label", attention="sdpa", train=False):
    case = Case(seed=1, family=family, head=head, attention=attention, train=train, config=SMALL)
    original = build(case)
    return copy.deepcopy(original), original, batch_for(case, original.config)


def fused_ops(model, inputs, backward=False):
    with Ops() as ops:
        run(model, inputs, backward=backward)
    parts = ("_forward", "_backward", "encoder")
    return [n for n in ops.names if n.startswith("roberta_kernels") and any(part in n for part in parts)]


def differ(got, want, inputs):
    """Whether two runs differ at real positions, by more than rounding."""
    real = inputs["attention_mask"].bool()
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        pair = got[name], tensor
        if tensor.shape[:2] == real.shape and not name.startswith("grad"):
            pair = got[name][real], tensor[real]
        if not torch.allclose(*pair, rtol=1e-3, atol=1e-4 * max(1.0, float(pair[1].abs().max()))):
            return True
    return False


def check(replacing, when, *, family="roberta", head="single_label", attention="sdpa"):
    """A patched model answers as the original under the same replacement, which counts; then both as before."""
    train = when == "in training"  # with all gradients; the config has no dropout
    ours, original, inputs = models(family, head, attention, train)
    before = run(original, inputs, backward=train)
    with contextlib.ExitStack() as stack:
        if when == "before patching":
            stack.enter_context(replacing())
            rk.patch(ours)
        elif when == "after patching":
            rk.patch(ours)
            stack.enter_context(replacing())
        else:
            rk.patch(ours)
            fused_ops(ours, inputs, train)
            stack.enter_context(replacing())
        want = run(original, inputs, backward=train)
        assert differ(want, before, inputs), "the replacement must count, or the test shows nothing"
        for _ in range(2):
            assert not differ(run(ours, inputs, backward=train), want, inputs), "the replaced code was skipped"
    assert not differ(run(ours, inputs, backward=train), before, inputs), "taken back, it is still in effect"
    fresh = copy.deepcopy(original)
    rk.patch(fresh)
    if when == "before patching":  # what was refused then may stay refused; patching again takes it in
        rk.patch(ours)
    usual = fused_ops(fresh, inputs, train)
    assert usual
    assert fused_ops(ours, inputs, train) == usual, "fusing is not back"


@pytest.mark.parametrize("when", [*WHEN, "in training"])
@pytest.mark.parametrize(("part", "name"), PARTS + METHODS, ids=lambda value: value)
def test_a_method_of_roberta(part, name, when):
    head = "pooler" if part == "Pooler" else "single_label"
    owner = getattr(modeling_roberta, f"Roberta{part}")
    check(lambda: replaced(owner, name), when, head=head)


@pytest.mark.parametrize(("part", "name"), [*PARTS[:-1], ("Layer", "feed_forward_chunk")], ids=lambda value: value)
def test_a_method_of_bert(part, name):
    check(lambda: replaced(getattr(modeling_bert, f"Bert{part}"), name), "after a call", family="bert", head="pooler")


@pytest.mark.parametrize("when", ["before patching", "after a call"])
@pytest.mark.parametrize("family", ["ernie", "xmod", "electra"])
@pytest.mark.parametrize("part", ["SelfAttention", "Encoder", "Model", "Embeddings"])
def test_a_method_of_other_families(family, part, when):
    original = build(Case(family=family, config=SMALL))
    module = __import__(type(original).__module__, fromlist=["_"])
    prefix = type(original).__name__.removesuffix("Model")
    check(lambda: replaced(getattr(module, prefix + part), "forward"), when, family=family, head="pooler")


@pytest.mark.parametrize("when", ["before patching", "after a call"])
@pytest.mark.parametrize(
    ("family", "name"),
    [
        *(("distilbert", name) for name in ("DistilBertSelfAttention.forward", "FFN.forward", "FFN.ff_chunk")),
        *(("distilbert", name) for name in ("TransformerBlock.forward", "Transformer.forward", "Embeddings.forward")),
        *(
            ("mpnet", f"MPNet{name}.forward")
            for name in ("SelfAttention", "Attention", "Layer", "Output", "Embeddings", "Encoder", "Model")
        ),
        *(("mpnet", f"MPNetEncoder.{name}") for name in ("compute_position_bias", "relative_position_bucket")),
    ],
    ids=lambda value: value,
)
def test_a_method_of_distilbert_and_mpnet(family, name, when):
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    cls, method = name.split(".")
    check(lambda: replaced(getattr(module, cls), method), when, family=family, head="pooler")


@pytest.mark.parametrize("when", ["before patching", "after a call", "in training"])
@pytest.mark.parametrize("cls", TORCH, ids=lambda cls: cls.__name__)
def test_a_forward_of_torch(cls, when):
    check(lambda: replaced(cls, "forward"), when)


@pytest.mark.parametrize("when", WHEN)
def test_the_activation(when):
    check(lambda: replaced(type(ACT2FN["gelu"]), "forward"), when)


@pytest.mark.parametrize("when", WHEN)
def test_a_replacement_that_stays_is_said(when):
    ours, _, inputs = models()
    report = rk.patch(ours)
    with replaced(modeling_roberta.RobertaIntermediate, "forward"):
        if when == "before patching":
            rk.unpatch(ours)
            report = rk.patch(ours)
        run(ours, inputs)
        assert report.left or report.fallbacks() or report.padded()


def test_many_models_and_one_replacement():
    first, original, inputs = models()
    second = copy.deepcopy(first)
    for model in (first, second):
        rk.patch(model)
        run(model, inputs)
    with replaced(modeling_roberta.RobertaOutput, "forward"):
        want = run(original, inputs)
        assert not differ(run(first, inputs), want, inputs)
    assert not differ(run(second, inputs), run(original, inputs), inputs)
    with replaced(modeling_roberta.RobertaOutput, "forward"):
        assert not differ(run(second, inputs), want, inputs)


def test_a_forward_replaced_by_an_equal_one():
    # Wrapped only, as a profiler does: what counts is that the wrapper is called as often as in the original.
    ours, original, inputs = models()
    rk.patch(ours)
    run(ours, inputs)
    calls = []
    known = modeling_roberta.RobertaSelfAttention.forward

    def counting(self, *args, **kwargs):
        calls.append(self)
        return known(self, *args, **kwargs)

    modeling_roberta.RobertaSelfAttention.forward = counting
    try:
        for model in (ours, original):
            calls.clear()
            run(model, inputs)
            assert calls == [layer.attention.self for layer in model.base_model.encoder.layer]
    finally:
        modeling_roberta.RobertaSelfAttention.forward = known


def test_the_drop_in_class_notices_as_well():
    _, original, inputs = models(head="pooler")
    ours = rk.FastRoberta(original.config).eval()
    ours.load_state_dict(original.state_dict())
    run(ours, inputs)
    with replaced(modeling_roberta.RobertaLayer, "forward"):
        assert not differ(run(ours, inputs), run(original, inputs), inputs)
    assert not differ(run(ours, inputs), run(original, inputs), inputs)


# --- tables and functions -------------------------------------------------------------------------------------------


def halved(function):
    def attention(*args, **kwargs):
        output, weights = function(*args, **kwargs)
        return output * 0.5, weights

    return attention


@contextlib.contextmanager
def attention_in_the_table(name="sdpa"):
    """As many packages do it."""
    ALL_ATTENTION_FUNCTIONS[name] = halved(ALL_ATTENTION_FUNCTIONS[name])
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]


@contextlib.contextmanager
def attention_registered(name="sdpa"):
    """As transformers' documentation says."""
    known = ALL_ATTENTION_FUNCTIONS[name]
    AttentionInterface.register(name, halved(known))
    try:
        yield
    finally:
        AttentionInterface.register(name, known)


@contextlib.contextmanager
def mask_registered(name="sdpa"):
    """Another mask: nobody sees the first position."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    known = ALL_MASK_ATTENTION_FUNCTIONS[name]

    def mask(*args, **kwargs):
        made = known(*args, **kwargs | {"allow_is_bidirectional_skip": False}).clone()
        made[..., 0] = False
        made[..., 1] = True
        return made

    AttentionMaskInterface.register(name, mask)
    try:
        yield
    finally:
        AttentionMaskInterface.register(name, known)


@pytest.mark.parametrize("when", [*WHEN, "in training"])
@pytest.mark.parametrize("how", [attention_in_the_table, attention_registered, mask_registered])
def test_what_sdpa_means(how, when):
    check(how, when)


@pytest.mark.parametrize("family", ["bert", "xmod"])
def test_what_sdpa_means_to_other_families(family):
    check(attention_registered, "after a call", family=family, head="pooler")


@pytest.mark.parametrize("when", WHEN)
def test_the_eager_attention(when):
    check(lambda: replaced(modeling_roberta, "eager_attention_forward"), when, attention="eager")


def test_another_implementations_entry_is_nothing_to_us():
    ours, original, inputs = models()
    rk.patch(ours)
    usual = fused_ops(ours, inputs)
    AttentionInterface.register("of_this_test", halved(ALL_ATTENTION_FUNCTIONS["sdpa"]))
    try:
        assert not differ(run(ours, inputs), run(original, inputs), inputs)
        ran = fused_ops(ours, inputs)
    finally:
        del AttentionInterface._global_mapping["of_this_test"]
    assert set(ran) == set(usual)
    assert type(original) is transformers.RobertaForSequenceClassification
