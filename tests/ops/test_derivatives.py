"""Derivatives beside the usual ones: of gradients, forward-mode ones, those of torch.func, over batches of gradients.

All are the reference's, in plain torch: the same numbers whatever ran forward, and dropout with the same mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from . import eager
from .cases import FLOAT32, FLOAT64, Draw, Served, check_three_way, leaf, on_every_backend
from .samples import OPS, Sample, sample

on_each_namespace = on_every_backend(dtypes=[FLOAT32], every_isa=False)
each_op = pytest.mark.parametrize("op", OPS)
plain_or_full = pytest.mark.parametrize("every_option", [False, True], ids=["plain", "every option"])


def original_of(call: Sample) -> Callable[..., Tensor]:
    """The same call in eager torch, as a function of the tensors by name."""
    rest = dict(call.rest)
    if call.op == "attention":
        lengths = rest.pop("cu_seqlens_q").diff().tolist()
        lengths_k = rest.pop("cu_seqlens_k").diff().tolist() if "cu_seqlens_k" in rest else lengths
        rest = {name: value for name, value in rest.items() if not name.startswith("max_seqlen")}
        rest |= {"lengths_q": lengths, "lengths_k": lengths_k}
    if call.op == "linear_log1p_max":
        rest = {"lengths": rest["cu_seqlens"].diff().tolist()}
    function = getattr(eager, call.op)

    def run(**tensors: Tensor) -> Tensor:
        # Attention in products and a softmax: torch's kernels have first derivatives alone.
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return function(**tensors, **rest)

    return run


def gradients(function: Callable[..., Tensor], grad_out: Tensor) -> Callable[..., Tensor]:
    """The function that gives all gradients of a function, in one row."""

    def run(**tensors: Tensor) -> Tensor:
        out = function(**tensors)
        found = torch.autograd.grad(
            out, list(tensors.values()), grad_out.to(out.dtype), create_graph=True, materialize_grads=True
        )
        nothing = sum(t.sum() * 0.0 for t in tensors.values())  # so that no input is without a gradient
        return torch.cat([gradient.flatten() for gradient in found]) + nothing

    return run


@plain_or_full
@each_op
@on_every_backend(every_isa=False)
def test_second_derivatives(served: Served, op: str, every_option: bool, draw: Draw) -> None:
    """As torch's own through eager code, three-way; the first derivatives too, which another path computes here."""
    call = sample(op, draw, served.dtype, every_option=every_option)
    grad_out = draw.normal(*call().shape, dtype=served.dtype)
    count = sum(t.numel() for t in call.tensors.values())
    check_three_way(
        gradients(call, grad_out),
        gradients(original_of(call), grad_out),
        call.tensors,
        draw.normal(count, dtype=served.dtype),
        floor_ulps=8.0,  # a first derivative, rounded, and what follows from it
    )


@each_op
@on_every_backend(dtypes=[FLOAT64])
def test_gradients_of_any_order(served: Served, op: str, draw: Draw) -> None:
    """By finite differences: of the second order, and of the third, which torch's formulas for plain torch give."""
    call = sample(op, draw, FLOAT64, tokens=4, every_option=op != "embedding_layer_norm")  # padding has no gradient
    if op == "embedding_layer_norm":
        call.rest |= {"dropout_p": 0.25, "seed": draw.seed()}
    leaves = {name: leaf(t) for name, t in call.tensors.items()}

    def function(*tensors: Tensor) -> Tensor:
        return call(**dict(zip(leaves, tensors, strict=True)))

    assert torch.autograd.gradgradcheck(function, list(leaves.values()), fast_mode=True)

    def gradient(*tensors: Tensor) -> Tensor:
        return gradients(call, torch.ones_like(call()))(**dict(zip(leaves, tensors, strict=True)))

    assert torch.autograd.gradgradcheck(gradient, list(leaves.values()), fast_mode=True, atol=1e-4)


@each_op
@on_each_namespace
def test_second_derivatives_under_autocast(served: Served, op: str, draw: Draw) -> None:
    """Autocast is the caller's affair here as elsewhere: it changes no bit."""
    call = sample(op, draw, FLOAT32, every_option=True)
    both = []
    for enabled in (False, True):
        leaves = {name: leaf(t) for name, t in call.tensors.items()}
        out = call(**leaves)
        with torch.autocast(served.device, torch.bfloat16, enabled=enabled):
            first = torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out), create_graph=True)
        both.append(first)
    assert all(a.dtype == FLOAT32 and torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_a_gradient_that_is_not_differentiated_comes_from_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    call = sample("gelu_ffn", Draw(1, "cpu"), FLOAT32)
    leaves = {name: leaf(t) for name, t in call.tensors.items()}
    monkeypatch.setattr("roberta_kernels.ops.contract._PLAIN", None)  # nothing of the reference can be called
    call(**leaves).sum().backward()
    assert all(t.grad is not None for t in leaves.values())
    with pytest.raises(AttributeError):
        torch.autograd.grad(call(**leaves).sum(), leaves["x"], create_graph=True)


def tangents_of(call: Sample, draw: Draw) -> dict[str, Tensor]:
    return {name: draw.normal(*t.shape, dtype=t.dtype) for name, t in call.tensors.items()}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@plain_or_full
@each_op
@on_each_namespace
def test_forward_mode(served: Served, op: str, every_option: bool, grad: bool, draw: Draw) -> None:
    """Without a formula torch takes an op's derivative for zero, and says nothing."""
    call = sample(op, draw, FLOAT32, every_option=every_option)
    tangents = tangents_of(call, draw)

    def derivative(function: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        with forward_ad.dual_level(), torch.set_grad_enabled(grad):
            duals = {
                name: forward_ad.make_dual(t.to(dtype), tangents[name].to(dtype)) for name, t in call.tensors.items()
            }
            tangent = forward_ad.unpack_dual(function(**duals)).tangent
        assert tangent is not None
        return tangent

    want = derivative(original_of(call), FLOAT64)
    torch.testing.assert_close(derivative(call, FLOAT32).double(), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    names = list(call.tensors)
    _, through_func = torch.func.jvp(
        lambda *ts: call(**dict(zip(names, ts, strict=True))), tuple(call.tensors.values()), tuple(tangents.values())
    )
    torch.testing.assert_close(through_func.double(), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    with forward_ad.dual_level():  # nothing is differentiated: the kernels
        assert torch.equal(call(), call.function(**call.tensors, **call.rest))


@pytest.mark.parametrize("what", ["grad", "vjp", "grad of grad", "hessian", "forward over reverse"])
@plain_or_full
@each_op
@on_each_namespace
def test_torch_func(served: Served, op: str, every_option: bool, what: str, draw: Draw) -> None:
    call = sample(op, draw, FLOAT32, tokens=4, every_option=every_option)
    name = "q" if op == "attention" else next(iter(call.tensors))
    t, original = call.tensors[name], original_of(call)

    def scalar(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda one: function(**{**call.tensors, name: one}).square().sum()

    def derivative(function: Callable[[Tensor], Tensor]) -> Any:
        return {
            "grad": torch.func.grad(function),
            "vjp": lambda one: torch.func.vjp(function, one)[1](torch.ones(()).to(one))[0],
            "grad of grad": torch.func.grad(lambda one: torch.func.grad(function)(one).square().sum()),
            "hessian": torch.func.jacrev(torch.func.jacrev(function)),
            "forward over reverse": lambda one: torch.func.jvp(torch.func.grad(function), (one,), (t.cos().to(one),))[
                1
            ],
        }[what](t)

    got, want = derivative(scalar(call)), derivative(scalar(original))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


@plain_or_full
@each_op
@on_each_namespace
def test_gradients_of_each_sample(served: Served, op: str, every_option: bool, draw: Draw) -> None:
    call = sample(op, draw, FLOAT32, every_option=every_option)
    name, t = next(iter(call.tensors.items()))
    batch = torch.stack([t, t * 0.5, t + 1.0])

    def total(one: Tensor) -> Tensor:
        return call(**{name: one}).square().sum()

    got = torch.vmap(torch.func.grad(total))(batch)
    leaves = [leaf(one) for one in batch]
    want = torch.stack([torch.autograd.grad(total(one), one)[0] for one in leaves])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("create_graph", [False, True])
@plain_or_full
@each_op
@on_each_namespace
def test_batches_of_gradients(served: Served, op: str, every_option: bool, create_graph: bool, draw: Draw) -> None:
    """As torch.autograd.functional.jacobian(vectorize=True) asks for."""
    call = sample(op, draw, FLOAT32, every_option=every_option)
    leaves = [leaf(t) for t in call.tensors.values()]
    out = call(**dict(zip(call.tensors, leaves, strict=True)))
    batch = draw.normal(3, *out.shape, dtype=FLOAT32)
    got = torch.autograd.grad(out, leaves, batch, is_grads_batched=True, retain_graph=True, create_graph=create_graph)
    want = [torch.autograd.grad(out, leaves, grad, retain_graph=True) for grad in batch]
    for gradient, rows in zip(got, zip(*want, strict=True), strict=True):
        expected = torch.stack(rows)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
