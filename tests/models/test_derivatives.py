"""Second derivatives and forward mode: what stock code with eager attention gives, a patched model gives."""

from __future__ import annotations

import contextlib

import pytest
import torch
from model_cases import Case, batch_for, build, exact_copy, in_dtype, patched
from torch.autograd import forward_ad
from torch.func import functional_call

import roberta_kernels as rk
from roberta_kernels.tolerance import compare

SMALL = {
    **{"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2},
    **{"intermediate_size": 40, "hidden_act": "gelu"},
}
FAMILIES = ["roberta", "distilbert", "ernie", "mpnet", "xmod"]


def case_of(family="roberta", **kwargs):
    return Case(seed=4, family=family, attention="eager", config=SMALL | kwargs.pop("config", {}), **kwargs)


def pair(family="roberta", options=None, **kwargs):
    """A patched model, its report, the original, and a batch."""
    case = case_of(family, **kwargs)
    original = build(case)
    ours = patched(original)
    report = rk.patch(ours, **(options or {}))
    return ours, report, original, batch_for(case, original.config)


def loss_of(model, inputs):
    output = model(**inputs)
    return output.loss if output.get("loss") is not None else output.last_hidden_state[:, 0].square().sum()


# --- second derivatives -----------------------------------------------------------------------------------------------


def gradient_penalty(model, inputs):
    """Gradients of the squared norm of the loss's gradient: a second derivative of every parameter."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss_of(model, inputs), parameters, create_graph=True, materialize_grads=True)
    penalty = sum(gradient.square().sum() for gradient in first)
    second = torch.autograd.grad(penalty, parameters, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in second])


def hessian_vector(model, inputs):
    parameters = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss_of(model, inputs), parameters, create_graph=True, materialize_grads=True)
    along = sum((gradient * p.detach().cos()).sum() for gradient, p in zip(first, parameters, strict=True))
    second = torch.autograd.grad(along, parameters, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in second])


@pytest.mark.parametrize(
    ("head", "mask", "second"),
    [
        ("pooler", "right", gradient_penalty),
        ("pooler", "right", hessian_vector),
        ("masked_lm", "left", gradient_penalty),
        ("single_label", "none", hessian_vector),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_second_derivatives(family, head, mask, second):
    ours, report, original, inputs = pair(family, head=head, mask=mask, train=True)
    exact = exact_copy(original)
    got, want = second(ours, inputs), second(original, inputs)
    comparison = compare(got, want, second(exact, in_dtype(inputs, torch.float64)), floor_ulps=32.0)
    assert comparison.holds, comparison
    assert report.fallbacks() == {}


def test_second_derivatives_of_the_embeddings_given():
    """As a gradient penalty on inputs (adversarial training, integrated gradients) asks for."""
    ours, _, original, inputs = pair("roberta", train=True)
    ids = inputs.pop("input_ids")
    results = []
    for model in (ours, original):
        embeds = model.embeddings.word_embeddings(ids).detach().requires_grad_()
        loss = loss_of(model, inputs | {"inputs_embeds": embeds})
        (gradient,) = torch.autograd.grad(loss, embeds, create_graph=True)
        gradient.square().sum().backward()
        results.append(torch.cat([gradient.flatten(), *(p.grad.flatten() for p in model.encoder.parameters())]))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5 * float(results[1].detach().abs().max()))


def test_second_derivatives_with_dropout():
    """Backward and its derivative see the mask of forward: by finite differences of the gradient, in float64."""
    config = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    case = case_of(head="single_label", train=True, config=config)
    model = patched(build(case).double())
    inputs = batch_for(case, model.config)
    weight = model.base_model.encoder.layer[0].attention.self.query.weight
    direction = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def gradient(step=0.0, **kwargs):
        torch.manual_seed(7)
        name = f"{model.base_model_prefix}.encoder.layer.0.attention.self.query.weight"
        output = functional_call(model, {name: weight + step * direction}, (), inputs)
        return torch.autograd.grad(output.loss, weight, **kwargs)[0]

    (got,) = torch.autograd.grad((gradient(create_graph=True) * direction).sum(), weight)
    want = (gradient(1e-5) - gradient(-1e-5)) / 2e-5
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))


def test_gradient_checkpointing_and_second_derivatives():
    ours, _, original, inputs = pair(head="single_label", train=True)
    for model in (ours, original):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    got, want = gradient_penalty(ours, inputs), gradient_penalty(original, inputs)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))


# --- forward mode -----------------------------------------------------------------------------------------------------

FORWARD = "forward-mode differentiation"


def derivative(model, inputs, *, over):
    """Forward-mode derivative of the hidden states over the parameters of the last layer, all, or the embeddings."""
    with forward_ad.dual_level():
        inputs = dict(inputs)
        values = {}
        if over == "embeddings":
            embeds = model.embeddings.word_embeddings(inputs.pop("input_ids")).detach()
            inputs["inputs_embeds"] = forward_ad.make_dual(embeds, embeds.cos())
        else:
            named = model.named_parameters()
            values = {
                name: forward_ad.make_dual(p.detach(), p.detach().cos())
                for name, p in named
                if over == "parameters" or ".layer.1." in name
            }
        output = functional_call(model, values, (), inputs)
        return forward_ad.unpack_dual(output.last_hidden_state).tangent


@pytest.mark.parametrize("mode", ["grad", "no_grad", "frozen"])
@pytest.mark.parametrize("over", ["parameters", "last layer", "embeddings"])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_mode(family, over, mode):
    """The one-call encoder too, which runs where no gradient is needed, and has run before here."""
    ours, report, original, inputs = pair(family, mask="right")
    for model in (ours, original):
        model.requires_grad_(mode != "frozen")
        with torch.no_grad():
            model(**inputs)
    assert report.fallbacks() == {}
    with torch.no_grad() if mode == "no_grad" else contextlib.nullcontext():
        got, want = derivative(ours, inputs, over=over), derivative(original, inputs, over=over)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))
    assert any(FORWARD in reason for reason in report.fallbacks())
    with torch.no_grad():
        ours(**inputs)
    calls = sum(report.fallbacks().values())
    with torch.no_grad():
        ours(**inputs)
    assert sum(report.fallbacks().values()) == calls, "fused again afterwards"


@pytest.mark.parametrize("options", [{"padded_rows": "zeros"}, {"quantization": "int8"}], ids=str)
def test_forward_mode_on_every_route(options):
    ours, report, original, inputs = pair(mask="right", options=options)
    with torch.no_grad():
        ours(**inputs)
        got, want = (derivative(model, inputs, over="parameters") for model in (ours, original))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))
    assert any(FORWARD in reason for reason in report.fallbacks())


def test_forward_mode_through_the_attention_switch():
    case = case_of(mask="right")
    original = build(case)
    ours = build(case)
    ours.set_attn_implementation("roberta_kernels")
    inputs = batch_for(case, original.config)
    original.set_attn_implementation("eager")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        got, want = (derivative(model, inputs, over="parameters") for model in (ours, original))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))


def test_a_parameter_that_became_a_dual_tensor():
    """As torch's own tutorial does it: the parameter is taken out, and a dual tensor put in its place."""
    ours, _, original, inputs = pair(mask="right")
    results = []
    for model in (ours, original):
        with torch.no_grad():
            model(**inputs)
        with forward_ad.dual_level(), torch.no_grad():
            norm = model.encoder.layer[1].output.LayerNorm
            weight = norm.weight.detach()
            del norm.weight
            norm.weight = forward_ad.make_dual(weight, weight.cos())
            results.append(forward_ad.unpack_dual(model(**inputs).last_hidden_state).tangent)
    assert results[0] is not None
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("what", ["jvp", "vjp", "hessian vector"])
@pytest.mark.parametrize("family", FAMILIES)
def test_torch_func(family, what):
    ours, report, original, inputs = pair(family, mask="right")
    results = []
    for model in (ours, original):
        values = {name: p.detach() for name, p in model.named_parameters()}
        tangents = {name: p.cos() for name, p in values.items()}

        def loss(values, model=model):
            return functional_call(model, values, (), inputs).last_hidden_state[:, 0].square().sum()

        if what == "jvp":
            results.append(torch.func.jvp(loss, (values,), (tangents,))[1][None])
        else:
            if what == "vjp":
                found = torch.func.vjp(loss, values)[1](torch.ones(()))[0]
            else:
                found = torch.func.jvp(torch.func.grad(loss), (values,), (tangents,))[1]
            results.append(torch.cat([found[name].flatten() for name in values]))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4 * float(results[1].abs().max()))
    assert any("torch.func" in reason for reason in report.fallbacks())


@pytest.mark.parametrize("where", ["outside of the graph", "inside"])
def test_forward_mode_and_a_graph(where):
    """A model that was compiled before too."""
    ours, _, original, inputs = pair(mask="right")
    ids = inputs.pop("input_ids")
    results = []
    for model in (ours, original):
        torch._dynamo.reset()
        embeds = model.requires_grad_(False).embeddings.word_embeddings(ids)

        def run(embeds, model=model):
            return model(**inputs, inputs_embeds=embeds).last_hidden_state

        if where == "inside":
            values = {
                name: p.detach() for name, p in model.named_parameters()
            }  # torch fails here over embeddings alone
            tangents = {name: p.cos() for name, p in values.items()}

            def of_values(values, model=model, embeds=embeds):
                return functional_call(model, values, (), inputs | {"inputs_embeds": embeds}).last_hidden_state

            graph = torch.compile(lambda v, t: torch.func.jvp(of_values, (v,), (t,))[1], backend="eager")
            results.append(graph(values, tangents))
            continue
        graph = torch.compile(run, backend="eager")
        graph(embeds)
        with forward_ad.dual_level():
            out = graph(forward_ad.make_dual(embeds, embeds.cos()))
            results.append(forward_ad.unpack_dual(out).tangent)
    assert results[0] is not None
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)
