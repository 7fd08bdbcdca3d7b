"""linear_log1p_max in every backend: three-way against eager torch, and what must hold exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from roberta_kernels import backends, ops

from . import eager
from .cases import (
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    Draw,
    Served,
    cases_on_every_backend,
    check_three_way,
    cumulative,
    leaf,
    on_every_backend,
    output_and_gradients,
    poisoned,
    uninitialised_is_nan,
)


@dataclass(frozen=True)
class Case:
    id: str
    lengths: tuple[int, ...]
    hidden: int
    words: int
    bias: bool = True
    size: float = 1.0  # of the logits, about
    mean: float = 0.0  # of the bias: below zero, most words have no row that is above zero
    layout: str = "contiguous"  # of x and weight: one of `poisoned`
    heavy: bool = False
    only: torch.dtype | None = None


CASES = [
    Case("1x16x1", (1,), 16, 1),
    Case("1x16x2", (1,), 16, 2, bias=False),
    Case("one-sequence", (7,), 24, 37),
    Case("empty-ones", (0, 3, 0, 0, 5, 0), 48, 33, layout="columns"),
    Case("9x5x31", (4, 5), 5, 31, layout="rows"),
    Case("13x17x1000", (6, 1, 6), 17, 1000, layout="transposed"),
    Case("most-are-zero", (9, 4), 32, 129, mean=-2.0),
    Case("none-is-above-zero", (3, 2), 16, 20, mean=-50.0),
    Case("large-logits", (5, 7), 48, 65, size=30.0),
    Case("33x64x2049", (16, 17), 64, 2049, heavy=True),
    Case("1100x16x70", (1050, 1, 49), 16, 70, heavy=True),  # two groups of rows, and a sequence in both
    Case("67x768x300", (30, 37), 768, 300, bias=False, heavy=True),
]


def draw_inputs(case: Case, draw: Draw, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(x, weight, bias; cu_seqlens; the gradient of the output, which is zero where rounding may decide which row is
    the largest, or whether it is above zero)."""
    rows = sum(case.lengths)
    inputs = {
        "x": poisoned(draw.normal(rows, case.hidden, dtype=dtype), case.layout),
        "weight": poisoned(
            draw.normal(case.words, case.hidden, dtype=dtype, std=case.size * case.hidden**-0.5), case.layout
        ),
    }
    logits = inputs["x"].double() @ inputs["weight"].double().t()
    if case.bias:
        inputs["bias"] = draw.normal(case.words, dtype=dtype, mean=case.mean)
        logits = logits + inputs["bias"].double()
    near = 64 * torch.finfo(dtype).eps * max(1.0, float(logits.abs().max()))
    sure = []
    for of_sequence in logits.split(list(case.lengths)):
        top = torch.cat([of_sequence, logits.new_full((2, case.words), -1e9)]).topk(2, dim=0)[0]
        sure.append(((top[0] - top[1]) > near) & (top[0].abs() > near))
    grad = draw.normal(len(case.lengths), case.words, dtype=dtype)
    return inputs, cumulative(list(case.lengths), draw.device), grad * torch.stack(sure)


def run_case(case: Case, draw: Draw, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs, ends, grad = draw_inputs(case, draw, dtype)
    return check_three_way(
        lambda **tensors: ops.linear_log1p_max(**tensors, cu_seqlens=ends).to(dtype),  # float32, whatever they are
        lambda **tensors: eager.linear_log1p_max(**tensors, lengths=list(case.lengths)),
        inputs,
        grad,
    )


@cases_on_every_backend(CASES)
def test_three_way(served: Served, case: Case, draw: Draw) -> None:
    run_case(case, draw, served.dtype)


@on_every_backend([FLOAT32, BFLOAT16], every_isa=False)
def test_several_chunks_of_the_vocabulary(served: Served, draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest.importorskip("roberta_kernels.triton.vocabulary"), "LOGITS_AT_ONCE", 1)
    words = 8400 if served.backend == "cpu" else 1200  # chunks of 8192 words, and of 512
    run_case(Case("", (4, 2), 24, words), draw, served.dtype)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@on_every_backend(dtypes=[FLOAT32])
def test_three_way_random_shapes(served: Served, data: st.DataObject) -> None:
    most = 5 if served.interpreted else 40
    case = Case(
        "random",
        lengths=tuple(data.draw(st.lists(st.integers(0, most), min_size=1, max_size=4).filter(any), "lengths")),
        hidden=data.draw(st.integers(1, 200), "hidden"),
        words=data.draw(st.integers(1, 700), "words"),
        bias=data.draw(st.booleans(), "bias"),
        mean=data.draw(st.sampled_from([0.0, -2.0]), "mean"),
        layout=data.draw(st.sampled_from(["contiguous", "rows", "columns", "transposed"]), "layout"),
    )
    run_case(case, Draw(data.draw(st.integers(0, 2**32 - 1), "seed"), served.device), served.dtype)


@on_every_backend(every_isa=False)
def test_the_output_is_float32(served: Served, draw: Draw) -> None:
    inputs, ends, _ = draw_inputs(Case("", (4, 5), 24, 37), draw, served.dtype)
    out = ops.linear_log1p_max(**inputs, cu_seqlens=ends)
    assert out.dtype == FLOAT32
    assert out.shape == (2, 37)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)])
@on_every_backend()
def test_no_rows(served: Served, lengths: tuple[int, ...], draw: Draw) -> None:
    """Zeros, and gradients of zeros."""
    inputs = {"x": draw.normal(0, 24, dtype=served.dtype), "weight": draw.normal(37, 24, dtype=served.dtype)}
    inputs["bias"] = draw.normal(37, dtype=served.dtype)
    ends = cumulative(list(lengths), draw.device)
    grad = torch.ones(len(lengths), 37, device=draw.device)
    with uninitialised_is_nan(*inputs.values()):
        got = output_and_gradients(lambda **t: ops.linear_log1p_max(**t, cu_seqlens=ends), inputs, grad)
    assert got["output"].shape == (len(lengths), 37)
    assert not any(tensor.any() for tensor in got.values())
    assert got["gradient of weight"].shape == (37, 24)


@on_every_backend()
def test_of_equal_rows_the_first_has_the_gradient(served: Served, draw: Draw) -> None:
    """As torch's max. Rows 2, 5 and 9 are one row, twice in the first sequence."""
    x = draw.normal(11, 24, dtype=served.dtype)
    x[5] = x[9] = x[2] = 3.0
    weight = draw.normal(37, 24, dtype=served.dtype).abs()  # so that this row has the largest logits
    ends = cumulative([7, 4], draw.device)
    x = leaf(x)
    ops.linear_log1p_max(x, weight, ends).sum().backward()
    assert x.grad is not None
    assert x.grad[2].all()
    assert x.grad[9].all()
    assert not x.grad[5].any()


INF, NAN = float("inf"), float("nan")
# Rows of two sequences, the first of four, by the number that they hold.
SPECIAL = {
    "inf": {3: INF},
    "two infs": {1: INF, 2: INF},
    "-inf": {3: -INF},
    "a sequence of -inf": dict.fromkeys(range(4), -INF),
    "nan": {2: NAN},
    "a nan and an inf": {5: INF, 6: NAN, 7: NAN},
}


@pytest.mark.parametrize("special", SPECIAL)
@on_every_backend()
def test_special_numbers(served: Served, special: str, draw: Draw) -> None:
    """A logit that is not finite does what it does in the original, in the output and in the gradient of the bias."""
    x = draw.normal(9, 24, dtype=served.dtype)
    for row, value in SPECIAL[special].items():
        x[row] = value
    weight = draw.normal(37, 24, dtype=served.dtype).abs() + 0.1  # above zero: inf times it is inf
    inputs, grad = {"bias": draw.normal(37, dtype=served.dtype)}, torch.ones(2, 37, device=draw.device)
    ends = cumulative([4, 5], draw.device)
    got = output_and_gradients(lambda bias: ops.linear_log1p_max(x, weight, ends, bias), inputs, grad)
    want = output_and_gradients(
        lambda bias: eager.linear_log1p_max(x.double(), weight.double(), bias.double(), lengths=[4, 5]), inputs, grad
    )
    assert not want["output"].isfinite().all() or special in ("-inf", "a sequence of -inf")
    for name, tensor in got.items():
        torch.testing.assert_close(tensor.double(), want[name].double(), equal_nan=True, rtol=3e-2, atol=3e-2, msg=name)


@on_every_backend(dtypes=[FLOAT32], every_isa=False)
def test_a_frozen_weight_has_no_gradient_and_none_is_made(served: Served, draw: Draw) -> None:
    inputs, ends, _ = draw_inputs(Case("", (4, 5), 24, 37), draw, served.dtype)
    given = (inputs["x"], inputs["weight"], inputs["bias"])
    kernels = served.kernels()
    out, rows = kernels.linear_log1p_max_forward(*given, ends)
    every = kernels.linear_log1p_max_backward(torch.ones_like(out), *given, out, rows, True)
    some = kernels.linear_log1p_max_backward(torch.ones_like(out), *given, out, rows, False)
    assert some[1].shape == (0,)
    assert torch.equal(some[0], every[0])
    assert torch.equal(some[2], every[2])


@on_every_backend(dtypes=[FLOAT32])
def test_a_sequence_by_itself_gives_the_same(served: Served, draw: Draw) -> None:
    inputs, ends, _ = draw_inputs(Case("", (4, 0, 5, 30), 24, 37), draw, served.dtype)
    together = ops.linear_log1p_max(**inputs, cu_seqlens=ends)
    for i, (start, end) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
        alone = inputs | {"x": inputs["x"][start:end]}
        got = ops.linear_log1p_max(**alone, cu_seqlens=cumulative([end - start], draw.device))[0]
        torch.testing.assert_close(got, together[i], rtol=1e-5, atol=1e-5)


def test_gradients_by_finite_differences(draw: Draw) -> None:
    with backends.backend("reference"):
        inputs, ends, _ = draw_inputs(Case("", (2, 0, 3), 6, 11), draw, FLOAT64)
        names = list(inputs)
        assert torch.autograd.gradcheck(
            lambda *values: ops.linear_log1p_max(**dict(zip(names, values, strict=True)), cu_seqlens=ends),
            [leaf(t) for t in inputs.values()],
        )


def test_logits_never_are_there_as_a_whole() -> None:
    """On a CPU: nothing of their size is asked for, in forward and backward."""
    if "cpu" not in backends.namespaces() or not backends.available_backends()["cpu"]:
        pytest.skip("no compiled kernels")
    rows, words = 600, 20_000
    draw: Any = Draw(1, "cpu")
    x, weight = leaf(draw.normal(rows, 8, dtype=FLOAT32)), leaf(draw.normal(words, 8, dtype=FLOAT32))
    with (
        backends.backend("cpu"),
        torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
    ):
        ops.linear_log1p_max(x, weight, cumulative([100] * 6, "cpu")).sum().backward()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    largest = max(event.nbytes() for event in events)
    assert 0 < largest <= rows * words * 4 / 2
