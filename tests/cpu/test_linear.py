"""The product of few rows with a weight that is read where it lies: the op linear."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from roberta_kernels.tolerance import assert_three_way

from .test_attention import DTYPES

pytestmark = pytest.mark.usefixtures("nan_memory")


def check(kernels, dtype, rows, columns, k_size, *, bias=True, strided=False):
    x, weight = torch.randn(rows, k_size).to(dtype), torch.randn(columns, k_size + 3 * strided).to(dtype)[:, :k_size]
    b = torch.randn(columns).to(dtype) if bias else None
    got = kernels.linear(x, weight, b)
    assert got.dtype == dtype
    assert got.is_contiguous()
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    # A sum is taken in the order of K, without fused multiply-adds where there are none; torch adds up several.
    assert_three_way(got, F.linear(x, weight, b), exact, floor_ulps=4.0)
    return x, weight, b, got


@DTYPES
@pytest.mark.parametrize("rows", [1, 7, 8, 33, 65])
def test_rows(kernels, dtype, rows):
    check(kernels, dtype, rows, 96, 64)
    check(kernels, dtype, rows, 771, 80, bias=False)


@DTYPES
@pytest.mark.parametrize(("columns", "k_size"), [(1, 1), (5, 7), (33, 63), (513, 65), (64, 1027)])
def test_odd_sizes(kernels, dtype, columns, k_size):
    check(kernels, dtype, 3, columns, k_size, strided=True)
    check(kernels, dtype, 1, columns, k_size, bias=False)


@DTYPES
def test_a_row_has_the_same_bits_alone_and_in_any_batch(kernels, on_threads, dtype):
    x, weight, bias, got = check(kernels, dtype, 40, 300, 96)
    for threads in (1, 2, 3):
        assert torch.equal(on_threads(threads, lambda: kernels.linear(x, weight, bias)), got)
    assert torch.equal(torch.cat([kernels.linear(row, weight, bias) for row in x.split(1)]), got)


def test_nothing_to_do_and_refusals(kernels):
    x, weight, bias = torch.randn(4, 16), torch.randn(8, 16), torch.randn(8)
    assert kernels.linear(x[:0], weight, bias).shape == (0, 8)

    def refuses(message, *, x=x, weight=weight, bias=bias):
        with pytest.raises(RuntimeError, match=message):
            kernels.linear(x, weight, bias)

    refuses("float32 or bfloat16", x=x.double())
    refuses("x must have shape", x=x[0])
    refuses("weight must have shape", weight=weight[:, :9])
    refuses("weight must be Float", weight=weight.bfloat16())
    refuses("contiguous rows", weight=torch.randn(16, 8).t())
    refuses("must not be empty", weight=weight[:0], bias=bias[:0])
    refuses("bias must have shape", bias=bias[:7])
