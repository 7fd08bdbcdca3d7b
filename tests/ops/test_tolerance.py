"""The tolerance helper: it must see what it is there to see, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from roberta_kernels.tolerance import assert_three_way, compare

from .cases import Draw

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def triple(draw: Draw, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(ours, the original, exact): both are the exact one, rounded; the original once more in float16's last place."""
    exact = draw.normal(50, 40, dtype=torch.float64)
    rounded = exact.to(dtype)
    original = rounded * (1 + torch.finfo(dtype).eps * draw.integers(-1, 2, 50, 40)).to(dtype)
    return rounded.clone(), original, exact


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_good_as_the_original_holds(dtype: torch.dtype, draw: Draw) -> None:
    ours, original, exact = triple(draw, dtype)
    assert_three_way(ours, original, exact)
    assert_three_way(original, ours, exact)
    comparison = compare(ours, original, exact, name="gradient of x")
    assert comparison.holds
    assert "gradient of x: holds" in str(comparison)
    assert comparison.max_error == float((ours.double() - exact).abs().max())
    assert comparison.max_error_original == float((original.double() - exact).abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_wrong_element_breaks_it(dtype: torch.dtype, draw: Draw) -> None:
    ours, original, exact = triple(draw, dtype)
    place = int(exact.abs().argmin())
    ours.view(-1)[place] += 40 * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match="gradient of q: BROKEN: largest error"):
        assert_three_way(ours, original, exact, name="gradient of q")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_small_error_everywhere_breaks_it(dtype: torch.dtype, draw: Draw) -> None:
    """Each element is off by less than the largest error allowed; only the root mean square sees it."""
    ours, original, exact = triple(draw, dtype)
    wrong = ours + 8 * torch.finfo(dtype).eps
    comparison = compare(wrong, original, exact)
    assert comparison.max_error <= comparison.max_allowed
    assert comparison.rms_error > comparison.rms_allowed
    assert not comparison.holds


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_small_factor_breaks_it(dtype: torch.dtype, draw: Draw) -> None:
    ours, original, exact = triple(draw, dtype)
    assert not compare(ours * (1 + 16 * torch.finfo(dtype).eps), original, exact).holds


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_breaks_it(wrong: float, draw: Draw) -> None:
    ours, original, exact = triple(draw, torch.float32)
    ours[3, 4] = wrong
    assert not compare(ours, original, exact).holds
    original[3, 4] = wrong  # and no excuse that the original has it too
    assert not compare(ours, original, exact).holds


@pytest.mark.parametrize("true", [float("nan"), float("inf"), float("-inf")])
def test_where_the_exact_value_is_not_finite_so_is_ours(true: float, draw: Draw) -> None:
    ours, original, exact = triple(draw, torch.float32)
    exact[3, 4] = true
    for ours_value in (float("nan"), float("inf"), float("-inf"), 0.0, 1e30):
        ours[3, 4] = original[3, 4] = ours_value
        same = ours_value == true or (ours_value != ours_value and true != true)
        assert compare(ours, original, exact).holds == same, ours_value


def test_an_infinite_element_does_not_hide_the_others(draw: Draw) -> None:
    ours, original, exact = triple(draw, torch.float32)
    for t in (ours, original, exact):
        t[0, 0] = float("inf")
    assert compare(ours, original, exact).holds
    ours[5, 5] += 1e-4
    assert not compare(ours, original, exact).holds


def test_an_original_that_overflows_gives_no_licence(draw: Draw) -> None:
    """Its overflow counts as no error: not as an infinite allowance."""
    ours, original, exact = triple(draw, torch.float16)
    original[3, 4] = float("inf")
    assert compare(ours, original, exact).holds
    ours[3, 4] += 1.0
    assert not compare(ours, original, exact).holds


def test_an_exact_original_leaves_the_rounding_floor(draw: Draw) -> None:
    exact = draw.normal(30, dtype=torch.float32).double()
    original = exact.float()
    ulp = torch.finfo(torch.float32).eps
    largest = float(exact.abs().max())
    ours = original.clone()
    ours[int(exact.abs().argmax())] *= 1 + 1.5 * ulp
    assert compare(ours, original, exact).max_allowed == pytest.approx(2 * ulp * largest)
    assert not compare(ours * (1 + 8 * ulp), original, exact).holds
    assert compare(ours * (1 + 8 * ulp), original, exact, floor_ulps=16).holds


def test_zeros_must_be_zeros() -> None:
    zeros = torch.zeros(5, 6)
    assert compare(zeros, zeros, zeros.double()).holds
    assert not compare(zeros + 1e-30, zeros, zeros.double()).holds


def test_nothing_to_compare() -> None:
    nothing = torch.zeros(0, 6)
    assert_three_way(nothing, nothing, nothing.double())


def test_what_cannot_be_compared() -> None:
    a = torch.zeros(5, 6)
    with pytest.raises(ValueError, match="lse: shapes differ"):
        compare(a[0], a, a.double(), name="lse")
    with pytest.raises(ValueError, match="shapes differ"):
        compare(a, a[:, :1], a.double())
    with pytest.raises(ValueError, match=r"ours is torch\.bfloat16"):
        compare(a.bfloat16(), a, a.double())
