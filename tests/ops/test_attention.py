"""attention in every backend: three-way against eager torch, and what must hold exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from roberta_kernels import ops

from . import eager
from .cases import (
    FLOAT32,
    Draw,
    Served,
    cases_on_every_backend,
    check_three_way,
    cumulative,
    on_every_backend,
    output_and_gradients,
    poisoned,
    score_floor,
    uninitialised_is_nan,
)

BIASED = ("triton", "cpu", "reference")  # backends that take a bias


@dataclass(frozen=True)
class Case:
    """lengths: of the sequences' queries; keys: of their keys, where they differ."""

    id: str
    lengths: tuple[int, ...]
    heads: int
    head_dim: int
    keys: tuple[int, ...] | None = None
    causal: bool = False
    mask: str | None = None  # "left", "holes", "none of some"
    dropout_p: float = 0.0
    layout: str = "contiguous"  # or "projection", views of one [T, 3, heads, head_dim]; or one of `poisoned`
    grad: str = "random"  # or "expanded": the gradient of out.sum(); or one of `poisoned`
    scale: float | None = None
    spread: float = 1.0  # of q and k: large makes the softmax sharp
    slack: int = 0  # how much longer max_seqlen is than the longest
    bias: bool = False  # on the scores
    heavy: bool = False
    only: torch.dtype | None = None

    def lengths_k(self) -> list[int]:
        return list(self.lengths if self.keys is None else self.keys)


CASES = [
    Case("one-token", (1,), 1, 16),
    Case("7", (7,), 3, 24, layout="projection"),
    Case("97", (97,), 1, 32, grad="expanded"),
    Case("257", (257,), 1, 64, layout="projection"),
    Case("257-heads12", (257,), 12, 64, layout="projection", grad="expanded", heavy=True),
    Case("heads16-d80", (1, 7, 40), 16, 80, layout="projection", heavy=True),
    Case("d80", (7, 33), 3, 80),
    Case("d128", (97, 1, 7), 1, 128, layout="columns"),
    Case("d40-odd-step", (31,), 3, 40, layout="rows", grad="columns"),
    Case("d72", (65,), 1, 72, layout="transposed", grad="transposed"),
    Case("d120", (64, 63), 1, 120),
    Case("mixed", (7, 1, 97, 3, 257, 16), 1, 32, layout="projection"),
    Case("empty-between", (0, 5, 0, 0, 9, 0), 3, 16, layout="projection"),
    Case("no-sequences", (), 3, 32),
    Case("no-tokens", (0,), 1, 64),
    Case("no-tokens-3", (0, 0, 0), 12, 64, layout="projection"),
    Case("slack", (7, 33, 2), 3, 24, slack=500, grad="expanded"),
    Case("scale", (33, 12), 3, 32, scale=0.03, grad="transposed"),
    Case("sharp", (97, 20), 1, 64, spread=6.0, only=FLOAT32),
    Case("causal", (97, 1, 7), 1, 64, causal=True, layout="projection"),
    Case("causal-257", (257,), 1, 16, causal=True, grad="expanded"),
    Case("causal-heads16", (97, 7, 64), 16, 24, causal=True, layout="projection", heavy=True),
    Case("cross", (7, 33, 1), 3, 32, keys=(97, 5, 64), layout="columns", grad="rows"),
    Case("cross-empty", (7, 0, 5, 0), 1, 24, keys=(0, 9, 3, 0)),
    Case("cross-no-keys", (7, 2), 3, 16, keys=(0, 0)),
    Case("cross-no-queries", (0, 0), 3, 16, keys=(7, 2)),
    Case("causal-more-keys", (7, 1, 33), 1, 80, keys=(97, 5, 40), causal=True),
    Case("causal-more-queries", (97, 5, 33), 1, 32, keys=(7, 1, 20), causal=True, grad="expanded"),
    Case("left-padding", (64, 64, 64), 1, 64, mask="left", layout="projection"),
    Case("left-padding-97", (97, 97), 3, 128, mask="left", heavy=True, layout="projection"),
    Case("holes", (33, 97), 3, 24, mask="holes", grad="expanded"),
    Case("sees-nothing", (20, 20, 20), 3, 32, mask="none of some", layout="projection"),
    Case("sees-nothing-causal", (20, 33), 1, 16, mask="left", causal=True),
    Case("holes-cross-causal", (20, 5), 3, 64, keys=(33, 97), mask="holes", causal=True),
    Case("dropout-0.1", (97, 7, 1), 1, 64, dropout_p=0.1, layout="projection"),
    Case("dropout-257", (257,), 3, 32, dropout_p=0.1, heavy=True, grad="expanded"),
    Case("dropout-0.5", (33, 0, 20), 3, 24, dropout_p=0.5, grad="expanded"),
    Case("dropout-0.999", (40, 33), 1, 16, dropout_p=0.999),
    Case("dropout-all", (20, 12), 3, 80, keys=(33, 64), causal=True, mask="holes", dropout_p=0.25, layout="columns"),
    Case("bias-1", (1,), 1, 16, bias=True),
    Case("bias", (97, 7, 1, 33), 3, 64, layout="projection", bias=True),
    Case("bias-heads12", (50, 129), 12, 64, layout="projection", heavy=True, bias=True),
    Case("bias-empty", (0, 5, 0), 3, 24, grad="expanded", bias=True),
    Case("bias-no-sequences", (), 3, 32, bias=True),
    Case("bias-slack", (33, 2), 1, 80, slack=70, scale=0.3, layout="columns", bias=True),
    Case("bias-negative-scale", (33, 20), 1, 32, scale=-0.2, bias=True),
    Case("bias-cross-causal", (20, 5, 97), 2, 32, keys=(33, 97, 7), causal=True, bias=True),
    Case("bias-left-padding", (70, 70, 70), 2, 40, mask="left", layout="projection", bias=True),
    Case("bias-holes", (33, 97), 2, 24, mask="holes", grad="transposed", bias=True),
    Case("bias-sees-nothing", (20, 20, 20), 3, 32, mask="none of some", bias=True),
    Case("bias-dropout-all", (33, 0, 40), 2, 64, causal=True, mask="holes", dropout_p=0.25, bias=True),
    Case("heads12-batch", (97, 7, 1, 33, 64, 12), 12, 64, layout="projection", heavy=True),
]


def key_mask_of(kind: str | None, lengths: list[int], draw: Draw) -> Tensor | None:
    if kind is None:
        return None
    pieces = []
    for b, length in enumerate(lengths):
        if kind == "left":  # padding in front: none in the first sequence, more in each that follows
            piece = torch.arange(length) >= (b * length) // (len(lengths) + 1)
        elif kind == "holes":
            piece = draw.bools(length, p=0.6).cpu()
        elif kind == "none of some":
            piece = torch.full((length,), b % 2 == 0)
        else:
            raise ValueError(kind)
        pieces.append(piece)
    return torch.cat(pieces).to(draw.device) if pieces else torch.zeros(0, dtype=torch.bool, device=draw.device)


def draw_inputs(case: Case, draw: Draw, dtype: torch.dtype) -> dict[str, Tensor]:
    total_q, total_k = sum(case.lengths), sum(case.lengths_k())
    heads, head_dim = case.heads, case.head_dim
    more = {}
    if case.bias:  # with more rows and columns than any sequence has
        longest = (max(lengths, default=0) + case.slack for lengths in (case.lengths, case.lengths_k()))
        room_q, room_k = longest
        more["bias"] = poisoned(draw.normal(heads, room_q + 2, room_k + 3, dtype=dtype), "columns")
    if case.layout == "projection":
        assert case.keys is None
        qkv = draw.normal(total_q, 3, heads, head_dim, dtype=dtype)
        qkv[:, :2] *= case.spread
        room = qkv.new_full((total_q + 5, 3, heads, head_dim), float("nan"))
        room[2:-3] = qkv
        q, k, v = room[2:-3].unbind(1)
        return {"q": q, "k": k, "v": v, **more}
    q = draw.normal(total_q, heads, head_dim, dtype=dtype, std=case.spread)
    k = draw.normal(total_k, heads, head_dim, dtype=dtype, std=case.spread)
    v = draw.normal(total_k, heads, head_dim, dtype=dtype)
    return {name: poisoned(t, case.layout) for name, t in {"q": q, "k": k, "v": v}.items()} | more


def draw_grad(kind: str, shape: torch.Size, draw: Draw, dtype: torch.dtype) -> Tensor:
    if kind == "expanded":
        return torch.ones((), dtype=dtype, device=draw.device).expand(shape)
    grad = draw.normal(*shape, dtype=dtype)
    return grad if kind == "random" else poisoned(grad, kind)


def arguments(case: Case, draw: Draw) -> tuple[dict[str, Any], dict[str, Any]]:
    """(ours, eager's) keyword arguments but for q, k and v."""
    lengths_q, lengths_k = list(case.lengths), case.lengths_k()
    shared = {
        "causal": case.causal,
        "scale": case.scale,
        "key_mask": key_mask_of(case.mask, lengths_k, draw),
        "dropout_p": case.dropout_p,
        "seed": draw.seed() if case.dropout_p else None,
    }
    ours = {
        "cu_seqlens_q": cumulative(lengths_q, draw.device),
        "max_seqlen_q": max(lengths_q, default=0) + case.slack,
        **shared,
    }
    if case.keys is not None:
        ours["cu_seqlens_k"] = cumulative(lengths_k, draw.device)
        ours["max_seqlen_k"] = max(lengths_k, default=0) + case.slack
    return ours, {"lengths_q": lengths_q, "lengths_k": lengths_k, **shared}


def cancelling(case: Case, inputs: dict[str, Tensor], grad: Tensor) -> dict[str, float]:
    """Over a single key the softmax is 1 whatever q and k, and their gradients cancel."""

    def largest(t: Tensor) -> float:
        return float(t.double().abs().max()) if t.numel() else 0.0

    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    products = scale * case.head_dim * largest(grad) * largest(inputs["v"]) / (1.0 - case.dropout_p)
    rows = max(case.lengths, default=1)
    return {
        "gradient of q": products * largest(inputs["k"]),
        "gradient of k": products * largest(inputs["q"]) * rows,
        "gradient of bias": products / scale * max(1, len(case.lengths)),
    }


def run_case(case: Case, draw: Draw, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs = draw_inputs(case, draw, dtype)
    grad = draw_grad(case.grad, inputs["q"].shape, draw, dtype)
    ours, original = arguments(case, draw)
    return check_three_way(
        lambda q, k, v, bias=None: ops.attention(q, k, v, bias=bias, **ours),
        lambda q, k, v, bias=None: eager.attention(q, k, v, bias=bias, **original),
        inputs,
        grad,
        cancelling=cancelling(case, inputs, grad),
        floor_ulps=score_floor(
            inputs["q"], inputs["k"], case.head_dim**-0.5 if case.scale is None else case.scale, inputs.get("bias")
        ),
    )


@cases_on_every_backend(CASES)
def test_three_way(served: Served, case: Case, draw: Draw) -> None:
    if case.bias and served.backend not in BIASED:
        pytest.skip("these kernels take no bias, which selection knows: test_backends.py")
    got = run_case(case, draw, served.dtype)
    assert got["output"].is_contiguous()


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@on_every_backend(dtypes=[FLOAT32])
def test_three_way_random_shapes(served: Served, data: st.DataObject) -> None:
    longest = 20 if served.interpreted else 70
    lengths = data.draw(st.lists(st.integers(0, longest), max_size=4), "lengths")
    cross = data.draw(st.booleans(), "cross")
    keys = data.draw(st.lists(st.integers(0, longest), min_size=len(lengths), max_size=len(lengths))) if cross else None
    case = Case(
        "random",
        tuple(lengths),
        heads=data.draw(st.integers(1, 2 if served.interpreted else 5), "heads"),
        head_dim=8 * data.draw(st.integers(2, 16), "head_dim / 8"),
        keys=None if keys is None else tuple(keys),
        causal=data.draw(st.booleans(), "causal"),
        mask=data.draw(st.sampled_from([None, "left", "holes", "none of some"]), "mask"),
        dropout_p=data.draw(st.sampled_from([0.0, 0.0, 0.1, 0.5]), "dropout_p"),
        layout=data.draw(st.sampled_from(["contiguous", "rows", "columns", "transposed"]), "layout"),
        grad=data.draw(st.sampled_from(["random", "expanded", "transposed"]), "grad"),
        bias=served.backend in BIASED and data.draw(st.booleans(), "bias"),
    )
    run_case(case, Draw(data.draw(st.integers(0, 2**32 - 1), "seed"), served.device), served.dtype)


@on_every_backend()
def test_log_sum_exp(served: Served, draw: Draw) -> None:
    """The second output of the op, which backward depends on: natural log, float32, -inf where no key is seen."""
    lengths_q, lengths_k = [5, 3, 4], [7, 0, 9]
    q = draw.normal(12, 3, 16, dtype=served.dtype)
    k = draw.normal(16, 3, 16, dtype=served.dtype)
    mask = torch.ones(16, dtype=torch.bool, device=served.device)
    mask[2] = False
    with uninitialised_is_nan(q):
        _, lse = served.kernels().attention_forward(
            *(q, k, k, cumulative(lengths_q, served.device), cumulative(lengths_k, served.device)),
            *(5, 9, 0.25, False, mask, 0.0, None),
        )
    assert lse.dtype == FLOAT32
    assert lse.shape == (3, 12)
    exact = torch.full((3, 12), -math.inf, dtype=torch.float64, device=served.device)
    for rows_q, rows_k in ((slice(0, 5), slice(0, 7)), (slice(8, 12), slice(7, 16))):
        scores = 0.25 * torch.einsum("qhd,khd->hqk", q[rows_q].double(), k[rows_k].double())
        exact[:, rows_q] = scores.masked_fill(~mask[rows_k], -math.inf).logsumexp(-1)
    assert torch.equal(lse.double().isinf(), exact.isinf())
    assert bool((lse[:, 5:8] == -math.inf).all())
    torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=1e-5)


@on_every_backend()
def test_a_query_that_sees_nothing_gives_zeros(served: Served, draw: Draw) -> None:
    q, k, v = (draw.normal(9, 3, 24, dtype=served.dtype) for _ in range(3))
    mask = torch.ones(9, dtype=torch.bool, device=served.device)
    mask[:4] = False  # all of the first sequence
    with uninitialised_is_nan(q):
        got = output_and_gradients(
            lambda q, k, v: ops.attention(
                q, k, v, cumulative([4, 5], served.device), max_seqlen_q=5, key_mask=mask, scale=0.3
            ),
            {"q": q, "k": k, "v": v},
            draw.normal(9, 3, 24, dtype=served.dtype),
        )
    for name, t in got.items():
        assert not t[:4].any(), name
        assert t[4:].any(-1).all(), name


@on_every_backend()
@pytest.mark.parametrize("max_seqlens", [(16, 24), (0, 0)], ids=["some", "none"])
def test_rows_that_belong_to_no_sequence(served: Served, draw: Draw, max_seqlens: tuple[int, int]) -> None:
    """Past max_seqlen, or past the last sequence: zeros, whose gradients are zeros, and the other rows as without them.
    The CPU kernels, where cu_seqlens can be read, refuse.
    """
    lengths, capacity, heads = ([5, 21, 9], [7, 30, 4]), (41, 48), 3
    ends = [cumulative(list(of), served.device) for of in lengths]
    q, grad = (draw.normal(capacity[0], heads, 32, dtype=served.dtype) for _ in range(2))
    k, v = (draw.normal(capacity[1], heads, 32, dtype=served.dtype) for _ in range(2))
    rest = (0.25, False, None, 0.0, None)
    if served.backend == "cpu":
        with pytest.raises(RuntimeError, match="cu_seqlens"):
            served.kernels().attention_forward(q, k, v, *ends, *max_seqlens, *rest)
        return
    kept_lengths = [[min(n, most) for n in of] for of, most in zip(lengths, max_seqlens, strict=True)]
    kept = [
        torch.cat([torch.arange(start, start + n) for start, n in zip(of.tolist(), kept_of, strict=False)]).to(q.device)
        for of, kept_of in zip(ends, kept_lengths, strict=True)
    ]

    def run(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, ends: list[Tensor]) -> list[Tensor]:
        with uninitialised_is_nan(q, k):
            out, lse = served.kernels().attention_forward(q, k, v, *ends, *max_seqlens, *rest)
            grads = served.kernels().attention_backward(grad, q, k, v, out, lse, *ends, *max_seqlens, *rest)
        return [out, lse.transpose(0, 1), *grads[:3]]  # and of a bias, of which there is none

    got = run(q, k, v, grad, ends)
    alone = run(*(t[kept[i]] for t, i in ((q, 0), (k, 1), (v, 1), (grad, 0))), [
        cumulative(list(of), served.device) for of in kept_lengths
    ])  # fmt: skip
    for i, (ours, expected) in enumerate(zip(got, alone, strict=True)):
        rows = kept[1 if i > 2 else 0]
        torch.testing.assert_close(ours[rows], expected, rtol=1e-6, atol=1e-6)
        others = torch.ones(ours.shape[0], dtype=torch.bool, device=q.device)
        others[rows] = False
        assert (ours[others] == (-math.inf if i == 1 else 0.0)).all()


@on_every_backend()
def test_sequences_do_not_see_each_other(served: Served, draw: Draw) -> None:
    """A sequence alone, and the same one between others, of which one is all nan: bitwise the same."""
    inputs = {name: draw.normal(20, 3, 16, dtype=served.dtype) for name in "qkv"}
    grad = draw.normal(20, 3, 16, dtype=served.dtype)
    poison = {name: t.clone() for name, t in inputs.items()}
    for t in poison.values():
        t[:6] = float("nan")
    grad_poison = grad.clone()
    grad_poison[:6] = float("nan")

    def run(tensors: dict[str, Tensor], grad_out: Tensor, lengths: list[int]) -> dict[str, Tensor]:
        cu_seqlens = cumulative(lengths, served.device)
        return output_and_gradients(
            lambda q, k, v: ops.attention(q, k, v, cu_seqlens, max_seqlen_q=11), tensors, grad_out
        )

    together = run(poison, grad_poison, [6, 11, 3])
    alone = run({name: t[6:17].clone() for name, t in inputs.items()}, grad[6:17].clone(), [11])
    for name, t in together.items():
        assert t[:6].isnan().all(), name
        assert torch.equal(t[6:17], alone[name]), name


@on_every_backend()
def test_masked_keys_play_no_part(served: Served, draw: Draw) -> None:
    """With the last keys of each sequence masked the answer is that of the shorter sequences."""
    q, k, v = (draw.normal(24, 3, 32, dtype=served.dtype) for _ in range(3))
    mask = torch.ones(24, dtype=torch.bool, device=served.device)
    mask[9:12] = mask[22:24] = False
    masked = ops.attention(q, k, v, cumulative([12, 12], served.device), max_seqlen_q=12, key_mask=mask)
    short = ops.attention(
        *(q, k[mask], v[mask], cumulative([12, 12], served.device), cumulative([9, 10], served.device)),
        max_seqlen_q=12,
        max_seqlen_k=10,
    )
    torch.testing.assert_close(masked, short, rtol=0, atol=16 * torch.finfo(served.dtype).eps)


@on_every_backend(dtypes=[FLOAT32])
def test_cu_seqlens_k_given_or_not(served: Served, draw: Draw) -> None:
    q, k, v = (draw.normal(12, 3, 16, dtype=served.dtype) for _ in range(3))
    cu_seqlens = cumulative([5, 7], served.device)
    first = ops.attention(q, k, v, cu_seqlens, max_seqlen_q=7)
    second = ops.attention(q, k, v, cu_seqlens, cu_seqlens.clone(), max_seqlen_q=7, max_seqlen_k=7)
    assert torch.equal(first, second)


@on_every_backend()
def test_huge_scores_do_not_overflow(served: Served, draw: Draw) -> None:
    """The softmax is taken from its maximum: scores of +-10000 are one-hot rows, not nan."""
    eye = torch.eye(16, dtype=served.dtype, device=served.device)[:, None, :]
    v = draw.normal(16, 1, 16, dtype=served.dtype)
    for scale in (1e4, -1e4):
        got = output_and_gradients(
            lambda q, k, v, scale=scale: ops.attention(
                q, k, v, cumulative([16], served.device), max_seqlen_q=16, scale=scale
            ),
            {"q": eye, "k": eye.clone(), "v": v},
            torch.ones_like(v),
        )
        for name, t in got.items():
            assert t.isfinite().all(), name
        if scale > 0:
            assert torch.equal(got["output"], v)


@on_every_backend(dtypes=[FLOAT32])
def test_the_op_itself_with_head_dim_strided(served: Served, draw: Draw) -> None:
    """The public function copies such views. The op below it may refuse them, or take them, but never misread them."""
    kernels = served.kernels()
    q, k, v = (poisoned(draw.normal(12, 3, 16, dtype=served.dtype), "transposed") for _ in range(3))
    assert q.stride(2) != 1
    rest = (cumulative([5, 7], served.device), cumulative([5, 7], served.device), 7, 7, 0.25, False, None, 0.0, None)
    expected = kernels.attention_forward(q.contiguous(), k.contiguous(), v.contiguous(), *rest)[0]
    try:
        got = kernels.attention_forward(q, k, v, *rest)[0]
    except (RuntimeError, ValueError):
        return
    torch.testing.assert_close(got, expected)


@pytest.mark.full
@on_every_backend(dtypes=[FLOAT32])
def test_long_sequences(served: Served, draw: Draw) -> None:
    if served.interpreted:
        pytest.skip("2048 keys take minutes in Triton's interpreter")
    run_case(Case("long", (2048, 513), 2, 64, layout="projection"), draw, served.dtype)
