"""Attention on tiles: with the twins of the tile instructions on any x86-64 machine, and with AMX where it is."""

from __future__ import annotations

import math

import pytest
import torch

from roberta_kernels import backends
from roberta_kernels.ops import attention as attention_op
from roberta_kernels.tolerance import assert_three_way

from .conftest import has_amx
from .test_amx import DTYPES, TINY, assert_same_bits, pytestmark  # noqa: F401
from .test_attention import plain

LENGTHS = [70, 0, 1, 97, 40]  # on both sides of what is done on tiles


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def qkv(tokens, heads, head_dim, dtype):
    return torch.randn(tokens, 3, heads, head_dim).to(dtype).unbind(1)


def check(attention, q, k, v, lengths_q, lengths_k=None, causal=False, key_mask=None):
    lengths_k = lengths_q if lengths_k is None else lengths_k
    out, lse = attention(q, k, v, lengths_q, lengths_k, causal=causal, key_mask=key_mask)
    original, exact = (
        plain(*(t.to(dtype) for t in (q, k, v)), lengths_q, lengths_k, causal, key_mask, 0.0, None)
        for dtype in (q.dtype, torch.float64)
    )
    assert_three_way(out, original[0], exact[0], name="out")
    assert_three_way(lse, original[1].float(), exact[1], name="lse")


@DTYPES
@pytest.mark.parametrize("head_dim", [16, 24, 32, 64, 80, 128])
def test_against_float64(attention, dtype, head_dim):
    check(attention, *qkv(sum(LENGTHS), 2, head_dim, dtype), LENGTHS)


@DTYPES
def test_more_keys_than_are_met_at_once(attention, dtype):
    q, k, v = qkv(300, 1, 32, dtype)
    check(attention, q[:50], k, v, [50], [300])


@DTYPES
def test_causal(attention, dtype):
    check(attention, *qkv(sum(LENGTHS), 1, 32, dtype), LENGTHS, causal=True)
    q, k, v = (torch.randn(n, 2, 24).to(dtype) for n in (90, 120, 120))
    check(attention, q, k, v, [60, 30], [50, 70], causal=True)  # queries that see no key, too


@DTYPES
@pytest.mark.parametrize("causal", [False, True])
def test_key_mask(attention, dtype, causal):
    lengths = [110, 50, 140]
    key_mask = torch.rand(sum(lengths)) < 0.7
    key_mask[110:160] = False
    check(attention, *qkv(sum(lengths), 2, 40, dtype), lengths, causal=causal, key_mask=key_mask)


@pytest.mark.parametrize("parts", [1, 2])
def test_fewer_parts(attention, parts):
    q, k, v = qkv(70, 2, 64, torch.float32)
    exact = plain(*(t.double() for t in (q, k, v)), [70], [70], False, None, 0.0, None)[0]
    error = (attention(q, k, v, [70], parts=parts)[0] - exact).abs().max()
    assert 2.0 ** (-8 * parts - 6) < error < 2.0 ** (-8 * parts + 1)


def test_three_parts_are_float32(attention):
    """The largest error, of the largest value, against sums of multiply-adds in float32."""
    q, k, v = qkv(200, 2, 64, torch.float32)
    original, exact = (
        plain(*(t.to(dtype) for t in (q, k, v)), [200], [200], False, None, 0.0, None)[0]
        for dtype in (torch.float32, torch.float64)
    )
    ours, theirs = ((x - exact).abs().max() for x in (attention(q, k, v, [200])[0], original))
    assert ours <= 1.2 * theirs


# ---- the contract: a sequence gives the same bits whatever is around it ----


@DTYPES
def test_in_any_batch_and_on_any_number_of_threads(attention, dtype):
    lengths = [40, 1, 97, 33, 150]
    q, k, v = qkv(sum(lengths), 2, 32, dtype)
    attention.threads(1)
    together, lse = attention(q, k, v, lengths)
    start = 0
    for length in lengths:
        here = slice(start, start + length)
        alone, lse_alone = attention(q[here], k[here], v[here], [length])
        assert torch.equal(together[here], alone)
        assert torch.equal(lse[:, here], lse_alone)
        start += length
    for threads in (2, 5):
        attention.threads(threads)
        assert torch.equal(attention(q, k, v, lengths)[0], together)


@DTYPES
@pytest.mark.parametrize("length", [20, 33, 64, 90])
def test_padding_does_not_change_a_bit(attention, dtype, length):
    alone = torch.randn(length, 3, 2, 32).to(dtype)
    expected = attention(*alone.unbind(1), [length])[0]
    for padded in (length + 1, length + 60):
        for left in (0, 7, padded - length):
            if left + length > padded:
                continue
            rows = torch.randn(padded, 3, 2, 32).to(dtype)
            real = torch.zeros(padded, dtype=torch.bool)
            real[left : left + length] = True
            rows[real] = alone
            rows[~real, 1:] = math.nan  # keys that are hidden are not read
            out = attention(*rows.unbind(1), [padded], key_mask=real)[0]
            assert torch.equal(out[real], expected), (padded, left)


# ---- special numbers ----


@DTYPES
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
def test_what_is_not_finite(attention, dtype, value, which):
    """As in the original, and in its own head alone."""
    rows = torch.randn(150, 3, 2, 32).to(dtype)
    clean = attention(*rows.unbind(1), [80, 70])[0]
    rows[20, which, 1, 3] = value
    out = attention(*rows.unbind(1), [80, 70])[0]
    exact = plain(*rows.double().unbind(1), [80, 70], [80, 70], False, None, 0.0, None)[0]
    assert torch.equal(out.isnan(), exact.isnan())
    infinite = exact.isinf()
    assert torch.equal(out[infinite].double(), exact[infinite])
    assert torch.equal(out[80:], clean[80:])
    assert torch.equal(out[:, 0], clean[:, 0])


@DTYPES
def test_scores_that_overflow(attention, dtype):
    q, k, v = (t.contiguous() for t in qkv(80, 1, 32, dtype))
    q[3], k[7] = 3e37, 100.0
    exact = plain(*(t.double() for t in (q, k, v)), [80], [80], False, None, 0.0, None)[0]
    out = attention(q, k, v, [80])[0]
    assert out[3].isnan().all()
    others = [i for i in range(80) if i != 3]
    assert (out[others] - exact[others]).abs().max() < 0.05
    k[7] = -100.0  # -inf: seen, and weighs nothing
    exact = plain(*(t.double() for t in (q, k, v)), [80], [80], False, None, 0.0, None)[0]
    assert attention(q, k, v, [80], scale=1.0)[0][others].isfinite().all()


@DTYPES
def test_large_scores(attention, dtype):
    q, k, v = qkv(90, 1, 32, dtype)
    check(attention, q * 30, k, v, [90])


def test_denormals(attention):
    """Operands, parts and products below 2^-126 count as zero: the bound of design.md, of values and of scores."""
    q, k, v = (t.contiguous() for t in qkv(64, 1, 32, torch.float32))
    small = v * torch.logspace(-149, -100, 64, base=2.0)[:, None, None]
    exact = plain(q.double(), k.double(), small.double(), [64], [64], False, None, 0.0, None)[0]
    lost = 3 * TINY * (small.abs().sum() + 64) + 6 * 64 * TINY
    rounding = 2.0**-21 * small.abs().amax(0)
    assert ((attention(q, k, small, [64])[0] - exact).abs() <= lost + rounding).all()
    for few, many in ((q * 2.0**-130, k), (q, k * 2.0**-130)):  # all scores are zero, or as good as that
        uniform = v.mean(0).expand_as(v)
        torch.testing.assert_close(attention(few, many, v, [64])[0], uniform, rtol=1e-5, atol=1e-6)


# ---- tiles and their twin ----


@DTYPES
@pytest.mark.parametrize("parts", [1, 2, 3], ids=["one-part", "two-parts", "three-parts"])
def test_twin(attention_libraries, dtype, parts):
    twin, hardware = attention_libraries("twin-avx512"), attention_libraries("hardware")
    for head_dim, lengths in ((32, [65, 97]), (80, [70]), (16, [270])):
        q, k, v = qkv(sum(lengths), 2, head_dim, dtype)
        q, v = q * 2.0**3, v * torch.logspace(-120, 0, len(v), base=2.0).to(dtype)[:, None, None]
        for causal in (False, True):
            for a, b in zip(*(f(q, k, v, lengths, causal=causal, parts=parts) for f in (twin, hardware)), strict=True):
                assert_same_bits(a, b)


@pytest.mark.skipif(not has_amx(), reason="this processor has no AMX")
def test_matmul_precision():
    """torch.set_float32_matmul_precision is followed by the op."""
    q, k, v = qkv(70, 2, 64, torch.float32)
    exact = plain(*(t.double() for t in (q, k, v)), [70], [70], False, None, 0.0, None)[0]
    cu_seqlens = torch.tensor([0, 70], dtype=torch.int32)
    before = torch.get_float32_matmul_precision()
    errors = []
    try:
        with backends.use_cpu_isa("amx"):
            for precision in ("highest", "high", "medium"):
                torch.set_float32_matmul_precision(precision)
                errors.append((attention_op(q, k, v, cu_seqlens, max_seqlen_q=70) - exact).abs().max())
    finally:
        torch.set_float32_matmul_precision(before)
    assert errors[0] < 2e-6 < errors[1] < 2e-4 < errors[2] < 0.05
