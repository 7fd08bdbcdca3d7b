"""What the public ops refuse, and what they promise for every backend: which ids, which nan, which bits.

A refusal is an exception of a fitting kind whose message names the argument.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from roberta_kernels import backends, ops

from .cases import FLOAT32, FLOAT64, Draw, Served, cumulative, leaf, on_every_backend, output_and_gradients
from .samples import OPS, Sample, sample

each_op = pytest.mark.parametrize("op", OPS)


@dataclass(frozen=True)
class Refused:
    """One bad argument: `change(arguments)` makes a good call bad."""

    op: str
    id: str
    change: Callable[[dict[str, Any]], dict[str, Any]]
    error: type[Exception] | tuple[type[Exception], ...]
    names: str


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda arguments: {**arguments, name: change(arguments.get(name))}


def given(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda arguments: {**arguments, **values}


def ends(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def head_dim(size: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda arguments: {**arguments, **{name: torch.zeros(9, 2, size) for name in "qkv"}}


def bad_tensors(op: str, names: str, first: str) -> list[Refused]:
    """What no tensor argument may be: of another dtype, on another device, of another size or rank.

    first: the argument that the others are measured by.
    """
    cases = []
    for name in names.split():
        if name != first:
            cases += [
                Refused(op, f"{name}-dtype", changed(name, lambda t: t.to(FLOAT64)), TypeError, name),
                Refused(op, f"{name}-device", changed(name, lambda t: t.to("meta")), ValueError, name),
            ]
        cases += [
            Refused(op, f"{name}-rank", changed(name, lambda t: t[None]), ValueError, name),
            Refused(
                op,
                f"{name}-size",
                changed(name, lambda t: torch.cat([t, t], dim=-1)),
                ValueError,
                # All others are measured by the first, so that a wrong size there is found in the next.
                name if name != first else "must have shape|head_dim|expected",
            ),
        ]
    return cases


def bad_dropout(op: str) -> list[Refused]:
    return [
        Refused(op, "dropout_p-1", given(dropout_p=1.0), ValueError, "dropout_p"),
        Refused(op, "dropout_p-2", given(dropout_p=2.0), ValueError, "dropout_p"),
        Refused(op, "dropout_p-negative", given(dropout_p=-0.1), ValueError, "dropout_p"),
        Refused(op, "dropout_p-nan", given(dropout_p=float("nan")), ValueError, "dropout_p"),
        Refused(op, "seed-missing", given(dropout_p=0.1, seed=None), ValueError, "seed"),
        Refused(op, "seed-int32", given(dropout_p=0.1, seed=torch.zeros(1, dtype=torch.int32)), TypeError, "seed"),
        Refused(op, "seed-float", given(dropout_p=0.1, seed=torch.zeros(1)), TypeError, "seed"),
        Refused(op, "seed-two", given(dropout_p=0.1, seed=torch.zeros(2, dtype=torch.int64)), TypeError, "seed"),
        Refused(
            op,
            "seed-device",
            given(dropout_p=0.1, seed=torch.zeros(1, dtype=torch.int64, device="meta")),
            ValueError,
            "seed",
        ),
    ]


def as_dtype(*names: str, dtype: torch.dtype) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda arguments: {**arguments, **{name: arguments[name].to(dtype) for name in names}}


IDS = ("input_ids", "position_ids", "token_type_ids")
REFUSED = [
    # attention: 9 tokens in sequences of 3 and 6, 2 heads, head dim 16
    *bad_tensors("attention", "q k v", "q"),
    *bad_dropout("attention"),
    Refused("attention", "q-integer", as_dtype("q", "k", "v", dtype=torch.int64), TypeError, "q must be"),
    Refused("attention", "q-complex", as_dtype("q", "k", "v", dtype=torch.complex64), TypeError, "q must be"),
    *(Refused("attention", f"head_dim-{d}", head_dim(d), ValueError, "head_dim") for d in (8, 12, 20, 31, 136, 256)),
    Refused("attention", "no-heads", lambda a: {**a, **{n: torch.zeros(9, 0, 16) for n in "qkv"}}, ValueError, "heads"),
    Refused(
        "attention",
        "k-longer",
        lambda a: {**a, "k": torch.zeros(10, 2, 16), "v": torch.zeros(10, 2, 16)},
        ValueError,
        "cu_seqlens_k",
    ),
    Refused("attention", "v-longer", given(v=torch.zeros(10, 2, 16)), ValueError, "v must have"),
    Refused("attention", "cu-int64", given(cu_seqlens_q=ends(0, 3, 9, dtype=torch.int64)), TypeError, "cu_seqlens_q"),
    Refused("attention", "cu-float", given(cu_seqlens_q=torch.tensor([0.0, 9.0])), TypeError, "cu_seqlens_q"),
    Refused("attention", "cu-rank", given(cu_seqlens_q=ends(0, 3, 9)[None]), ValueError, "cu_seqlens_q"),
    Refused("attention", "cu-empty", given(cu_seqlens_q=ends()), ValueError, "cu_seqlens_q"),
    Refused("attention", "cu-device", given(cu_seqlens_q=ends(0, 3, 9).to("meta")), ValueError, "cu_seqlens_q"),
    Refused("attention", "cu-starts-late", given(cu_seqlens_q=ends(1, 3, 9)), ValueError, "cu_seqlens_q must start"),
    Refused(
        "attention", "cu-starts-negative", given(cu_seqlens_q=ends(-1, 3, 9)), ValueError, "cu_seqlens_q must start"
    ),
    Refused("attention", "cu-falls", given(cu_seqlens_q=ends(0, 6, 3, 9)), ValueError, "cu_seqlens_q falls"),
    Refused("attention", "cu-short", given(cu_seqlens_q=ends(0, 3, 8)), ValueError, "cu_seqlens_q must end"),
    Refused("attention", "cu-long", given(cu_seqlens_q=ends(0, 3, 10)), ValueError, "cu_seqlens_q must end"),
    Refused("attention", "cu-none-of-9", given(cu_seqlens_q=ends(0)), ValueError, "cu_seqlens_q must end"),
    Refused("attention", "max-small", given(max_seqlen_q=5), ValueError, "max_seqlen"),
    Refused("attention", "max-zero", given(max_seqlen_q=0), ValueError, "max_seqlen"),
    Refused("attention", "k-max-missing", given(cu_seqlens_k=ends(0, 3, 9)), ValueError, "max_seqlen_k"),
    Refused("attention", "k-max-small", given(cu_seqlens_k=ends(0, 3, 9), max_seqlen_k=5), ValueError, "cu_seqlens_k"),
    Refused(
        "attention",
        "k-more-sequences",
        given(cu_seqlens_k=ends(0, 3, 4, 9), max_seqlen_k=9),
        ValueError,
        "cu_seqlens_k",
    ),
    Refused(
        "attention", "k-falls", given(cu_seqlens_k=ends(0, 10, 9), max_seqlen_k=99), ValueError, "cu_seqlens_k falls"
    ),
    Refused("attention", "bias-rank", given(bias=torch.zeros(6, 6)), ValueError, "bias"),
    Refused("attention", "bias-heads", given(bias=torch.zeros(1, 6, 6)), ValueError, "bias"),
    Refused("attention", "bias-few-queries", given(bias=torch.zeros(2, 5, 6)), ValueError, "bias"),
    Refused("attention", "bias-few-keys", given(bias=torch.zeros(2, 6, 5)), ValueError, "bias"),
    Refused("attention", "bias-dtype", given(bias=torch.zeros(2, 6, 6, dtype=FLOAT64)), TypeError, "bias"),
    Refused("attention", "bias-device", given(bias=torch.zeros(2, 6, 6, device="meta")), ValueError, "bias"),
    Refused("attention", "mask-int", given(key_mask=torch.ones(9, dtype=torch.int64)), TypeError, "key_mask"),
    Refused("attention", "mask-float", given(key_mask=torch.zeros(9)), TypeError, "key_mask"),
    Refused("attention", "mask-size", given(key_mask=torch.ones(8, dtype=torch.bool)), ValueError, "key_mask"),
    Refused("attention", "mask-rank", given(key_mask=torch.ones(9, 9, dtype=torch.bool)), ValueError, "key_mask"),
    Refused(
        "attention",
        "mask-device",
        given(key_mask=torch.ones(9, dtype=torch.bool, device="meta")),
        ValueError,
        "key_mask",
    ),
    # add_layer_norm: 9 tokens, hidden size 24
    *bad_tensors("add_layer_norm", "x residual weight bias x_bias", "x"),
    *bad_dropout("add_layer_norm"),
    Refused(
        "add_layer_norm",
        "integers",
        as_dtype("x", "residual", "weight", "bias", "x_bias", dtype=torch.int32),
        TypeError,
        "x must be",
    ),
    Refused("add_layer_norm", "residual-broadcast", changed("residual", lambda t: t[:1]), ValueError, "residual"),
    Refused("add_layer_norm", "x_bias-scalar", changed("x_bias", lambda t: t[0]), ValueError, "x_bias"),
    Refused("add_layer_norm", "no-hidden", given(x=torch.zeros(9, 0)), ValueError, "x must have shape"),
    # gelu_ffn: 9 tokens, 16 -> 24 -> 17
    *bad_tensors("gelu_ffn", "x w_in b_in w_out b_out", "x"),
    Refused(
        "gelu_ffn",
        "integers",
        as_dtype("x", "w_in", "b_in", "w_out", "b_out", dtype=torch.int32),
        TypeError,
        "x must be",
    ),
    Refused("gelu_ffn", "w_in-transposed", changed("w_in", lambda t: t.t()), ValueError, "w_in"),
    Refused("gelu_ffn", "w_out-transposed", changed("w_out", lambda t: t.t()), ValueError, "w_out"),
    Refused("gelu_ffn", "w_in-empty", changed("w_in", lambda t: t[:0]), ValueError, "w_in"),
    Refused("gelu_ffn", "approximate", given(approximate="erf"), ValueError, "approximate"),
    Refused("gelu_ffn", "approximate-none", given(approximate=None), ValueError, "approximate"),
    # embedding_layer_norm: 9 tokens; tables of 11, 13 and 2 rows; hidden size 24
    *bad_tensors(
        "embedding_layer_norm",
        "word_embeddings position_embeddings token_type_embeddings weight bias",
        "word_embeddings",
    ),
    *bad_dropout("embedding_layer_norm"),
    Refused(
        "embedding_layer_norm",
        "integers",
        as_dtype(
            "word_embeddings", "position_embeddings", "token_type_embeddings", "weight", "bias", dtype=torch.int32
        ),
        TypeError,
        "word_embeddings must be",
    ),
    *(Refused("embedding_layer_norm", f"{n}-float", changed(n, lambda t: t.float()), TypeError, n) for n in IDS),
    *(Refused("embedding_layer_norm", f"{n}-bool", changed(n, lambda t: t > 0), TypeError, n) for n in IDS),
    *(Refused("embedding_layer_norm", f"{n}-rank", changed(n, lambda t: t[None]), ValueError, n) for n in IDS),
    *(Refused("embedding_layer_norm", f"{n}-device", changed(n, lambda t: t.to("meta")), ValueError, n) for n in IDS),
    *(Refused("embedding_layer_norm", f"{n}-size", changed(n, lambda t: t[1:]), ValueError, n) for n in IDS[1:]),
    *(
        Refused("embedding_layer_norm", f"{n}-{row}", given(**{n: row}), ValueError, n)
        for n, row in (
            ("word_padding_idx", -1),
            ("word_padding_idx", 11),
            ("position_padding_idx", -2),
            ("position_padding_idx", 13),
        )
    ),
    # linear_cross_entropy: 9 rows of 24, 37 words
    *bad_tensors("linear_cross_entropy", "x weight bias", "x"),
    Refused(
        "linear_cross_entropy", "integers", as_dtype("x", "weight", "bias", dtype=torch.int32), TypeError, "x must be"
    ),
    Refused("linear_cross_entropy", "weight-transposed", changed("weight", lambda t: t.t()), ValueError, "weight"),
    Refused("linear_cross_entropy", "no-words", changed("weight", lambda t: t[:0]), ValueError, "weight"),
    Refused("linear_cross_entropy", "labels-float", changed("labels", lambda t: t.float()), TypeError, "labels"),
    Refused("linear_cross_entropy", "labels-int32", changed("labels", lambda t: t.int()), TypeError, "labels"),
    Refused("linear_cross_entropy", "labels-rank", changed("labels", lambda t: t[None]), ValueError, "labels"),
    Refused("linear_cross_entropy", "labels-size", changed("labels", lambda t: t[1:]), ValueError, "labels"),
    Refused("linear_cross_entropy", "labels-device", changed("labels", lambda t: t.to("meta")), ValueError, "labels"),
    Refused("linear_cross_entropy", "reduction", given(reduction="max"), ValueError, "reduction"),
    # linear_log1p_max: 9 rows of 24 in sequences of 3, 0 and 6, 37 words
    *bad_tensors("linear_log1p_max", "x weight bias", "x"),
    Refused("linear_log1p_max", "integers", as_dtype("x", "weight", "bias", dtype=torch.int32), TypeError, "x must be"),
    Refused("linear_log1p_max", "no-words", changed("weight", lambda t: t[:0]), ValueError, "weight"),
    Refused("linear_log1p_max", "cu_seqlens-int64", given(cu_seqlens=ends(0, 9, dtype=torch.int64)), TypeError, "cu_"),
    Refused("linear_log1p_max", "cu_seqlens-start", given(cu_seqlens=ends(1, 9)), ValueError, "cu_seqlens must start"),
    Refused("linear_log1p_max", "cu_seqlens-end", given(cu_seqlens=ends(0, 8)), ValueError, "cu_seqlens must end"),
    Refused("linear_log1p_max", "cu_seqlens-falls", given(cu_seqlens=ends(0, 5, 4, 9)), ValueError, "cu_seqlens falls"),
]


def good_arguments(op: str) -> dict[str, Any]:
    call = sample(op, Draw(1, "cpu"), FLOAT32, every_option=op != "attention")
    return {**call.tensors, **call.rest}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: f"{case.op}-{case.id}")
def test_refused(case: Refused) -> None:
    """Also where no gradient is asked for, which is another path."""
    arguments = case.change(good_arguments(case.op))
    function = getattr(ops, case.op)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), pytest.raises(case.error, match=case.names):
            function(**arguments)


@each_op
def test_the_good_arguments_are_good(op: str) -> None:
    """Else the refusals above would prove nothing."""
    assert getattr(ops, op)(**good_arguments(op)).isfinite().all()


@pytest.mark.parametrize("row", [-1, -(10**9), "rows", 10**9, 2**40])
@pytest.mark.parametrize("name", IDS)
@on_every_backend(dtypes=[FLOAT32])
def test_ids_outside_of_their_table(served: Served, name: str, row: Any, draw: Draw) -> None:
    """IndexError on the CPU, as the original gives; whichever token holds the id."""
    if served.device == "cuda" or served.backend in ("cuda", "triton"):
        pytest.skip(
            "a GPU kernel gives a device-side assertion or an undefined row: a check would cost a synchronisation"
        )
    call = sample("embedding_layer_norm", draw, served.dtype, every_option=True)
    rows = {"input_ids": 11, "position_ids": 13, "token_type_ids": 2}[name]
    for place in (0, 4, 8):
        bad = call.rest[name].clone()
        bad[place] = rows if row == "rows" else row
        with pytest.raises(IndexError, match="out of range"):
            Sample(call.function, call.tensors, {**call.rest, name: bad})()
    call()  # and nothing is left broken


# -------------------------------------------------------------------------------------------------- nan and infinity


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@each_op
@on_every_backend()
def test_nan_and_infinity_propagate(served: Served, op: str, value: float, draw: Draw) -> None:
    """Where the same op in float64 is not finite, neither is ours, and elsewhere it is; what is nan there is nan here.

    One bad value in each input in turn. (Where the one is infinite the other may be nan: torch's own GELU of an
    infinity is one or the other, by dtype.)
    """
    call = sample(op, draw, served.dtype)
    for name, t in call.tensors.items():
        bad = t.clone()
        bad[(1,) if bad.dim() == 1 else (1, *(0,) * (bad.dim() - 1))] = value
        got = call(**{name: bad})
        with backends.backend("reference"):
            double = {key: tensor.double() for key, tensor in {**call.tensors, name: bad}.items()}
            exact = call(**double)
        assert torch.equal(got.isfinite(), exact.isfinite()), name
        assert bool((got.isnan() | ~exact.isnan()).all()), name


@on_every_backend()
def test_nan_in_one_row_of_an_ffn_weight(served: Served, draw: Draw) -> None:
    """nan passes through GELU: its output is nan, never a saturated number."""
    call = sample("gelu_ffn", draw, served.dtype)
    for approximate in ("none", "tanh"):
        call.rest["approximate"] = approximate
        b_in = call.tensors["b_in"].clone()
        b_in[3] = float("nan")
        assert call(b_in=b_in).isnan().all()
        b_out = call.tensors["w_out"][:, 0].clone()
        b_out[2] = float("nan")
        assert torch.equal(call(b_out=b_out).isnan().any(0), b_out.isnan())


# ------------------------------------------------------------------------------------------------------ which bits


def everything(call: Sample, grad: Tensor) -> dict[str, Tensor]:
    return output_and_gradients(call, call.tensors, grad)


def larger(op: str, served: Served, draw: Draw) -> Sample:
    """Enough tokens that a kernel has more than one block, or thread, of work."""
    return sample(op, draw, served.dtype, tokens=20 if served.interpreted else 301, every_option=True)


@each_op
@on_every_backend()
def test_repeatable_bit_for_bit(served: Served, op: str, draw: Draw) -> None:
    call = larger(op, served, draw)
    grad = draw.normal(*call().shape, dtype=served.dtype)
    first = everything(call, grad)
    for _ in range(2 if served.interpreted else 4):
        copies = Sample(call.function, {name: t.clone() for name, t in call.tensors.items()}, call.rest)
        again = everything(copies, grad.clone())
        for name, t in first.items():
            assert torch.equal(again[name], t), name


@each_op
@on_every_backend()
def test_independent_of_the_thread_count(served: Served, op: str, draw: Draw) -> None:
    if served.backend != "cpu":
        pytest.skip("threads are the cpu kernels' affair")
    call = larger(op, served, draw)
    grad = draw.normal(*call().shape, dtype=served.dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(everything(call, grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, t in results[0].items():
            assert torch.equal(other[name], t), name


@each_op
@on_every_backend(dtypes=[FLOAT32])
def test_strides_do_not_change_the_answer(served: Served, op: str, draw: Draw) -> None:
    """Whatever the strides of an input or of the output's gradient, the numbers are those of its contiguous copy."""
    call = sample(op, draw, served.dtype, every_option=True)
    grad = draw.normal(*call().shape, dtype=served.dtype)
    expected = everything(call, grad)
    strided = {}
    for name, t in call.tensors.items():
        room = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype, device=t.device)
        room[..., ::2] = t
        strided[name] = room[..., ::2]
    if grad.dim() < 2:
        grad_view = torch.stack([grad, torch.full_like(grad, float("nan"))], -1)[..., 0]
    else:
        flipped = grad.flip(0).flip(0).t() if grad.dim() == 2 else grad.transpose(0, 1)
        grad_view = flipped.contiguous().transpose(0, 1)
    got = everything(Sample(call.function, strided, call.rest), grad_view)
    for name, t in expected.items():
        assert torch.equal(got[name], t), name


@each_op
@on_every_backend()
def test_the_sum_of_the_output_can_be_differentiated(served: Served, op: str, draw: Draw) -> None:
    """out.sum().backward(): the gradient is one number, expanded to the output's shape with strides of zero."""
    call = sample(op, draw, served.dtype, every_option=True)
    leaves = {name: leaf(t) for name, t in call.tensors.items()}
    out = call(**leaves)
    out.sum().backward()
    expected = everything(call, torch.ones_like(out))
    for name, t in leaves.items():
        assert t.grad is not None, name
        assert torch.equal(t.grad, expected[f"gradient of {name}"]), name


@on_every_backend(dtypes=[FLOAT32])
def test_many_sequences(served: Served, draw: Draw) -> None:
    """Each gets its own answer: 300 sequences of 0 to 3 tokens against one at a time."""
    lengths = draw.integers(0, 4, 12 if served.interpreted else 300).tolist()
    total = sum(lengths)
    q, k, v = (draw.normal(total, 2, 16, dtype=served.dtype) for _ in range(3))
    together = ops.attention(q, k, v, cumulative(lengths, served.device), max_seqlen_q=3)
    start = 0
    for length in lengths:
        rows = slice(start, start := start + length)
        alone = ops.attention(q[rows], k[rows], v[rows], cumulative([length], served.device), max_seqlen_q=3)
        assert torch.equal(together[rows], alone)
