"""attention_forward and attention_backward of the CPU library, against plain torch in float64."""

from __future__ import annotations

import math

import pytest
import torch

from roberta_kernels.reference.philox import keep_mask
from roberta_kernels.tolerance import assert_three_way

LENGTHS = [0, 1, 7, 97, 257]


def cumulative(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def plain(q, k, v, lengths_q, lengths_k, causal, key_mask, dropout_p, seed):
    """(out, lse) in q's dtype, sequence by sequence."""
    outs, lses, begin_q, begin_k = [], [], 0, 0
    heads, scale = q.shape[1], q.shape[2] ** -0.5
    for n, m in zip(lengths_q, lengths_k, strict=True):
        rows, keys = slice(begin_q, begin_q + n), slice(begin_k, begin_k + m)
        scores = q[rows].transpose(0, 1) @ k[keys].permute(1, 2, 0) * scale
        visible = torch.ones(n, m, dtype=torch.bool)
        if causal:
            visible = visible.tril(m - n)
        if key_mask is not None:
            visible = visible & key_mask[keys]
        blind = ~visible.any(-1, keepdim=True)
        scores = scores.masked_fill(~visible, -math.inf)
        lses.append(scores.logsumexp(-1) if m else torch.full((heads, n), -math.inf, dtype=q.dtype))
        p = scores.masked_fill(blind, 0.0).softmax(-1) * visible
        if dropout_p > 0:
            keep = keep_mask(torch.arange(begin_q, begin_q + n), m, torch.arange(heads), dropout_p, seed)
            p = p * keep / (1 - dropout_p)
        outs.append((p @ v[keys].transpose(0, 1)).transpose(0, 1))
        begin_q, begin_k = begin_q + n, begin_k + m
    return torch.cat(outs), torch.cat(lses, 1)


def arguments(q, k, lengths_q, lengths_k, causal=False, key_mask=None, dropout_p=0.0, seed=None):
    scale = q.shape[2] ** -0.5
    longest = max(lengths_q), max(lengths_k)
    return (cumulative(lengths_q), cumulative(lengths_k), *longest, scale, causal, key_mask, dropout_p, seed)


def check(kernels, q, k, v, lengths_q, lengths_k=None, causal=False, key_mask=None, dropout_p=0.0, seed=None):
    lengths_k = lengths_q if lengths_k is None else lengths_k
    rest = arguments(q, k, lengths_q, lengths_k, causal, key_mask, dropout_p, seed)
    out, lse = kernels.attention_forward(q, k, v, *rest)
    grad_out = torch.randn(q.shape).to(q.dtype)
    *grads, of_no_bias = kernels.attention_backward(grad_out, q, k, v, out, lse, *rest)
    assert of_no_bias.shape == (0,)
    results = []
    for dtype in (q.dtype, torch.float64):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        expected, expected_lse = plain(*inputs, lengths_q, lengths_k, causal, key_mask, dropout_p, seed)
        results.append((expected, expected_lse, *torch.autograd.grad(expected, inputs, grad_out.to(dtype))))
    original, exact = results
    assert lse.dtype == torch.float32
    assert_three_way(lse, original[1].float(), exact[1], name="lse")
    for name, ours, a, b in zip(
        ("out", "grad_q", "grad_k", "grad_v"),
        (out, *grads),
        original[:1] + original[2:],
        exact[:1] + exact[2:],
        strict=True,
    ):
        assert ours.dtype == q.dtype
        assert ours.is_contiguous()
        assert_three_way(ours, a, b, name=name)


def qkv(tokens, heads, head_dim, dtype):
    return torch.randn(tokens, 3, heads, head_dim).to(dtype).unbind(1)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@DTYPES
@pytest.mark.parametrize("head_dim", [16, 24, 32, 64, 80, 128])
def test_strided_views_of_one_projection(kernels, dtype, head_dim):
    check(kernels, *qkv(sum(LENGTHS), 3, head_dim, dtype), LENGTHS)


@DTYPES
@pytest.mark.parametrize("heads", [1, 12, 16])
def test_heads(kernels, dtype, heads):
    check(kernels, *qkv(150, heads, 40, dtype), [3, 129, 18])


@DTYPES
def test_causal(kernels, dtype):
    check(kernels, *qkv(sum(LENGTHS), 2, 64, dtype), LENGTHS, causal=True)


@DTYPES
@pytest.mark.parametrize("causal", [False, True])
def test_lengths_of_queries_and_keys_differ(kernels, dtype, causal):
    lengths_q, lengths_k = [5, 1, 60, 33, 4, 0], [9, 130, 20, 200, 0, 6]
    q = torch.randn(sum(lengths_q), 3, 32).to(dtype)
    k, v = (torch.randn(sum(lengths_k), 3, 32).to(dtype) for _ in range(2))
    check(kernels, q, k, v, lengths_q, lengths_k, causal)


@DTYPES
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_key_mask(kernels, dtype, causal, dropout_p):
    lengths = [1, 7, 97, 50, 130]
    mask = torch.rand(sum(lengths)) < 0.6
    mask[105:155] = False  # the whole fourth sequence
    seed = torch.tensor([-5])
    check(kernels, *qkv(sum(lengths), 2, 24, dtype), lengths, None, causal, mask, dropout_p, seed)


@DTYPES
@pytest.mark.parametrize("dropout_p", [0.1, 0.9])
def test_dropout(kernels, dtype, dropout_p):
    seed = torch.tensor([0x0123456789ABCDEF])
    check(kernels, *qkv(sum(LENGTHS), 3, 64, dtype), LENGTHS, dropout_p=dropout_p, seed=seed)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_no_tokens(kernels, lengths):
    q, k, v = qkv(0, 4, 16, torch.float32)
    rest = (cumulative(lengths), cumulative(lengths), 0, 0, 1.0, False, None, 0.0, None)
    out, lse = kernels.attention_forward(q, k, v, *rest)
    assert out.shape == (0, 4, 16)
    assert lse.shape == (4, 0)
    *grads, _ = kernels.attention_backward(out, q, k, v, out, lse, *rest)
    for grad in grads:
        assert grad.shape == (0, 4, 16)
    bias = torch.ones(4, 2, 3)  # of rows that no sequence has
    assert torch.equal(kernels.attention_backward(out, q, k, v, out, lse, *rest, bias)[3], torch.zeros(4, 2, 3))


def test_large_scores_and_many_keys(kernels):
    q, k, v = qkv(1500, 1, 32, torch.float32)
    check(kernels, q * 30, k, v, [1500])


def test_nan_reaches_only_its_own_rows(kernels):
    q, k, v = qkv(60, 2, 32, torch.float32)
    q = q.clone()
    q[7, 1, 3] = math.nan
    out, _ = kernels.attention_forward(q, k, v, *arguments(q, k, [40, 20], [40, 20]))
    nan = out.isnan().any(-1)
    assert nan[7, 1]
    assert nan.sum() == 1


@DTYPES
def test_bitwise_the_same_on_any_number_of_threads(kernels, on_threads, dtype):
    lengths = [300, 1, 44, 0, 129, 8]
    q, k, v = qkv(sum(lengths), 5, 64, dtype)
    rest = arguments(q, k, lengths, lengths, dropout_p=0.1, seed=torch.tensor([3]))
    grad_out = torch.randn(q.shape).to(dtype)

    def run():
        out, lse = kernels.attention_forward(q, k, v, *rest)
        return out, lse, *kernels.attention_backward(grad_out, q, k, v, out, lse, *rest)

    one = on_threads(1, run)
    for threads in (2, 2, 5):
        for a, b in zip(one, on_threads(threads, run), strict=True):
            assert torch.equal(a, b)


def test_expanded_grad_out(kernels):
    q, k, v = qkv(20, 2, 16, torch.float32)
    rest = arguments(q, k, [20], [20])
    out, lse = kernels.attention_forward(q, k, v, *rest)
    ones = torch.ones(())
    a = kernels.attention_backward(ones.expand(q.shape), q, k, v, out, lse, *rest)
    b = kernels.attention_backward(torch.ones(q.shape), q, k, v, out, lse, *rest)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("cu", "message"),
    [
        ([1, 10], "cu_seqlens_q must start at 0"),
        ([0, 6, 5, 10], "cu_seqlens_q must not decrease"),
        ([0, 9], "cu_seqlens_q must end at the number of tokens, 10, got 9"),
        ([0, 11], "length 11, more than max_seqlen_q = 10"),
    ],
)
def test_bad_cu_seqlens(kernels, cu, message):
    q, k, v = qkv(10, 2, 16, torch.float32)
    cu = torch.tensor(cu, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=message):
        kernels.attention_forward(q, k, v, cu, cu, 10, 10, 1.0, False, None, 0.0, None)


def test_refusals(kernels):
    q, k, v = qkv(10, 2, 16, torch.float32)
    cu = torch.tensor([0, 10], dtype=torch.int32)

    def refuses(message, *, q=q, k=k, v=v, cu_q=cu, cu_k=cu, mask=None, p=0.0, seed=None):
        with pytest.raises(RuntimeError, match=message):
            kernels.attention_forward(q, k, v, cu_q, cu_k, 10, 10, 1.0, False, mask, p, seed)

    refuses("float32 or bfloat16", q=q.double())
    refuses("k must be Float", k=k.bfloat16())
    refuses("v must have shape", v=v[:9])
    refuses("unit stride in head_dim", k=torch.randn(16, 2, 10).permute(2, 1, 0))
    refuses("head_dim must be a multiple of 8", q=q[..., :12], k=k[..., :12], v=v[..., :12])
    refuses("cu_seqlens_q must be Int", cu_q=cu.long())
    refuses("cu_seqlens_k must have 2 elements", cu_k=torch.tensor([0, 5, 10], dtype=torch.int32))
    refuses("key_mask must have shape", mask=torch.ones(9, dtype=torch.bool))
    refuses("key_mask must be Bool", mask=torch.ones(10))
    refuses("dropout_p must be in", p=1.0)
    refuses("needs a seed", p=0.5)
