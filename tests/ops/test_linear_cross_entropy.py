"""linear_cross_entropy in every backend: three-way against eager torch, and what must hold exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

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
    leaf,
    on_every_backend,
    output_and_gradients,
    poisoned,
    uninitialised_is_nan,
)


@dataclass(frozen=True)
class Case:
    id: str
    rows: int
    hidden: int
    words: int
    bias: bool = True
    ignored: float = 0.5  # share of the rows
    reduction: str = "mean"
    size: float = 1.0  # of the logits, about
    confident: bool = False  # every row's own label has nearly all of the probability
    layout: str = "contiguous"  # of x and weight: one of `poisoned`
    heavy: bool = False
    only: torch.dtype | None = None


CASES = [
    Case("1x16x1", 1, 16, 1, ignored=0.0),
    Case("1x16x2", 1, 16, 2, ignored=0.0, bias=False),
    Case("one-row", 1, 24, 37, ignored=0.0, reduction="none"),
    Case("7x48x33", 7, 48, 33, reduction="sum", layout="columns"),
    Case("9x5x31", 9, 5, 31, reduction="none", layout="rows"),
    Case("13x17x1000", 13, 17, 1000, layout="transposed"),
    Case("33x64x2049", 33, 64, 2049, reduction="none", ignored=0.85),
    Case("20x32x129-none-ignored", 20, 32, 129, ignored=0.0),
    Case("large-logits", 12, 48, 65, size=40.0),
    Case("confident", 12, 48, 65, confident=True, reduction="none"),
    Case("40x32x9001", 40, 32, 9001, ignored=0.0, bias=False, heavy=True),
    Case("301x100x1003", 301, 100, 1003, reduction="sum", heavy=True),
    Case("97x768x600", 97, 768, 600, heavy=True),
]


def draw_inputs(case: Case, draw: Draw, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
    """(x, weight, bias; labels and options; the gradient of the loss)."""
    x = draw.normal(case.rows, case.hidden, dtype=dtype)
    weight = draw.normal(case.words, case.hidden, dtype=dtype, std=case.size * case.hidden**-0.5)
    labels = draw.integers(0, case.words, case.rows)
    if case.confident:
        x = weight[labels] * 12.0
    labels[draw.bools(case.rows, p=case.ignored)] = -100
    if case.rows > 1 and case.ignored > 0:
        labels[0], labels[1] = -100, case.words - 1
    inputs = {"x": poisoned(x, case.layout), "weight": poisoned(weight, case.layout)}
    if case.bias:
        inputs["bias"] = draw.normal(case.words, dtype=dtype, std=case.size)
    shape = (case.rows,) if case.reduction == "none" else ()
    return inputs, {"labels": labels, "reduction": case.reduction}, draw.normal(*shape, dtype=dtype)


def run_case(case: Case, draw: Draw, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs, rest, grad = draw_inputs(case, draw, dtype)
    return check_three_way(
        lambda **tensors: ops.linear_cross_entropy(**tensors, **rest).to(dtype),  # float32, whatever they are
        lambda **tensors: eager.linear_cross_entropy(**tensors, **rest),
        inputs,
        grad,
        within=roundings_of_sure_labels(inputs, rest["labels"], grad) if case.confident else None,
    )


def roundings_of_sure_labels(inputs: dict[str, Tensor], labels: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """What the roundings of every label's probability p do to the loss, and to each gradient.

    p is near 1 and rounded as such a number is, here and in the original: the sum that it is divided by, and the
    quotient. log(p) and p - 1 are what is left. grad: of a loss without reduction.
    """
    rows = labels.ne(-100).nonzero()[:, 0]
    x, weight, bias = (inputs[name].detach().double().abs().requires_grad_() for name in ("x", "weight", "bias"))
    of_labels = (x @ weight.T + bias)[rows, labels[rows]]
    of_labels.backward(grad.double().abs()[rows])
    lost = {"output": torch.ones(grad.shape, dtype=torch.float64)}
    lost |= {f"gradient of {name}": t.grad for name, t in (("x", x), ("weight", weight), ("bias", bias))}
    return {name: 2.0 * torch.finfo(torch.float32).eps * t for name, t in lost.items()}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of the vocabulary where there would be one."""
    vocabulary = pytest.importorskip("roberta_kernels.triton.vocabulary")
    monkeypatch.setattr(vocabulary, "LOGITS_AT_ONCE", 1)


@cases_on_every_backend(CASES)
def test_three_way(served: Served, case: Case, draw: Draw) -> None:
    run_case(case, draw, served.dtype)


@on_every_backend([FLOAT32, BFLOAT16], every_isa=False)
def test_several_chunks_of_the_vocabulary(served: Served, draw: Draw, small_chunks: None) -> None:
    # Rows enough that four have a label: a product of fewer is summed in another order by torch, which the original,
    # with all rows in one, does not meet.
    run_case(Case("", 24, 24, 1200), draw, served.dtype)  # triton: of 512 words
    if served.backend == "cpu":  # of 8192
        run_case(Case("", 24, 24, 17000, reduction="none"), draw, served.dtype)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@on_every_backend(dtypes=[FLOAT32])
def test_three_way_random_shapes(served: Served, data: st.DataObject) -> None:
    case = Case(
        "random",
        rows=data.draw(st.integers(1, 12 if served.interpreted else 60), "rows"),
        hidden=data.draw(st.integers(1, 200), "hidden"),
        words=data.draw(st.integers(2, 700), "words"),
        bias=data.draw(st.booleans(), "bias"),
        ignored=data.draw(st.sampled_from([0.0, 0.5, 0.9]), "ignored"),
        reduction=data.draw(st.sampled_from(["sum", "none"]), "reduction"),
        layout=data.draw(st.sampled_from(["contiguous", "rows", "columns", "transposed"]), "layout"),
    )
    run_case(case, Draw(data.draw(st.integers(0, 2**32 - 1), "seed"), served.device), served.dtype)


@on_every_backend(every_isa=False)
def test_the_loss_is_float32(served: Served, draw: Draw) -> None:
    inputs, rest, _ = draw_inputs(Case("", 9, 24, 37), draw, served.dtype)
    for reduction in ("mean", "sum", "none"):
        loss = ops.linear_cross_entropy(**inputs, **{**rest, "reduction": reduction})
        assert loss.dtype == FLOAT32
        assert loss.shape == ((9,) if reduction == "none" else ())


@pytest.mark.parametrize("rows", [0, 5])
@on_every_backend()
def test_rows_that_all_are_ignored(served: Served, rows: int, draw: Draw) -> None:
    """As torch: the mean is nan, the sum zero, all gradients zero."""
    inputs, rest, _ = draw_inputs(Case("", rows, 24, 37), draw, served.dtype)
    rest["labels"].fill_(-100)
    for reduction in ("mean", "sum", "none"):
        with uninitialised_is_nan(*inputs.values()):
            leaves = {name: leaf(t) for name, t in inputs.items()}
            loss = ops.linear_cross_entropy(**leaves, **{**rest, "reduction": reduction})
            gradients = torch.autograd.grad(loss.sum(), list(leaves.values()))
        want = eager.linear_cross_entropy(**inputs, **{**rest, "reduction": reduction})
        torch.testing.assert_close(loss, want.float(), equal_nan=True)
        assert not any(gradient.any() for gradient in gradients)


@on_every_backend(dtypes=[FLOAT32])
def test_ignored_rows_are_not_read(served: Served, draw: Draw) -> None:
    """Nothing of them is in the loss or a gradient; their own gradient is zero."""
    inputs, rest, grad = draw_inputs(Case("", 9, 24, 37, reduction="none"), draw, served.dtype)
    ignored = rest["labels"] == -100
    assert ignored.any()
    assert not ignored.all()
    clean = output_and_gradients(lambda **t: ops.linear_cross_entropy(**t, **rest), inputs, grad)
    inputs["x"] = inputs["x"].masked_fill(ignored[:, None], float("nan"))
    dirty = output_and_gradients(lambda **t: ops.linear_cross_entropy(**t, **rest), inputs, grad)
    assert not clean["output"][ignored].any()
    assert not clean["gradient of x"][ignored].any()
    for name, t in clean.items():
        assert torch.equal(t, dirty[name]), name


@on_every_backend(dtypes=[FLOAT32], every_isa=False)
def test_the_kernels_give_zeros_at_ignored_rows(served: Served, draw: Draw) -> None:
    """A traced graph, which does not look at labels, hands them all."""
    inputs, rest, _ = draw_inputs(Case("", 9, 24, 37), draw, served.dtype)
    kernels, ignored = served.kernels(), rest["labels"] == -100
    given = (inputs["x"], inputs["weight"], inputs["bias"], rest["labels"])
    with uninitialised_is_nan(*inputs.values()):
        loss, statistics = kernels.linear_cross_entropy_forward(*given, -100)
        grads = kernels.linear_cross_entropy_backward(torch.ones_like(loss), *given, statistics, -100, True)
    assert not loss[ignored].any()
    assert not grads[0][ignored].any()
    kept = [t[~ignored] for t in (inputs["x"], rest["labels"])]
    leaves = [leaf(t) for t in (kept[0], inputs["weight"], inputs["bias"])]
    total = ops.linear_cross_entropy(leaves[0], leaves[1], kept[1], leaves[2], reduction="sum")
    torch.testing.assert_close(loss.sum(), total.detach())
    for got, want in zip((grads[0][~ignored], *grads[1:]), torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(got, want)


@on_every_backend(dtypes=[FLOAT32], every_isa=False)
def test_a_frozen_weight_has_no_gradient_and_none_is_made(served: Served, draw: Draw) -> None:
    inputs, rest, _ = draw_inputs(Case("", 9, 24, 37), draw, served.dtype)
    given = (inputs["x"], inputs["weight"], inputs["bias"], rest["labels"])
    kernels = served.kernels()
    loss, statistics = kernels.linear_cross_entropy_forward(*given, -100)
    every = kernels.linear_cross_entropy_backward(torch.ones_like(loss), *given, statistics, -100, True)
    some = kernels.linear_cross_entropy_backward(torch.ones_like(loss), *given, statistics, -100, False)
    assert some[1].shape == (0,)
    assert torch.equal(some[0], every[0])
    assert torch.equal(some[2], every[2])
    x = leaf(inputs["x"])
    ops.linear_cross_entropy(x, inputs["weight"], rest["labels"], inputs["bias"]).backward()
    assert x.grad is not None


@on_every_backend(dtypes=[FLOAT32])
def test_a_weight_that_is_an_embedding_too(served: Served, draw: Draw) -> None:
    """Tied, as in a masked language model: its gradient is the sum of both."""
    weight, ids = draw.normal(37, 24, dtype=FLOAT32), draw.integers(0, 37, 9)
    labels = draw.integers(0, 37, 9)

    def loss(weight: Tensor, ours: bool) -> Tensor:
        x = F.embedding(ids, weight).tanh()
        function = ops.linear_cross_entropy if ours else eager.linear_cross_entropy
        return function(x, weight, labels=labels)

    check_three_way(
        lambda weight: loss(weight, True),
        lambda weight: loss(weight, False),
        {"weight": weight},
        torch.ones((), device=served.device),
    )


@pytest.mark.parametrize("label", [37, -1, 10**9, -(2**40)])
@on_every_backend(dtypes=[FLOAT32])
def test_labels_outside_of_the_vocabulary(served: Served, label: int, draw: Draw) -> None:
    """As torch on a CPU, where it can be looked at; on a GPU, and for kernels alone: nan or an error, no number."""
    inputs, rest, _ = draw_inputs(Case("", 9, 24, 37), draw, served.dtype)
    rest["labels"][4] = label
    if served.device == "cpu":
        with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
            ops.linear_cross_entropy(**inputs, **rest)
        with pytest.raises(IndexError, match="is out of bounds"):
            eager.linear_cross_entropy(**inputs, **rest)
    if served.device == "cuda" and served.backend == "reference":
        return  # torch's gather asserts on the device
    given = (inputs["x"], inputs["weight"], inputs["bias"], rest["labels"])
    if served.backend in ("cpu", "reference"):
        with pytest.raises(RuntimeError, match="out of bounds"):
            served.kernels().linear_cross_entropy_forward(*given, -100)
        return
    loss, _ = served.kernels().linear_cross_entropy_forward(*given, -100)
    assert loss[4].isnan()
    assert not loss[:4].isnan().any()


def test_gradients_by_finite_differences(draw: Draw) -> None:
    """Each reduction, with ignored rows and a bias."""
    with backends.backend("reference"):
        for reduction in ("mean", "sum", "none"):
            inputs, rest, _ = draw_inputs(Case("", 5, 6, 11, reduction=reduction), draw, FLOAT64)
            names = list(inputs)
            assert torch.autograd.gradcheck(
                lambda *values, _rest=rest, _names=names: ops.linear_cross_entropy(
                    **dict(zip(_names, values, strict=True)), **_rest
                ),
                [leaf(t) for t in inputs.values()],
            )


def test_logits_never_are_there_as_a_whole() -> None:
    """On a CPU: nothing of their size is asked for, in forward and backward."""
    if "cpu" not in backends.namespaces() or not backends.available_backends()["cpu"]:
        pytest.skip("no compiled kernels")
    rows, words = 600, 20_000
    draw = Draw(1, "cpu")
    x, weight = leaf(draw.normal(rows, 8, dtype=FLOAT32)), leaf(draw.normal(words, 8, dtype=FLOAT32))
    labels = draw.integers(0, words, rows)
    with (
        backends.backend("cpu"),
        torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
    ):
        ops.linear_cross_entropy(x, weight, labels).backward()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    largest = max(event.nbytes() for event in events)
    assert 0 < largest <= rows * words * 4 / 2
