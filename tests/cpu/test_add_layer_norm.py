"""add_layer_norm_forward and add_layer_norm_backward of the CPU library, against plain torch in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from roberta_kernels.reference.philox import dropout_multiplier, philox
from roberta_kernels.tolerance import assert_three_way

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
EPS = 1e-5


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def plain(x, residual, weight, bias, x_bias, multiplier):
    if x_bias is not None:
        x = x + x_bias
    if multiplier is not None:
        x = x * multiplier.to(x.dtype)
    return F.layer_norm(residual + x, (x.shape[1],), weight, bias, EPS)


def inputs(rows, hidden, dtype):
    x, residual = torch.randn(rows, hidden), 3 * torch.randn(rows, hidden) + 0.7
    vectors = 1 + 0.2 * torch.randn(hidden), torch.randn(hidden), torch.randn(hidden)
    return [t.to(dtype) for t in (x, residual, *vectors)]


def check(kernels, rows, hidden, dtype, with_bias, dropout_p=0.0):
    x, residual, weight, bias, x_bias = inputs(rows, hidden, dtype)
    if not with_bias:
        x_bias = None
    seed = torch.tensor([(7 << 40) + 11]) if dropout_p else None
    multiplier = dropout_multiplier((rows, hidden), dropout_p, seed, torch.float64) if dropout_p else None
    out, mean, rstd = kernels.add_layer_norm_forward(x, residual, weight, bias, EPS, x_bias, dropout_p, seed)
    grad_out = torch.randn(rows, hidden).to(dtype)
    ours = list(kernels.add_layer_norm_backward(grad_out, x, residual, weight, x_bias, mean, rstd, dropout_p, seed))
    assert mean.dtype == rstd.dtype == torch.float32
    assert (ours[0].shape == (0,)) == (dropout_p == 0)
    assert (ours[4].shape == (0,)) == (not with_bias)
    if dropout_p == 0:
        ours[0] = ours[1]
    results = []
    for to in (dtype, torch.float64):
        leaves = [
            None if t is None else t.detach().to(to).requires_grad_() for t in (x, residual, weight, bias, x_bias)
        ]
        expected = plain(*leaves, multiplier)
        wrt = [t for t in leaves if t is not None]
        results.append((expected, *torch.autograd.grad(expected, wrt, grad_out.to(to))))
    original, exact = results
    names = ("out", "grad_x", "grad_residual", "grad_weight", "grad_bias", "grad_x_bias")
    for name, a, b, c in zip(names, (out, *ours), original, exact, strict=False):
        assert_three_way(a, b, c, name=name)
    if rows == 0:
        return
    branch = x.double() if x_bias is None else x.double() + x_bias.double()
    total = residual.double() + (branch if multiplier is None else branch * multiplier)
    assert torch.allclose(mean.double(), total.mean(1), rtol=1e-5, atol=1e-6)
    assert torch.allclose(rstd.double(), (total.var(1, unbiased=False) + EPS).rsqrt(), rtol=1e-5)


@DTYPES
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("hidden", [32, 48, 768, 1000, 1024])
def test_hidden_sizes(kernels, dtype, hidden, with_bias):
    check(kernels, 37, hidden, dtype, with_bias)


@DTYPES
@pytest.mark.parametrize("hidden", [1, 5, 48, 77, 768])
@pytest.mark.parametrize("with_bias", [False, True])
def test_dropout(kernels, dtype, hidden, with_bias):
    check(kernels, 19, hidden, dtype, with_bias, dropout_p=0.2)


@DTYPES
@pytest.mark.parametrize("rows", [0, 1, 2, 16, 257, 3000])
def test_row_counts(kernels, dtype, rows):
    check(kernels, rows, 64, dtype, True)


def test_dropout_of_the_known_answer(kernels):
    """Random123: counter 0, key 0 gives 6627e8d5 e169c58d bc57ac4c 9b00dbd8."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    zero = torch.zeros((), dtype=torch.int64)
    assert [int(w) for w in philox(zero, zero, zero, zero, zero)] == words
    x, residual = torch.ones(1, 4), torch.zeros(1, 4)
    weight, bias = torch.ones(4), torch.zeros(4)
    for word in words:
        # dropped at a threshold just above the word, kept at the word itself
        for p, kept in (((word + 1) / 2**32, False), (word / 2**32, True)):
            _, mean, _ = kernels.add_layer_norm_forward(x, residual, weight, bias, EPS, None, p, zero)
            expected = [w >= int(p * 2**32) for w in words]
            assert expected[words.index(word)] == kept
            assert mean.item() == pytest.approx(sum(expected) / (1 - p) / 4, rel=1e-6)


@DTYPES
def test_bitwise_the_same_on_any_number_of_threads(kernels, on_threads, dtype):
    x, residual, weight, bias, x_bias = inputs(1000, 100, dtype)
    seed = torch.tensor([1])

    def run():
        out, mean, rstd = kernels.add_layer_norm_forward(x, residual, weight, bias, EPS, x_bias, 0.1, seed)
        grads = kernels.add_layer_norm_backward(out, x, residual, weight, x_bias, mean, rstd, 0.1, seed)
        return out, mean, rstd, *grads

    one = on_threads(1, run)
    for threads in (2, 3):
        assert all(torch.equal(a, b) for a, b in zip(one, on_threads(threads, run), strict=True))


def test_large_mean_keeps_its_accuracy(kernels):
    x, residual, weight, bias, _ = inputs(5, 768, torch.float32)
    residual = residual + 1000.0
    out, _, _ = kernels.add_layer_norm_forward(x, residual, weight, bias, EPS, None, 0.0, None)
    original = plain(x, residual, weight, bias, None, None)
    exact = plain(*(t.double() for t in (x, residual, weight, bias)), None, None)
    assert_three_way(out, original, exact)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_spoil_their_row_only(kernels, value):
    x, residual, weight, bias, _ = inputs(3, 50, torch.float32)
    x[1, 49] = value
    out, _, _ = kernels.add_layer_norm_forward(x, residual, weight, bias, EPS, None, 0.0, None)
    assert out.isnan().any(1).tolist() == [False, True, False]
    assert torch.equal(out.isnan(), plain(x, residual, weight, bias, None, None).isnan())


def test_views_are_taken(kernels):
    x, residual, weight, bias, _ = inputs(6, 40, torch.float32)
    out = kernels.add_layer_norm_forward(x, residual, weight, bias, EPS, None, 0.0, None)[0]
    wide = torch.cat([x, x], 1)[:, :40]
    assert torch.equal(kernels.add_layer_norm_forward(wide, residual, weight, bias, EPS, None, 0.0, None)[0], out)


def test_refusals(kernels):
    x, residual, weight, bias, _ = inputs(3, 8, torch.float32)

    def refuses(message, *, x=x, residual=residual, weight=weight, bias=bias, x_bias=None, p=0.0, seed=None):
        with pytest.raises(RuntimeError, match=message):
            kernels.add_layer_norm_forward(x, residual, weight, bias, EPS, x_bias, p, seed)

    refuses("x must be float32 or bfloat16", x=x.double())
    refuses("x must have shape", x=x[0])
    refuses("residual must have shape", residual=residual[:2])
    refuses("weight must be Float", weight=weight.bfloat16())
    refuses("bias must have shape", bias=bias[:7])
    refuses("x_bias must have shape", x_bias=bias[:7])
    refuses("needs a seed", p=0.5)
    refuses("dropout_p must be in", p=-0.1)
