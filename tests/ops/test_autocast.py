"""Autocast is the caller's affair: an op computes in the dtype that it was given, whatever runs it."""

from __future__ import annotations

import pytest
import torch

from roberta_kernels import ops

from .cases import FLOAT32, Draw, Served, leaf, on_every_backend, output_and_gradients
from .samples import OPS, Sample, registered_calls, sample

each_op = pytest.mark.parametrize("op", OPS)
LOWER = {"cpu": torch.bfloat16, "cuda": torch.float16}


def autocast(served: Served) -> torch.autocast:
    return torch.autocast(served.device, LOWER[served.device])


@pytest.mark.parametrize("every_option", [False, True], ids=["plain", "every option"])
@each_op
@on_every_backend(every_isa=False)
def test_autocast_changes_no_bit(served: Served, op: str, every_option: bool, draw: Draw) -> None:
    """Output and gradients, with backward inside of autocast and outside."""
    call = sample(op, draw, served.dtype, every_option=every_option)
    grad = torch.randn_like(call())
    expected = output_and_gradients(call, call.tensors, grad)
    with autocast(served):
        inside = output_and_gradients(call, call.tensors, grad)
        leaves = {name: leaf(t) for name, t in call.tensors.items()}
        out = call(**leaves)
    outside = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))
    for name, t in expected.items():
        assert inside[name].dtype == t.dtype, name
        assert name == "output" or t.dtype == served.dtype, name
        assert torch.equal(inside[name], t), name
    for name, t in outside.items():
        assert t.dtype == served.dtype, name
        assert torch.equal(t, expected[f"gradient of {name}"]), name


@each_op
@on_every_backend([FLOAT32], every_isa=False)
def test_autocast_and_the_registered_ops(served: Served, op: str, draw: Draw) -> None:
    """As a traced graph calls them."""
    call = sample(op, draw, FLOAT32, every_option=True)
    for name, args in registered_calls(served, call, draw).items():
        kernel = getattr(served.kernels(), name)
        with torch.no_grad():
            expected = kernel(*args)
            with autocast(served):
                got = kernel(*args)
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == b.dtype, name
            assert torch.equal(a, b), name


@each_op
@on_every_backend([FLOAT32], every_isa=False)
def test_autocast_and_compiled_code(served: Served, op: str, draw: Draw) -> None:
    if served.interpreted:
        pytest.skip("the compiled code calls the registered ops, as above")
    torch._dynamo.reset()
    call = sample(op, draw, FLOAT32)
    grad = torch.randn_like(call())
    expected = output_and_gradients(call, call.tensors, grad)
    compiled = torch.compile(getattr(ops, op), backend="aot_eager", fullgraph=True)
    with autocast(served):
        got = output_and_gradients(Sample(compiled, call.tensors, call.rest), call.tensors, grad)
    for name, t in expected.items():
        assert torch.equal(got[name], t), name
