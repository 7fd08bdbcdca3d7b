"""gelu_ffn in every backend: three-way against eager torch, and what must hold exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from roberta_kernels import ops

from . import eager
from .cases import (
    FLOAT32,
    Draw,
    Served,
    cases_on_every_backend,
    check_three_way,
    on_every_backend,
    output_and_gradients,
    poisoned,
    uninitialised_is_nan,
)


@dataclass(frozen=True)
class Case:
    id: str
    tokens: int
    hidden: int
    inner: int
    width: int  # of the output
    b_out: bool = True
    approximate: str = "none"
    layout: str = "contiguous"  # of x and the weights: one of `poisoned`
    grad: str = "random"  # or "expanded": the gradient of out.sum(); or one of `poisoned`
    spread: float = 1.0  # of x: wide reaches the tails of the GELU
    heavy: bool = False
    only: torch.dtype | None = None


CASES = [
    Case("1", 1, 32, 48, 32),
    Case("1-768", 1, 768, 3072, 768, heavy=True),
    Case("7", 7, 48, 100, 33, layout="columns"),
    Case("7-tanh", 7, 32, 64, 48, approximate="tanh", b_out=False),
    Case("97", 97, 32, 129, 32, layout="transposed"),
    Case("97-tanh", 97, 48, 65, 47, approximate="tanh", grad="expanded"),
    Case("257", 257, 32, 48, 48, b_out=False, layout="rows", grad="transposed"),
    Case("257-768", 257, 768, 768, 768, heavy=True),
    Case("33-768x3072", 33, 768, 3072, 768, b_out=False, heavy=True),
    Case("7-1000", 7, 1000, 131, 1000, grad="expanded", heavy=True),
    Case("16-1024", 16, 1024, 257, 1024, approximate="tanh", layout="columns", heavy=True),
    Case("narrow-out", 20, 48, 96, 1, grad="columns"),
    Case("one-inner", 9, 17, 1, 5),
    Case("all-odd", 13, 31, 67, 29, layout="columns", grad="expanded", b_out=False),
    Case("wide-out", 5, 16, 24, 200, approximate="tanh"),
    Case("no-tokens", 0, 32, 48, 16),
    Case("no-tokens-tanh", 0, 48, 32, 48, approximate="tanh", b_out=False),
    Case("tails", 33, 32, 64, 32, spread=8.0),
    Case("tails-tanh", 33, 32, 64, 32, spread=8.0, approximate="tanh"),
]


def draw_inputs(case: Case, draw: Draw, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """(the inputs, the gradient of the output)."""
    inputs = {
        "x": draw.normal(case.tokens, case.hidden, dtype=dtype, std=case.spread),
        "w_in": draw.normal(case.inner, case.hidden, dtype=dtype, std=case.hidden**-0.5),
        "b_in": draw.normal(case.inner, dtype=dtype, std=0.5),
        "w_out": draw.normal(case.width, case.inner, dtype=dtype, std=case.inner**-0.5),
    }
    for name in ("x", "w_in", "w_out"):
        inputs[name] = poisoned(inputs[name], case.layout)
    if case.b_out:
        inputs["b_out"] = draw.normal(case.width, dtype=dtype, std=0.5)
    shape = (case.tokens, case.width)
    if case.grad == "expanded":
        return inputs, torch.ones((), dtype=dtype, device=draw.device).expand(shape)
    grad = draw.normal(*shape, dtype=dtype)
    return inputs, grad if case.grad == "random" else poisoned(grad, case.grad)


def run_case(case: Case, draw: Draw, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs, grad = draw_inputs(case, draw, dtype)
    return check_three_way(
        lambda **tensors: ops.gelu_ffn(**tensors, approximate=case.approximate),
        lambda **tensors: eager.gelu_ffn(**tensors, approximate=case.approximate),
        inputs,
        grad,
    )


@cases_on_every_backend(CASES)
def test_three_way(served: Served, case: Case, draw: Draw) -> None:
    got = run_case(case, draw, served.dtype)
    assert got["output"].is_contiguous()


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@on_every_backend(dtypes=[FLOAT32])
def test_three_way_random_shapes(served: Served, data: st.DataObject) -> None:
    largest = 40 if served.interpreted else 150
    case = Case(
        "random",
        tokens=data.draw(st.integers(0, largest), "tokens"),
        hidden=data.draw(st.integers(1, largest), "hidden"),
        inner=data.draw(st.integers(1, largest), "inner"),
        width=data.draw(st.integers(1, largest), "width"),
        b_out=data.draw(st.booleans(), "b_out"),
        approximate=data.draw(st.sampled_from(["none", "tanh"]), "approximate"),
        layout=data.draw(st.sampled_from(["contiguous", "rows", "columns", "transposed"]), "layout"),
        grad=data.draw(st.sampled_from(["random", "expanded", "columns"]), "grad"),
    )
    run_case(case, Draw(data.draw(st.integers(0, 2**32 - 1), "seed"), served.device), served.dtype)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@on_every_backend()
def test_gelu_itself(served: Served, approximate: str) -> None:
    """With identity weights the op is GELU, and its gradient GELU's derivative: over all of its range, pointwise.

    A matrix product in between would hide an error of the tails, where GELU is small, behind its largest values.
    """
    width = 16
    values = torch.linspace(-12, 12, 33 * width, dtype=torch.float64).to(served.dtype).reshape(33, width)
    x = values.to(served.device)
    eye = torch.eye(width, dtype=served.dtype, device=served.device)
    zero = torch.zeros(width, dtype=served.dtype, device=served.device)
    got = output_and_gradients(
        lambda x: ops.gelu_ffn(x, eye, zero, eye, zero, approximate=approximate), {"x": x}, torch.ones_like(x)
    )
    exact = output_and_gradients(
        lambda x: torch.nn.functional.gelu(x, approximate=approximate), {"x": x.double()}, torch.ones_like(x).double()
    )
    # Relative to the value, down to the rounding of Phi(x) near 0 in float32, which eager torch has too.
    eps = torch.finfo(served.dtype).eps
    for name, t in got.items():
        allowed = 2 * eps * exact[name].abs() + 8 * torch.finfo(FLOAT32).eps * x.double().abs().clamp(min=1.0)
        error = (t.double() - exact[name]).abs()
        worst = int((error - allowed).argmax())
        assert bool((error <= allowed).all()), f"{name} at {x.flatten()[worst].item()}: off by {error.max().item():.2e}"


@on_every_backend()
def test_the_derivative_where_gelu_is_least(served: Served) -> None:
    """erf GELU at 0 and at +-sqrt(2): values known in closed form."""
    points = torch.tensor([[0.0], [math.sqrt(2.0)], [-math.sqrt(2.0)]], dtype=served.dtype, device=served.device)
    one = torch.ones(1, 1, dtype=served.dtype, device=served.device)
    got = output_and_gradients(
        lambda x: ops.gelu_ffn(x, one, torch.zeros_like(one[0]), one), {"x": points}, torch.ones_like(points)
    )
    root, density = math.sqrt(2.0), math.exp(-1.0) / math.sqrt(2.0 * math.pi)
    phi = 0.5 * (1.0 + math.erf(1.0))
    eps = torch.finfo(served.dtype).eps
    out, grad = (t.double().flatten().tolist() for t in got.values())
    assert out == pytest.approx([0.0, root * phi, -root * (1 - phi)], abs=4 * eps)
    assert grad == pytest.approx([0.5, phi + root * density, 1 - phi - root * density], abs=4 * eps)


@pytest.mark.parametrize("save", [True, False])
@on_every_backend()
def test_pre_activation(served: Served, draw: Draw, save: bool) -> None:
    """The second output of the op, which backward depends on: x @ w_in^T + b_in in x's dtype, or nothing."""
    x, w_in = draw.normal(7, 32, dtype=served.dtype), draw.normal(24, 32, dtype=served.dtype, std=0.2)
    b_in, w_out = draw.normal(24, dtype=served.dtype), draw.normal(5, 24, dtype=served.dtype)
    with uninitialised_is_nan(x):
        _, pre = served.kernels().gelu_ffn_forward(x, w_in, b_in, w_out, None, False, save)
    assert pre.dtype == served.dtype
    if not save:
        assert pre.shape == (0,)
        return
    exact = x.double() @ w_in.double().t() + b_in.double()
    torch.testing.assert_close(pre.double(), exact, rtol=torch.finfo(served.dtype).eps, atol=1e-5)


@on_every_backend(dtypes=[FLOAT32])
def test_the_op_itself_refuses_backward_without_its_pre_activation(served: Served, draw: Draw) -> None:
    x, w = draw.normal(3, 16, dtype=served.dtype).requires_grad_(), draw.normal(16, 16, dtype=served.dtype)
    out, _ = served.kernels().gelu_ffn_forward(x, w, w[0], w, None, False, False)
    with pytest.raises(RuntimeError, match="save_preactivation"):
        out.sum().backward()


@on_every_backend()
def test_rows_do_not_see_each_other(served: Served, draw: Draw) -> None:
    """nan in one token stays in that token."""
    inputs, grad = draw_inputs(Case("", 9, 48, 40, 24), draw, served.dtype)
    clean = output_and_gradients(ops.gelu_ffn, inputs, grad)
    dirty = {name: t.clone() for name, t in inputs.items()}
    dirty["x"][5] = float("nan")
    got = output_and_gradients(ops.gelu_ffn, dirty, grad)
    others = torch.arange(9, device=served.device) != 5
    for name in ("output", "gradient of x"):
        assert got[name][5].isnan().all(), name
        assert torch.equal(got[name][others], clean[name][others]), name
