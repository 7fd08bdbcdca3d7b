"""gelu_ffn_forward and gelu_ffn_backward of the CPU library, against plain torch in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from roberta_kernels.tolerance import assert_three_way

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
FORMS = pytest.mark.parametrize("tanh", [False, True], ids=["erf", "tanh"])
NAMES = ("out", "x", "w_in", "b_in", "w_out", "b_out")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def plain(x, w_in, b_in, w_out, b_out, tanh):
    return F.linear(F.gelu(F.linear(x, w_in, b_in), approximate="tanh" if tanh else "none"), w_out, b_out)


def inputs(tokens, hidden, inner, outer, dtype):
    shapes = ((tokens, hidden), (inner, hidden), (inner,), (outer, inner), (outer,))
    scales = (1.0, hidden**-0.5, 0.5, inner**-0.5, 0.5)
    return [(scale * torch.randn(shape)).to(dtype) for scale, shape in zip(scales, shapes, strict=True)]


def run(kernels, x, w_in, b_in, w_out, b_out, grad_out, tanh):
    out, preactivation = kernels.gelu_ffn_forward(x, w_in, b_in, w_out, b_out, tanh, True)
    return out, *kernels.gelu_ffn_backward(grad_out, x, w_in, w_out, preactivation, tanh)


def check(kernels, leaves, grad_out, tanh):
    ours = run(kernels, *leaves, grad_out, tanh)
    results = []
    for dtype in (grad_out.dtype, torch.float64):
        wrt = [t.detach().to(dtype).requires_grad_() for t in leaves if t is not None]
        expected = plain(*wrt, *([None] if leaves[4] is None else []), tanh)
        results.append((expected, *torch.autograd.grad(expected, wrt, grad_out.to(dtype))))
    for name, mine, original, exact in zip(NAMES, ours, *results, strict=False):
        assert mine.dtype == grad_out.dtype
        assert_three_way(mine, original, exact, name=name)
    if leaves[4] is None:  # grad_b_out is returned all the same
        assert_three_way(ours[5], grad_out.sum(0), grad_out.double().sum(0), name="b_out")


@FORMS
@DTYPES
@pytest.mark.parametrize(("hidden", "inner", "outer"), [(32, 64, 32), (48, 96, 48), (33, 101, 7), (1, 40, 3)])
@pytest.mark.parametrize("tokens", [0, 1, 4, 5, 7, 16, 17, 24, 25, 97])
def test_against_float64(kernels, tokens, hidden, inner, outer, dtype, tanh):
    leaves = inputs(tokens, hidden, inner, outer, dtype)
    if tokens % 2 == 0:
        leaves[4] = None
    check(kernels, leaves, torch.randn(tokens, outer).to(dtype), tanh)


@DTYPES
@pytest.mark.parametrize(("hidden", "inner"), [(768, 3072), (1000, 1024)])
@pytest.mark.parametrize("tokens", [7, 97, 257])
def test_model_sizes(kernels, tokens, hidden, inner, dtype):
    check(kernels, inputs(tokens, hidden, inner, hidden, dtype), torch.randn(tokens, hidden).to(dtype), False)


@DTYPES
def test_more_tokens_than_one_group(kernels, dtype):
    check(kernels, inputs(2500, 40, 72, 40, dtype), torch.randn(2500, 40).to(dtype), False)


@DTYPES
def test_inner_size_beyond_one_block(kernels, dtype):
    check(kernels, inputs(30, 24, 5001, 24, dtype), torch.randn(30, 24).to(dtype), False)


@pytest.mark.parametrize(("hidden", "inner", "outer"), [(0, 4, 3), (4, 0, 3), (4, 5, 0)])
@pytest.mark.parametrize("tokens", [3, 40])
def test_empty_sizes(kernels, tokens, hidden, inner, outer):
    leaves = [torch.randn(s) for s in ((tokens, hidden), (inner, hidden), (inner,), (outer, inner), (outer,))]
    check(kernels, leaves, torch.randn(tokens, outer), False)


@DTYPES
def test_preactivation(kernels, dtype):
    for tokens in (4, 40):
        x, w_in, b_in, w_out, b_out = inputs(tokens, 48, 96, 48, dtype)
        saved, preactivation = kernels.gelu_ffn_forward(x, w_in, b_in, w_out, b_out, False, True)
        unsaved, empty = kernels.gelu_ffn_forward(x, w_in, b_in, w_out, b_out, False, False)
        assert torch.equal(saved, unsaved)
        assert empty.shape == (0,)
        assert preactivation.dtype == dtype
        exact = F.linear(x.double(), w_in.double(), b_in.double())
        assert_three_way(preactivation, F.linear(x, w_in, b_in), exact)


@DTYPES
@pytest.mark.parametrize("tokens", [4, 40])
def test_strided_inputs(kernels, tokens, dtype):
    x, w_in, b_in, w_out, b_out = inputs(tokens, 48, 96, 48, dtype)
    grad_out = torch.randn(tokens, 48).to(dtype)
    expected = run(kernels, x, w_in, b_in, w_out, b_out, grad_out, False)

    def wide(t):
        return torch.stack([t, t], -1)[..., 0]

    strided = [wide(x), w_in.t().contiguous().t(), wide(b_in), wide(w_out), wide(b_out), grad_out.t().contiguous().t()]
    assert not any(t.is_contiguous() for t in strided)
    for one, other in zip(expected, run(kernels, *strided, False), strict=True):
        assert torch.equal(one, other)


@DTYPES
@pytest.mark.parametrize("tokens", [4, 300])
def test_same_bits_on_any_number_of_threads(kernels, on_threads, tokens, dtype):
    leaves = inputs(tokens, 192, 768, 192, dtype)
    grad_out = torch.randn(tokens, 192).to(dtype)
    first = on_threads(1, lambda: run(kernels, *leaves, grad_out, False))
    for threads in (1, 2, 2, 3):
        again = on_threads(threads, lambda: run(kernels, *leaves, grad_out, False))
        for name, one, other in zip(NAMES, first, again, strict=True):
            assert torch.equal(one, other), f"{name} differs on {threads} threads"


def gelu(kernels, values, tanh):
    """gelu(values) and its derivative, through products with 1 x 1 and diagonal matrices only."""
    one, none = torch.ones(1, 1, dtype=values.dtype), torch.zeros(1, dtype=values.dtype)
    x = values[:, None]
    out, preactivation = kernels.gelu_ffn_forward(x, one, none, one, None, tanh, True)
    slope = kernels.gelu_ffn_backward(torch.ones_like(x), x, one, one, preactivation, tanh)[0]
    return out[:, 0], slope[:, 0]


@FORMS
def test_gelu_sweep(kernels, tanh):
    """Within 2 eps of the value, or of 1 where the value is less (torch in float32: 2 to 9 eps)."""
    approximate = "tanh" if tanh else "none"
    dense = torch.cat(
        [torch.linspace(-14, 14, 400_001), torch.logspace(-30, 2, 20_001), -torch.logspace(-30, 2, 20_001)]
    )
    exact = dense.double().requires_grad_()
    value = F.gelu(exact, approximate=approximate)
    (slope,) = torch.autograd.grad(value.sum(), exact)
    for ours, true in zip(gelu(kernels, dense, tanh), (value, slope), strict=True):
        error = (ours.double() - true).abs() / true.abs().clamp(min=1.0)
        assert error.max() < 2 * torch.finfo(torch.float32).eps


@FORMS
def test_gelu_keeps_its_relative_accuracy_below_zero(kernels, tanh):
    values = torch.linspace(-5, -1e-3, 100_001)
    exact = F.gelu(values.double(), approximate="tanh" if tanh else "none")
    error = ((gelu(kernels, values, tanh)[0] - exact) / exact).abs()
    assert error.max() < 3e-6


@FORMS
@DTYPES
@pytest.mark.parametrize("tokens", [4, 30])
def test_nan_and_infinity(kernels, tokens, dtype, tanh):
    """As torch in float64: gelu(nan) = nan, gelu(inf) = inf, gelu(-inf) = nan; other rows are untouched."""
    x, w_in, b_in, w_out, b_out = inputs(tokens, 48, 96, 48, dtype)
    clean = kernels.gelu_ffn_forward(x, w_in, b_in, w_out, b_out, tanh, False)[0]
    x[1, 3] = math.nan
    x[2, 5] = math.inf
    out, preactivation = kernels.gelu_ffn_forward(x, w_in, b_in, w_out, b_out, tanh, True)
    assert out[1].isnan().all()
    assert preactivation[2].isinf().all()
    assert not out[2].isfinite().any()
    others = [i for i in range(tokens) if i not in (1, 2)]
    assert torch.equal(out[others], clean[others])

    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, 1e30, -1e30], dtype=dtype).repeat(tokens)
    value = gelu(kernels, special, tanh)[0][:6]
    assert value[0] == math.inf
    assert value[1].isnan()
    assert value[2].isnan()
    assert value[3] == 0
    assert value[4] == special[4]
    assert value[5] == 0


def test_what_is_refused(kernels):
    x, w_in, b_in, w_out, b_out = inputs(4, 48, 96, 48, torch.float32)

    def refused(message, *arguments):
        with pytest.raises(RuntimeError, match=message):
            kernels.gelu_ffn_forward(*arguments, False, True)

    refused("w_in must have shape", x, w_in[:, :-1], b_in, w_out, b_out)
    refused("b_in must have shape", x, w_in, b_in[:-1], w_out, b_out)
    refused("w_out must have shape", x, w_in, b_in, w_out[:, :-1], b_out)
    refused("b_out must have shape", x, w_in, b_in, w_out, b_out[:-1])
    refused("w_in must be Float", x, w_in.bfloat16(), b_in, w_out, b_out)
    refused("must be float32 or bfloat16", *(t.double() for t in (x, w_in, b_in, w_out, b_out)))
    refused("x must have shape", x[None], w_in, b_in, w_out, b_out)
    with pytest.raises(RuntimeError, match="preactivation must have shape"):
        kernels.gelu_ffn_backward(torch.ones(4, 48), x, w_in, w_out, torch.ones(3, 96), False)
