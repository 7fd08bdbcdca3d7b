"""Attention's backward on tiles: with the twins of the tile instructions on any x86-64 machine, and with AMX where it
is."""

from __future__ import annotations

import math

import pytest
import torch

from roberta_kernels.tolerance import assert_three_way

from .test_amx import DTYPES, assert_same_bits, pytestmark  # noqa: F401
from .test_attention import plain
from .test_tile_attention import LENGTHS, qkv


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def gradients(attention, q, k, v, lengths, lengths_k=None, grad_out=None, lse=None, **rest):
    """Ours, with the lse of float64 unless another is given."""
    grad_out = torch.randn(q.shape).to(q.dtype) if grad_out is None else grad_out
    if lse is None:
        causal, key_mask = rest.get("causal", False), rest.get("key_mask")
        doubles = (t.double() for t in (q, k, v))
        lse = plain(*doubles, lengths, lengths_k or lengths, causal, key_mask, 0.0, None)[1].float()
    return attention.backward(grad_out, q, k, v, lse, lengths, lengths_k, **rest)


def expected(dtype, grad_out, q, k, v, lengths, lengths_k=None, causal=False, key_mask=None, dropout_p=0.0, seed=0):
    inputs = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
    seeds = torch.tensor([seed])
    out = plain(*inputs, lengths, lengths_k or lengths, causal, key_mask, dropout_p, seeds)[0]
    return torch.autograd.grad(out, inputs, grad_out.to(dtype))


def check(attention, q, k, v, lengths, lengths_k=None, **rest):
    grad_out = torch.randn(q.shape).to(q.dtype)
    ours = gradients(attention, q, k, v, lengths, lengths_k, grad_out, **rest)
    original, exact = (
        expected(dtype, grad_out, q, k, v, lengths, lengths_k, **rest) for dtype in (q.dtype, torch.float64)
    )
    for name, *of in zip(("grad_q", "grad_k", "grad_v"), ours, original, exact, strict=True):
        assert_three_way(*of, name=name)


@DTYPES
@pytest.mark.parametrize("head_dim", [16, 24, 64, 72, 128])
def test_against_float64(attention, dtype, head_dim):
    check(attention, *qkv(sum(LENGTHS), 2, head_dim, dtype), LENGTHS)


@DTYPES
def test_several_blocks_of_queries(attention, dtype):
    q, k, v = qkv(150, 1, 64, dtype)
    check(attention, q, k, v, [150])
    check(attention, q[:66], k, v, [66], [150])
    check(attention, q, k[:70], v[:70], [150], [70])


@DTYPES
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_causal(attention, dtype, dropout_p):
    check(attention, *qkv(150, 2, 64, dtype), [150], causal=True, dropout_p=dropout_p, seed=-5)
    q, k, v = (torch.randn(n, 1, 72).to(dtype) for n in (160, 190, 190))
    check(attention, q, k, v, [90, 70], [70, 120], causal=True)  # queries that see no key, too


@DTYPES
@pytest.mark.parametrize("causal", [False, True])
def test_key_mask(attention, dtype, causal):
    lengths = [110, 70, 140]
    key_mask = torch.rand(sum(lengths)) < 0.7
    key_mask[110:180] = False
    q, k, v = (t.clone() for t in qkv(sum(lengths), 2, 72, dtype))
    check(attention, q, k, v, lengths, causal=causal, key_mask=key_mask, dropout_p=0.2, seed=7)
    if causal:
        return
    grad_out, lse = torch.randn(q.shape).to(dtype), torch.randn(2, sum(lengths))
    clean = gradients(attention, q, k, v, lengths, grad_out=grad_out, lse=lse, key_mask=key_mask)
    k[~key_mask], v[~key_mask] = math.nan, math.nan  # keys that are hidden are not read
    poisoned = gradients(attention, q, k, v, lengths, grad_out=grad_out, lse=lse, key_mask=key_mask)
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))
    assert not poisoned[1][~key_mask].any()
    assert not poisoned[2][~key_mask].any()


@DTYPES
def test_dropout(attention, dtype):
    check(attention, *qkv(sum(LENGTHS), 3, 64, dtype), LENGTHS, dropout_p=0.1, seed=0x0123456789ABCDEF)


@DTYPES
def test_large_scores(attention, dtype):
    q, k, v = qkv(90, 1, 64, dtype)
    check(attention, q * 30, k, v, [90])


def test_float32_is_float32(attention):
    """The largest error, of the largest value, against multiply-adds in float32; whatever precision is set."""
    q, k, v = qkv(200, 2, 64, torch.float32)
    grad_out = torch.randn(q.shape)
    original, exact = (expected(dtype, grad_out, q, k, v, [200]) for dtype in (torch.float32, torch.float64))
    attention.library.set_parts(1)
    ours = gradients(attention, q, k, v, [200], grad_out=grad_out)
    for a, b, c in zip(ours, original, exact, strict=True):
        assert (a - c).abs().max() <= 1.5 * (b - c).abs().max()


@DTYPES
def test_in_any_batch_and_on_any_number_of_threads(attention, dtype):
    lengths = [40, 1, 97, 33, 150]
    q, k, v = qkv(sum(lengths), 2, 64, dtype)
    grad_out, lse = torch.randn(q.shape).to(dtype), torch.randn(2, sum(lengths)) + 5
    attention.threads(1)
    together = attention.backward(grad_out, q, k, v, lse, lengths)
    start = 0
    for length in lengths:
        here = slice(start, start + length)
        of_lse = lse[:, here].contiguous()
        alone = attention.backward(grad_out[here], q[here], k[here], v[here], of_lse, [length])
        assert all(torch.equal(a[here], b) for a, b in zip(together, alone, strict=True))
        start += length
    for threads in (2, 5):
        attention.threads(threads)
        again = attention.backward(grad_out, q, k, v, lse, lengths)
        assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))


# ---- special numbers ----


@DTYPES
@pytest.mark.parametrize("length", [64, 70])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["q", "k", "v", "grad_out"])
def test_what_is_not_finite(attention, dtype, value, which, length):
    """As in the original, and in its own head alone."""
    rows = torch.randn(2 * length, 4, 2, 64).to(dtype)
    lengths = [length, length]
    clean = gradients(attention, *rows[:, :3].unbind(1), lengths, grad_out=rows[:, 3])
    rows[20, which, 1, 3] = value
    q, k, v, grad_out = rows.unbind(1)
    ours = gradients(attention, q, k, v, lengths, grad_out=grad_out)
    exact = expected(torch.float64, grad_out, q, k, v, lengths)
    for a, b, c in zip(ours, exact, clean, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
        assert torch.equal(a[length:], c[length:])
        assert torch.equal(a[:, 0], c[:, 0])


@DTYPES
def test_largest_numbers(attention, dtype):
    """A number whose rounding to 8 bits would be an infinity, and dP so large that it overflows."""
    q, k, v, grad_out = (torch.randn(80, 1, 64).to(dtype) for _ in range(4))
    v[5, 0, 3], grad_out = torch.finfo(dtype).max, grad_out * 2.0**-100
    ours = gradients(attention, q, k, v, [80], grad_out=grad_out)
    original, exact = (expected(to, grad_out, q, k, v, [80]) for to in (dtype, torch.float64))
    for name, *of in zip(("grad_q", "grad_k", "grad_v"), ours, original, exact, strict=True):
        assert_three_way(*of, name=name)
    grad_out[7] = 2.0**60
    ours = gradients(attention, q, k, v, [80], grad_out=grad_out)
    assert not ours[0][7].isfinite().any()
    assert ours[0][:7].isfinite().all()


# ---- tiles and their twin ----


@DTYPES
def test_twin(attention_libraries, dtype):
    twin, hardware = attention_libraries("twin-avx512"), attention_libraries("hardware")
    for head_dim, lengths in ((64, [65, 97]), (80, [70]), (24, [150])):
        q, k, v = qkv(sum(lengths), 2, head_dim, dtype)
        q, v = q * 2.0**3, v * torch.logspace(-120, 0, len(v), base=2.0).to(dtype)[:, None, None]
        grad_out, lse = torch.randn(q.shape).to(dtype), torch.randn(2, len(q)) + 40
        for rest in ({}, {"causal": True}, {"dropout_p": 0.1, "seed": 3}):
            ours = (f.backward(grad_out, q, k, v, lse, lengths, **rest) for f in (twin, hardware))
            for a, b in zip(*ours, strict=True):
                assert_same_bits(a, b)
