"""add_layer_norm in every backend: three-way against eager torch, and what must hold exactly."""

from __future__ import annotations

from dataclasses import dataclass

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
    x_bias: bool = False
    dropout_p: float = 0.0
    layout: str = "contiguous"  # of x and residual: one of `poisoned`
    grad: str = "random"  # or "expanded": the gradient of out.sum(); or one of `poisoned`
    eps: float = 1e-5
    mean: float = 0.0  # of residual: a mean much larger than the spread is where a one-pass variance fails
    heavy: bool = False
    only: torch.dtype | None = None


CASES = [
    Case("1x32", 1, 32),
    Case("1x768", 1, 768, x_bias=True),
    Case("7x48", 7, 48, x_bias=True, layout="columns"),
    Case("7x1000", 7, 1000, layout="rows", grad="expanded"),
    Case("97x32", 97, 32, x_bias=True, grad="transposed"),
    Case("97x768", 97, 768, x_bias=True, layout="columns"),
    Case("97x1024", 97, 1024, grad="columns", heavy=True),
    Case("257x48", 257, 48, layout="transposed"),
    Case("257x768", 257, 768, x_bias=True, heavy=True),
    Case("257x1000", 257, 1000, x_bias=True, grad="expanded", heavy=True),
    Case("257x32", 257, 32, x_bias=True),
    Case("3x1024", 3, 1024, x_bias=True, grad="expanded"),
    Case("5x1", 5, 1, x_bias=True, grad="columns"),
    Case("5x3", 5, 3, x_bias=True),
    Case("6x17", 6, 17, layout="columns"),
    Case("0x768", 0, 768, x_bias=True),
    Case("0x32-dropout", 0, 32, dropout_p=0.1),
    Case("eps", 7, 48, x_bias=True, eps=0.5),
    Case("eps-tiny", 33, 96, x_bias=True, eps=1e-12),
    Case("large-mean", 7, 768, x_bias=True, mean=300.0, only=FLOAT32),
    Case("dropout-0.1", 97, 48, dropout_p=0.1, x_bias=True, layout="columns"),
    Case("dropout-0.1-768", 33, 768, dropout_p=0.1, x_bias=True, grad="expanded"),
    Case("dropout-0.5", 7, 1000, dropout_p=0.5, grad="transposed"),
    Case("dropout-0.5-257", 257, 32, dropout_p=0.5, x_bias=True, layout="rows"),
    Case("dropout-0.999", 33, 1024, dropout_p=0.999, x_bias=True, heavy=True),
    Case("dropout-odd", 5, 37, dropout_p=0.3, x_bias=True),
]


def draw_inputs(case: Case, draw: Draw, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """(the inputs, the gradient of the output)."""
    tokens, hidden = case.tokens, case.hidden
    inputs = {
        "x": poisoned(draw.normal(tokens, hidden, dtype=dtype), case.layout),
        "residual": poisoned(draw.normal(tokens, hidden, dtype=dtype, mean=case.mean), case.layout),
        "weight": draw.normal(hidden, dtype=dtype, std=0.5, mean=1.0),
        "bias": draw.normal(hidden, dtype=dtype, std=0.5),
    }
    if case.x_bias:
        inputs["x_bias"] = draw.normal(hidden, dtype=dtype)
    if case.grad == "expanded":
        return inputs, torch.ones((), dtype=dtype, device=draw.device).expand(tokens, hidden)
    grad = draw.normal(tokens, hidden, dtype=dtype)
    return inputs, grad if case.grad == "random" else poisoned(grad, case.grad)


def run_case(case: Case, draw: Draw, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs, grad = draw_inputs(case, draw, dtype)
    options = {"eps": case.eps, "dropout_p": case.dropout_p, "seed": draw.seed() if case.dropout_p else None}
    return check_three_way(
        lambda **tensors: ops.add_layer_norm(**tensors, **options),
        lambda **tensors: eager.add_layer_norm(**tensors, **options),
        inputs,
        grad,
        # Over one or two columns the normalised value is 0 or +-1 whatever went in, and the gradient cancels.
        cancelling=dict.fromkeys(("gradient of x", "gradient of residual", "gradient of x_bias"), 1e3),
    )


@cases_on_every_backend(CASES)
def test_three_way(served: Served, case: Case, draw: Draw) -> None:
    got = run_case(case, draw, served.dtype)
    assert got["output"].is_contiguous()


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@on_every_backend(dtypes=[FLOAT32])
def test_three_way_random_shapes(served: Served, data: st.DataObject) -> None:
    case = Case(
        "random",
        tokens=data.draw(st.integers(0, 12 if served.interpreted else 70), "tokens"),
        hidden=data.draw(st.integers(3, 300 if served.interpreted else 1100), "hidden"),
        x_bias=data.draw(st.booleans(), "x_bias"),
        dropout_p=data.draw(st.sampled_from([0.0, 0.1, 0.5]), "dropout_p"),
        layout=data.draw(st.sampled_from(["contiguous", "rows", "columns", "transposed"]), "layout"),
        grad=data.draw(st.sampled_from(["random", "expanded", "columns"]), "grad"),
    )
    run_case(case, Draw(data.draw(st.integers(0, 2**32 - 1), "seed"), served.device), served.dtype)


@on_every_backend()
def test_statistics(served: Served, draw: Draw) -> None:
    """mean and rstd, which backward depends on: float32, of the sum, with eps inside the root."""
    x, residual = (draw.normal(7, 48, dtype=served.dtype, mean=2.0) for _ in range(2))
    weight, bias, x_bias = (draw.normal(48, dtype=served.dtype) for _ in range(3))
    with uninitialised_is_nan(x):
        _, mean, rstd = served.kernels().add_layer_norm_forward(x, residual, weight, bias, 0.25, x_bias, 0.0, None)
    z = x.double() + residual.double() + x_bias.double()
    assert mean.dtype == rstd.dtype == FLOAT32
    torch.testing.assert_close(mean.double(), z.mean(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rstd.double(), (z.var(-1, correction=0) + 0.25).rsqrt(), rtol=1e-5, atol=1e-6)


@on_every_backend()
def test_constant_rows_give_the_bias(served: Served) -> None:
    x = torch.full((5, 48), 3.0, dtype=served.dtype, device=served.device)
    bias = torch.arange(48, device=served.device).to(served.dtype)
    out = ops.add_layer_norm(x, x.clone(), torch.ones_like(bias), bias, eps=1e-12)
    torch.testing.assert_close(out, bias.expand(5, 48), rtol=0, atol=1e-3)


@on_every_backend(dtypes=[FLOAT32])
def test_gradients_of_x_and_residual_are_tensors_of_their_own(served: Served, draw: Draw) -> None:
    """Without dropout they are equal, and the kernel writes one: what a user does to one must not reach the other."""
    x, residual = (draw.normal(5, 32, dtype=served.dtype).requires_grad_() for _ in range(2))
    weight, bias = (draw.normal(32, dtype=served.dtype) for _ in range(2))
    ops.add_layer_norm(x, residual, weight, bias, eps=1e-5).square().sum().backward()
    assert x.grad is not None
    assert residual.grad is not None
    assert torch.equal(x.grad, residual.grad)
    before = residual.grad.clone()
    x.grad.mul_(3.0)
    assert torch.equal(residual.grad, before)


@on_every_backend()
def test_rows_do_not_see_each_other(served: Served, draw: Draw) -> None:
    """A row alone, and the same one among others, of which some hold nan and infinities: bitwise the same."""
    inputs, grad = draw_inputs(Case("", 9, 48, x_bias=True), draw, served.dtype)
    seed = draw.seed()

    def run(tensors: dict[str, Tensor], grad_out: Tensor) -> dict[str, Tensor]:
        return output_and_gradients(
            lambda **t: ops.add_layer_norm(**t, eps=1e-5, dropout_p=0.25, seed=seed), tensors, grad_out
        )

    clean = run(inputs, grad)
    dirty = {name: t.clone() for name, t in inputs.items()}
    dirty["x"][4:] = float("nan")
    dirty["residual"][6] = float("inf")
    got = run(dirty, grad)
    for name in ("output", "gradient of x", "gradient of residual"):
        assert torch.equal(got[name][:4], clean[name][:4]), name
    for name in ("output", "gradient of residual"):  # (the gradient of a dropped x may be 0)
        assert got[name][4:].isnan().all(), name
    short = run({name: t[:4].clone() if t.dim() == 2 else t for name, t in inputs.items()}, grad[:4].clone())
    for name in ("output", "gradient of x", "gradient of residual"):
        assert torch.equal(short[name], clean[name][:4]), name
