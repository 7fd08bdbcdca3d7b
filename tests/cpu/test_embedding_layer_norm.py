"""embedding_layer_norm_forward and embedding_layer_norm_backward of the CPU library, against plain torch in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from roberta_kernels.reference.philox import dropout_multiplier
from roberta_kernels.tolerance import assert_three_way

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
EPS = 1e-5


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def plain(ids, tables, weight, bias, padding, multiplier):
    word, position, token_type = (
        F.embedding(i, t, padding_idx=None if p < 0 else p) for i, t, p in zip(ids, tables, padding, strict=True)
    )
    out = F.layer_norm(word + token_type + position, (weight.shape[0],), weight, bias, EPS)
    return out if multiplier is None else out * multiplier.to(out.dtype)


def inputs(tokens, hidden, rows, dtype):
    ids = [torch.randint(n, (tokens,)) for n in rows]
    tables = [torch.randn(n, hidden).to(dtype) for n in rows]
    return ids, tables, (1 + 0.2 * torch.randn(hidden)).to(dtype), torch.randn(hidden).to(dtype)


def check(kernels, tokens, hidden, rows, dtype, padding=(-1, -1), dropout_p=0.0):
    ids, tables, weight, bias = inputs(tokens, hidden, rows, dtype)
    seed = torch.tensor([-123456789]) if dropout_p else None
    multiplier = dropout_multiplier((tokens, hidden), dropout_p, seed, torch.float64) if dropout_p else None
    out, mean, rstd = kernels.embedding_layer_norm_forward(*ids, *tables, weight, bias, EPS, *padding, dropout_p, seed)
    grad_out = torch.randn(tokens, hidden).to(dtype)
    grads = kernels.embedding_layer_norm_backward(
        grad_out, *ids, *tables, weight, mean, rstd, *padding, dropout_p, seed
    )
    results = []
    for to in (dtype, torch.float64):
        leaves = [t.detach().to(to).requires_grad_() for t in (*tables, weight, bias)]
        expected = plain(ids, leaves[:3], *leaves[3:], (*padding, -1), multiplier)
        results.append((expected, *torch.autograd.grad(expected, leaves, grad_out.to(to))))
    names = ("out", "word", "position", "token_type", "weight", "bias")
    for name, ours, original, exact in zip(names, (out, *grads), *results, strict=True):
        assert ours.dtype == dtype
        assert_three_way(ours, original, exact, name=name)
    for grad, index in zip(grads, padding, strict=False):
        if index >= 0:
            assert not grad[index].any()
    return grads


@DTYPES
@pytest.mark.parametrize("hidden", [1, 32, 48, 77, 768, 1000, 1024])
def test_hidden_sizes(kernels, dtype, hidden):
    check(kernels, 41, hidden, (97, 30, 2), dtype, padding=(1, 1))


@DTYPES
@pytest.mark.parametrize("tokens", [0, 1, 2, 33, 1500])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_token_counts(kernels, dtype, tokens, dropout_p):
    check(kernels, tokens, 80, (300, 514, 1), dtype, padding=(1, -1), dropout_p=dropout_p)


@DTYPES
def test_large_vocabulary(kernels, dtype):
    check(kernels, 700, 48, (50265, 514, 1), dtype, padding=(1, 1))


def test_untouched_rows_are_zero(kernels):
    ids, tables, weight, bias = inputs(64, 32, (5000, 40, 3), torch.float32)
    out, mean, rstd = kernels.embedding_layer_norm_forward(*ids, *tables, weight, bias, EPS, -1, -1, 0.0, None)
    grads = kernels.embedding_layer_norm_backward(out, *ids, *tables, weight, mean, rstd, -1, -1, 0.0, None)
    for i, grad in zip(ids, grads[:3], strict=True):
        touched = torch.zeros(grad.shape[0], dtype=torch.bool)
        touched[i] = True
        assert not grad[~touched].any()


@DTYPES
def test_bitwise_the_same_on_any_number_of_threads(kernels, on_threads, dtype):
    ids, tables, weight, bias = inputs(900, 200, (3000, 100, 1), dtype)
    seed = torch.tensor([9])

    def run():
        out, mean, rstd = kernels.embedding_layer_norm_forward(*ids, *tables, weight, bias, EPS, 1, 1, 0.1, seed)
        return (
            out,
            mean,
            rstd,
            *kernels.embedding_layer_norm_backward(out, *ids, *tables, weight, mean, rstd, 1, 1, 0.1, seed),
        )

    one = on_threads(1, run)
    for threads in (2, 3):
        assert all(torch.equal(a, b) for a, b in zip(one, on_threads(threads, run), strict=True))


def test_nan_spoils_its_rows_only(kernels):
    ids, tables, weight, bias = inputs(20, 32, (10, 20, 1), torch.float32)
    tables[0][4, 31] = math.nan
    out, _, _ = kernels.embedding_layer_norm_forward(*ids, *tables, weight, bias, EPS, -1, -1, 0.0, None)
    assert torch.equal(out.isnan().any(1), ids[0] == 4)


@pytest.mark.parametrize("bad", [-1, 7])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_id_out_of_range(kernels, bad, which):
    rows = (7, 7, 7)
    ids, tables, weight, bias = inputs(9, 16, rows, torch.float32)
    ids[which][5] = bad
    name = ("input_ids", "position_ids", "token_type_ids")[which]
    table = ("word", "position", "token_type")[which]
    message = rf"index out of range in self: {name}\[5\] = {bad}, but {table}_embeddings has 7 rows"
    with pytest.raises(RuntimeError, match=message):
        kernels.embedding_layer_norm_forward(*ids, *tables, weight, bias, EPS, -1, -1, 0.0, None)
    statistics = torch.zeros(9), torch.ones(9)
    with pytest.raises(RuntimeError, match=message):
        kernels.embedding_layer_norm_backward(torch.ones(9, 16), *ids, *tables, weight, *statistics, -1, -1, 0.0, None)


def test_refusals(kernels):
    ids, tables, weight, bias = inputs(3, 8, (5, 5, 5), torch.float32)

    def refuses(message, ids=ids, tables=tables, weight=weight):
        with pytest.raises(RuntimeError, match=message):
            kernels.embedding_layer_norm_forward(*ids, *tables, weight, bias, EPS, -1, -1, 0.0, None)

    refuses("input_ids must be Long", ids=[ids[0].int(), *ids[1:]])
    refuses("position_ids must have shape", ids=[ids[0], ids[1][:2], ids[2]])
    refuses("token_type_embeddings must have shape", tables=[*tables[:2], tables[2][:, :7]])
    refuses("position_embeddings must be Float", tables=[tables[0], tables[1].bfloat16(), tables[2]])
    refuses("weight must have shape", weight=weight[:3])
