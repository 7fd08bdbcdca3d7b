"""Attention of few queries, whose keys and values are read in place: the op cached_attention, and the op attention on
unpadded rows, against plain torch in float64; and what must hold to the bit."""

from __future__ import annotations

import math

import pytest
import torch

from roberta_kernels.tolerance import assert_three_way

from .test_attention import DTYPES, cumulative

LENGTHS = [1, 7, 63, 65, 255, 257, 513]  # a part holds 256 keys


pytestmark = pytest.mark.usefixtures("nan_memory")


def plain(query, key, value, mask, scale, causal):
    """In the dtype of its arguments -> `[B, Q, heads, head_dim]`."""
    queries, keys = query.shape[2], key.shape[2]
    seen = torch.ones(queries, keys, dtype=torch.bool)
    seen = (seen.tril(keys - queries) if causal else seen).expand(len(query), 1, queries, keys)
    if mask is not None:
        seen = seen & mask[:, None, None]
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~seen, -math.inf)
    blind = ~seen.any(-1, keepdim=True)
    weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(~seen, 0.0)
    return (weights @ value.masked_fill(~value.isfinite(), 0.0)).transpose(1, 2)


def masks(kind, batch, keys):
    if kind is None:
        return None
    lengths = torch.tensor([keys, max(1, keys // 3), keys // 2])[torch.arange(batch) % 3, None]
    if kind == "right":
        return torch.arange(keys) < lengths
    if kind == "left":
        return torch.arange(keys) >= keys - lengths
    mask = torch.rand(batch, keys) < 0.6
    mask[:1] = False  # a sequence of which nothing is seen
    return mask


LAYOUTS = {
    "cache": lambda t: t,
    "projection": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "part of a cache": lambda t: torch.cat([t, torch.full_like(t, math.nan)], 2)[:, :, : t.shape[2]],
    "expanded": lambda t: t[:1].expand(t.shape),
}


def check(
    kernels, dtype, *, batch=3, heads=2, queries=1, keys=65, head_dim=64, mask=None, causal=False, layout="cache"
):
    query = LAYOUTS["projection"](torch.randn(batch, heads, queries, head_dim).to(dtype))
    key, value = (LAYOUTS[layout](torch.randn(batch, heads, keys, head_dim).to(dtype)) for _ in range(2))
    seen = masks(mask, batch, keys)
    if seen is not None and layout != "expanded":  # what nobody sees is not read
        value[~seen[:, None].expand(value.shape[:3])] = math.nan
    scale = 0.9 * head_dim**-0.5
    got = kernels.cached_attention(query, key, value, seen, scale, causal)
    assert got.dtype == dtype
    assert got.is_contiguous()
    original = plain(query, key, value, seen, scale, causal)
    exact = plain(query.double(), key.double(), value.double(), seen, scale, causal)
    assert_three_way(got, original, exact, name="out")


@DTYPES
@pytest.mark.parametrize("keys", LENGTHS)
def test_lengths(kernels, dtype, keys):
    for mask in (None, "right", "left", "holes"):
        check(kernels, dtype, keys=keys, mask=mask)


@DTYPES
@pytest.mark.parametrize("head_dim", [16, 24, 32, 40, 64, 96, 120, 128])
def test_head_dims(kernels, dtype, head_dim):
    check(kernels, dtype, head_dim=head_dim, keys=70, queries=2)


@DTYPES
@pytest.mark.parametrize("queries", [2, 3, 8])
@pytest.mark.parametrize("mask", [None, "left", "holes"])
def test_several_queries(kernels, dtype, queries, mask):
    for keys in (1, 9, 300):
        for causal in (False, True):
            check(kernels, dtype, queries=queries, keys=keys, causal=causal, mask=mask)


@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_keys_are_read_where_they_lie(kernels, dtype, layout):
    check(kernels, dtype, keys=33, layout=layout, heads=12)
    check(kernels, dtype, keys=33, layout=layout, mask="right")


@DTYPES
def test_nothing_to_do(kernels, dtype):
    def run(batch, heads, queries, keys):
        query, key = torch.randn(batch, heads, queries, 32).to(dtype), torch.randn(batch, heads, keys, 32).to(dtype)
        return kernels.cached_attention(query, key, key, None, 1.0, False)

    assert run(0, 2, 1, 5).shape == (0, 1, 2, 32)
    assert run(2, 2, 0, 5).shape == (2, 0, 2, 32)
    assert torch.equal(run(2, 3, 1, 0), torch.zeros(2, 1, 3, 32, dtype=dtype))


@DTYPES
def test_a_sequence_has_the_same_bits_alone_and_in_any_batch(kernels, on_threads, dtype):
    """Padded on either side or with holes, one query or some, on any number of threads, laid out as it may be."""
    heads, keys, padded = 12, 300, 340
    query, key, value = (torch.randn(1, heads, n, 64).to(dtype) for n in (3, keys, keys))
    alone = on_threads(1, lambda: kernels.cached_attention(query, key, value, None, 0.125, False))
    for first in (0, 11, padded - keys):
        others = [torch.randn(4, heads, n, 64).to(dtype) for n in (3, padded, padded)]
        mask = torch.rand(4, padded) < 0.7
        mask[2] = False
        mask[2, first : first + keys] = True
        for of, one in zip(others, (query, key, value), strict=True):
            at = 0 if of.shape[2] == 3 else first
            of[2, :, at : at + one.shape[2]] = one[0]
        for threads in (1, 2, 3):
            got = on_threads(
                threads, lambda others=others, mask=mask: kernels.cached_attention(*others, mask, 0.125, False)
            )
            assert torch.equal(got[2:3], alone)
    holes = torch.arange(2 * keys) % 2 == 1
    spread = [torch.full((1, heads, 2 * keys, 64), math.nan, dtype=dtype) for _ in range(2)]
    for of, one in zip(spread, (key, value), strict=True):
        of[:, :, holes] = one
    assert torch.equal(kernels.cached_attention(query, *spread, holes[None], 0.125, False), alone)
    by_one = [kernels.cached_attention(query[:, :, i : i + 1], key, value, None, 0.125, False) for i in range(3)]
    assert torch.equal(torch.cat(by_one, 1), alone)
    rows = [LAYOUTS["projection"](t) for t in (key, value)]
    assert torch.equal(kernels.cached_attention(query, *rows, None, 0.125, False), alone)
    # The op attention, on unpadded rows.
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    rest = (cumulative([3]), cumulative([keys]), 3, keys, 0.125, False, None, 0.0, None)
    assert torch.equal(kernels.attention_forward(q, k, v, *rest)[0], alone[0])


@DTYPES
def test_among_sequences_of_many_queries(kernels, dtype):
    lengths_q, lengths_k = [60, 1, 9, 8, 0, 2], [70, 300, 20, 0, 5, 33]
    q = torch.randn(sum(lengths_q), 2, 64).to(dtype)
    k, v = (torch.randn(sum(lengths_k), 2, 64).to(dtype) for _ in range(2))

    def run(rows_q, rows_k):
        rest = (cumulative(rows_q), cumulative(rows_k), 60, 300, 0.125, False, None, 0.0, None)
        first_q, first_k = (sum(lengths_q[:1]), sum(lengths_k[:1])) if len(rows_q) == 1 else (0, 0)
        take = slice(first_q, first_q + sum(rows_q)), slice(first_k, first_k + sum(rows_k))
        return kernels.attention_forward(q[take[0]], k[take[1]], v[take[1]], *rest)

    out, lse = run(lengths_q, lengths_k)
    one, lse_of_one = run(lengths_q[1:2], lengths_k[1:2])
    assert torch.equal(out[60:61], one)
    assert torch.equal(lse[:, 60:61], lse_of_one)
    assert torch.equal(out[70:78], torch.zeros(8, 2, 64, dtype=dtype))
    assert (lse[:, 70:78] == -math.inf).all()
    assert out.isfinite().all()


def test_special_numbers(kernels):
    query, key, value = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 20, 32), torch.randn(1, 1, 20, 32)
    broken = key.clone()
    broken[0, 0, 7, 3] = math.nan
    assert kernels.cached_attention(query, broken, value, None, 1.0, False).isnan().all()
    mask = torch.arange(20)[None] != 7
    assert torch.equal(
        kernels.cached_attention(query, broken, value, mask, 1.0, False),
        kernels.cached_attention(query, key, value, mask, 1.0, False),
    )
    value[0, 0, 4, 5] = math.inf
    out = kernels.cached_attention(query, key, value, None, 1.0, False)
    assert out[0, 0, 0, 5] == math.inf
    assert out.isfinite().sum() == 31


def test_refusals(kernels):
    query, key = torch.randn(2, 3, 1, 32), torch.randn(2, 3, 5, 32)

    def refuses(message, *, query=query, key=key, value=key, mask=None):
        with pytest.raises(RuntimeError, match=message):
            kernels.cached_attention(query, key, value, mask, 1.0, False)

    refuses("float32 or bfloat16", query=query.double())
    refuses("key must be Float", key=key.bfloat16())
    refuses("value must have shape", value=key[:, :, :4])
    refuses("key must have shape", key=key[:, :2], value=key[:, :2])
    refuses("at most 8 rows", query=torch.randn(2, 3, 9, 32))
    refuses("head_dim must be a multiple of 8", query=query[..., :12], key=key[..., :12], value=key[..., :12])
    refuses("unit stride in head_dim", key=torch.randn(2, 3, 32, 5).transpose(2, 3))
    refuses("key_mask must have shape", mask=torch.ones(2, 4, dtype=torch.bool))
    refuses("key_mask must be Bool", mask=torch.ones(2, 5))
