"""What is particular to the Triton kernels: tiles and their edges, strides, run pieces, the interpreter they are
tested in.

The op x backend matrix is in tests/ops. Here too the oracle is the reference in float64 (roberta_kernels/reference).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from ops.cases import score_floor
from torch import Tensor

from roberta_kernels import reference
from roberta_kernels.tolerance import assert_three_way

pytest.importorskip("triton.language", reason="needs triton (pip install triton)")

import triton
import triton.language as tl

from roberta_kernels.reference import philox as reference_philox
from roberta_kernels.triton import KERNELS, available
from roberta_kernels.triton.philox import keep_mask, keep_mask_transposed, threshold

if not available()[0]:
    pytest.skip(f"needs a GPU or the interpreter: {available()[1]}", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20240229)


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def seed_tensor(value: int = -81985529216486896) -> Tensor:
    return torch.tensor([value], device=DEVICE)


def exact(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.dtype in FLOATS else value


def check_op(
    op: str,
    inputs: Sequence[Any],
    backward_arguments: Callable[[tuple[Tensor, ...]], Sequence[Any]],
    names: Sequence[str],
    floor_ulps: float = 2.0,
) -> tuple[Tensor, ...]:
    """Forward and backward of an op against the reference, three ways; returns Triton's outputs and gradients."""

    def run(kernels: dict[str, Callable[..., Any]], cast: Callable[[Any], Any]) -> tuple[Tensor, ...]:
        outputs = kernels[f"{op}_forward"](*map(cast, inputs))
        return (*outputs, *kernels[f"{op}_backward"](*map(cast, backward_arguments(outputs))))

    ours = run(KERNELS, lambda value: value)
    original = run(reference.KERNELS, lambda value: value)
    oracle = run(reference.KERNELS, exact)
    for name, a, b, c in zip(names, ours, original, oracle, strict=True):
        assert a.dtype == b.dtype, name
        assert a.shape == b.shape, name
        assert a.is_contiguous(), name
        if a.numel() == 0:  # the gradient of what was not given, say
            continue
        if name in ("mean", "rstd"):  # sums that may cancel, so their own size is no measure
            torch.testing.assert_close(a.double(), c, rtol=1e-5, atol=1e-6)
        else:
            assert_three_way(a, b, c, name=name, floor_ulps=floor_ulps)
    storages = [t.untyped_storage().data_ptr() for t in (*ours, *inputs) if isinstance(t, Tensor) and t.numel() > 0]
    outputs_with_data = sum(t.numel() > 0 for t in ours)
    assert len(set(storages[:outputs_with_data])) == outputs_with_data, "outputs share memory"
    assert not set(storages[:outputs_with_data]) & set(storages[outputs_with_data:]), "an output is an input's memory"
    return ours


# Philox


@triton.jit
def words_kernel(seed_ptr, counter_ptr, out_ptr):
    seed = tl.load(seed_ptr)
    c0 = tl.load(counter_ptr + tl.arange(0, 1)).to(tl.int32)
    c1 = tl.load(counter_ptr + 1).to(tl.int32)
    c2 = tl.load(counter_ptr + 2).to(tl.int32)
    c3 = tl.load(counter_ptr + 3).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    index = tl.arange(0, 1)
    tl.store(out_ptr + index, w0.to(tl.int64))
    tl.store(out_ptr + 1 + index, w1.to(tl.int64))
    tl.store(out_ptr + 2 + index, w2.to(tl.int64))
    tl.store(out_ptr + 3 + index, w3.to(tl.int64))


@triton.jit
def mask_kernel(
    seed_ptr, out_ptr, first_row, first_column, plane, limit, ROWS: tl.constexpr, COLUMNS: tl.constexpr, T: tl.constexpr
):
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    seed = tl.load(seed_ptr)
    if T:
        keep = tl.trans(keep_mask_transposed(seed, first_row + row, first_column, plane, limit, COLUMNS))
    else:
        keep = keep_mask(seed, first_row + row, first_column, plane, limit, COLUMNS)
    tl.store(out_ptr + row[:, None] * COLUMNS + column[None, :], keep.to(tl.int32))


# Known-answer vectors of the Random123 distribution (kat_vectors, philox4x32-10): counter, key, words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    def signed(value: int, bits: int) -> int:
        return value - (1 << bits) if value >> (bits - 1) else value

    seed = seed_tensor(signed(key[0] | key[1] << 32, 64))
    counters = torch.tensor([signed(c, 32) for c in counter], device=DEVICE)
    out = torch.empty(4, dtype=torch.int64, device=DEVICE)
    words_kernel[(1,)](seed, counters, out)
    assert [w & 0xFFFFFFFF for w in out.tolist()] == list(words)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("first_row", "first_column", "plane", "dropout_p"), [(0, 0, 0, 0.1), (1000, 96, 11, 0.75)])
def test_keep_mask_is_the_references(
    first_row: int, first_column: int, plane: int, dropout_p: float, transposed: bool
) -> None:
    rows, columns = 8, 32
    out = torch.empty(rows, columns, dtype=torch.int32, device=DEVICE)
    mask_kernel[(1,)](
        seed_tensor(),
        out,
        first_row,
        first_column,
        plane,
        threshold(dropout_p),
        ROWS=rows,
        COLUMNS=columns,
        T=transposed,
    )
    expected = reference_philox.keep_mask(
        torch.arange(first_row, first_row + rows, device=DEVICE),
        first_column + columns,
        torch.tensor([plane], device=DEVICE),
        dropout_p,
        seed_tensor(),
    )[0, :, first_column:]
    assert torch.equal(out.bool(), expected)


# Attention

ATTENTION_NAMES = ("out", "lse", "grad_q", "grad_k", "grad_v", "grad_bias")


def ends(lengths: Sequence[int]) -> Tensor:
    return torch.tensor(
        [0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE
    )


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    *,
    causal: bool = False,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    grad_out: Tensor | None = None,
) -> tuple[Tensor, ...]:
    scale = q.shape[2] ** -0.5 if scale is None else scale
    rest = (
        ends(lengths_q), ends(lengths_k), max(lengths_q, default=0), max(lengths_k, default=0),
        scale, causal, key_mask, dropout_p, seed_tensor(),
    )  # fmt: skip
    grad_out = randn(*q.shape, dtype=q.dtype) if grad_out is None else grad_out
    *found, _ = check_op(
        "attention",
        (q, k, v, *rest),
        lambda outputs: (grad_out, q, k, v, outputs[0], outputs[1], *rest),
        ATTENTION_NAMES,
        score_floor(q, k, scale),
    )  # and the gradient of no bias
    return tuple(found)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "lengths", "dropout_p"),
    [
        (16, torch.float32, (5, 0, 1, 70), 0.0),
        (24, torch.bfloat16, (5, 0, 1, 70), 0.2),
        (64, torch.float16, (129,), 0.1),
        (80, torch.bfloat16, (33, 65), 0.0),
        (128, torch.float32, (17, 40), 0.3),
    ],
)
def test_attention_of_packed_projection(
    head_dim: int, dtype: torch.dtype, lengths: tuple[int, ...], dropout_p: float
) -> None:
    q, k, v = randn(sum(lengths), 3, 2, head_dim, dtype=dtype).unbind(1)
    check_attention(q, k, v, lengths, lengths, dropout_p=dropout_p)


@pytest.mark.parametrize("masked", [False, True])
def test_causal_attention_aligns_the_last_query_with_the_last_key(masked: bool) -> None:
    lengths_q, lengths_k = (3, 40, 100, 0, 7), (9, 100, 33, 5, 0)
    q = randn(sum(lengths_q), 2, 32, dtype=torch.float32)
    k, v = (randn(sum(lengths_k), 2, 32, dtype=torch.float32) for _ in range(2))
    key_mask = torch.rand(sum(lengths_k), device=DEVICE) > 0.4 if masked else None
    out, lse, *_ = check_attention(
        q, k, v, lengths_q, lengths_k, causal=True, key_mask=key_mask, dropout_p=0.1 if masked else 0.0
    )
    blind = lse == -torch.inf
    assert blind[:, 43 : 43 + 67].all()  # 100 queries, 33 keys: the first 67 see none
    assert (out.transpose(0, 1)[blind] == 0).all()


def test_attention_where_a_sequence_sees_no_key() -> None:
    lengths = (20, 70)
    q, k, v = (randn(90, 1, 16, dtype=torch.bfloat16) for _ in range(3))
    key_mask = torch.ones(90, dtype=torch.bool, device=DEVICE)
    key_mask[:20] = False
    out, lse, grad_q, grad_k, grad_v = check_attention(q, k, v, lengths, lengths, key_mask=key_mask)
    assert (lse[:, :20] == -torch.inf).all()
    for tensor in (out, grad_q, grad_k, grad_v):
        assert (tensor[:20] == 0).all()


@pytest.mark.parametrize("scale", [0.0, -0.5, 3.0])
def test_attention_scale(scale: float) -> None:
    q, k, v = (randn(70, 1, 16, dtype=torch.float32) for _ in range(3))
    check_attention(q, k, v, (70,), (70,), scale=scale)


def test_attention_strides_that_are_no_multiple_of_eight() -> None:
    q, k, v = (randn(40, 3, 19, dtype=torch.float32)[:, :2, 1:17] for _ in range(3))
    check_attention(q, k, v, (40,), (40,))


def test_attention_gradient_that_is_expanded_or_transposed() -> None:
    q, k, v = (randn(40, 2, 16, dtype=torch.float32) for _ in range(3))
    check_attention(q, k, v, (40,), (40,), grad_out=randn(1, 1, 1, dtype=torch.float32).expand(40, 2, 16))
    check_attention(q, k, v, (40,), (40,), grad_out=randn(2, 16, 40, dtype=torch.float32).permute(2, 0, 1))


@pytest.mark.parametrize(("lengths_q", "lengths_k"), [((), ()), ((0, 0), (3, 2)), ((3, 2), (0, 0)), ((1,), (1,))])
def test_attention_with_little_or_nothing(lengths_q: tuple[int, ...], lengths_k: tuple[int, ...]) -> None:
    q = randn(sum(lengths_q), 2, 16, dtype=torch.float16)
    k, v = (randn(sum(lengths_k), 2, 16, dtype=torch.float16) for _ in range(2))
    check_attention(q, k, v, lengths_q, lengths_k)


def test_attention_is_deterministic() -> None:
    q, k, v = (randn(90, 2, 16, dtype=torch.bfloat16) for _ in range(3))
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        runs.append(check_attention(q, k, v, (90,), (90,), dropout_p=0.1))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# add_layer_norm

LAYER_NORM_NAMES = ("out", "mean", "rstd", "grad_x", "grad_residual", "grad_weight", "grad_bias", "grad_x_bias")


def check_add_layer_norm(tokens: int, width: int, dtype: torch.dtype, dropout_p: float, with_bias: bool) -> None:
    x, residual, grad_out = (randn(tokens, width, dtype=dtype) for _ in range(3))
    weight, bias, x_bias = (randn(width, dtype=dtype) for _ in range(3))
    optional = x_bias if with_bias else None
    seed = seed_tensor()
    check_op(
        "add_layer_norm",
        (x, residual, weight, bias, 1e-5, optional, dropout_p, seed),
        lambda outputs: (grad_out, x, residual, weight, optional, outputs[1], outputs[2], dropout_p, seed),
        LAYER_NORM_NAMES,
    )


@pytest.mark.parametrize(
    ("tokens", "width", "dtype", "dropout_p", "with_bias"),
    [
        (0, 64, torch.float32, 0.1, True),
        (1, 16, torch.float16, 0.3, True),
        (9, 10, torch.float32, 0.5, False),
        (37, 72, torch.bfloat16, 0.1, True),
        (100, 768, torch.bfloat16, 0.0, True),
        (5, 1030, torch.float32, 0.0, False),
    ],
)
def test_add_layer_norm(tokens: int, width: int, dtype: torch.dtype, dropout_p: float, with_bias: bool) -> None:
    check_add_layer_norm(tokens, width, dtype, dropout_p, with_bias)


@pytest.mark.parametrize("width", [5000, 16384])
def test_add_layer_norm_of_rows_too_wide_for_register_sums(width: int) -> None:
    check_add_layer_norm(7, width, torch.float32, 0.1, True)


# gelu_ffn


@pytest.mark.parametrize(
    ("tokens", "hidden", "inner", "outer", "dtype", "tanh"),
    [
        (0, 16, 32, 16, torch.float32, False),
        (1, 16, 16, 16, torch.float32, True),
        (7, 24, 40, 33, torch.float32, False),
        (130, 72, 200, 64, torch.bfloat16, False),
        (70, 64, 100, 48, torch.float16, True),
        (1100, 16, 300, 16, torch.bfloat16, True),
    ],
)
def test_gelu_ffn(tokens: int, hidden: int, inner: int, outer: int, dtype: torch.dtype, tanh: bool) -> None:
    x, grad_out = randn(tokens, hidden, dtype=dtype), randn(tokens, outer, dtype=dtype)
    w_in, w_out = randn(inner, hidden, dtype=dtype) / 4, randn(outer, inner, dtype=dtype) / 16
    b_in, b_out = randn(inner, dtype=dtype), randn(outer, dtype=dtype)

    def eager(cast: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [cast(t).clone().requires_grad_() for t in (x, w_in, b_in, w_out, b_out)]
        pre = torch.nn.functional.linear(leaves[0], leaves[1], leaves[2])
        activation = torch.nn.functional.gelu(pre, approximate="tanh" if tanh else "none")
        out = torch.nn.functional.linear(activation, leaves[3], leaves[4])
        return [out.detach(), pre.detach(), *torch.autograd.grad(out, leaves, cast(grad_out))]

    out, pre = KERNELS["gelu_ffn_forward"](x, w_in, b_in, w_out, b_out, tanh, True)
    grads = KERNELS["gelu_ffn_backward"](grad_out, x, w_in, w_out, pre, tanh)
    names = ("out", "preactivation", "grad_x", "grad_w_in", "grad_b_in", "grad_w_out", "grad_b_out")
    for name, a, b, c in zip(names, (out, pre, *grads), eager(lambda t: t), eager(torch.Tensor.double), strict=True):
        assert a.dtype == dtype
        assert_three_way(a, b, c, name=name)
    unsaved, nothing = KERNELS["gelu_ffn_forward"](x, w_in, b_in, w_out, b_out, tanh, False)
    assert torch.equal(unsaved, out)
    assert nothing.shape == (0,)


@pytest.mark.parametrize("tanh", [False, True])
def test_gelu_far_from_zero(tanh: bool) -> None:
    x = torch.tensor([[-40.0, -10.0, -6.0, -1e-6, 0.0, 1e-6, 6.0, 40.0] * 2], device=DEVICE)
    identity, zeros = torch.eye(16, device=DEVICE), torch.zeros(16, device=DEVICE)
    out, pre = KERNELS["gelu_ffn_forward"](x, identity, zeros, identity, None, tanh, True)
    grad_x = KERNELS["gelu_ffn_backward"](torch.ones_like(x), x, identity, identity, pre, tanh)[0]
    leaf = x.double().requires_grad_()
    expected = torch.nn.functional.gelu(leaf, approximate="tanh" if tanh else "none")
    (expected_grad,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close(out.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad_x.double(), expected_grad, rtol=1e-6, atol=1e-6)


# embedding_layer_norm

EMBEDDING_NAMES = ("out", "mean", "rstd", "grad_word", "grad_position", "grad_token_type", "grad_weight", "grad_bias")


@pytest.mark.parametrize(
    ("tokens", "width", "words", "types", "dtype", "dropout_p"),
    [
        (0, 16, 5, 2, torch.float32, 0.1),
        (1, 16, 5, 2, torch.float32, 0.1),
        (7, 24, 40, 1, torch.float16, 0.0),
        (150, 72, 11, 2, torch.bfloat16, 0.1),
        (70, 1040, 2, 1, torch.float32, 0.0),
    ],
)
def test_embedding_layer_norm(
    tokens: int, width: int, words: int, types: int, dtype: torch.dtype, dropout_p: float
) -> None:
    input_ids = torch.randint(0, words, (tokens,), device=DEVICE)
    position_ids = torch.randint(0, 20, (tokens,), device=DEVICE)
    token_type_ids = torch.randint(0, types, (tokens,), device=DEVICE)
    tables = [randn(rows, width, dtype=dtype) for rows in (words, 33, types)]
    weight, bias = (randn(width, dtype=dtype) for _ in range(2))
    grad_out = randn(tokens, width, dtype=dtype)
    seed = seed_tensor()
    ids = (input_ids, position_ids, token_type_ids)
    results = check_op(
        "embedding_layer_norm",
        (*ids, *tables, weight, bias, 1e-5, 1, 2, dropout_p, seed),
        lambda outputs: (grad_out, *ids, *tables, weight, outputs[1], outputs[2], 1, 2, dropout_p, seed),
        EMBEDDING_NAMES,
    )
    assert (results[3][1] == 0).all()
    assert (results[4][2] == 0).all()


@pytest.mark.parametrize(
    "run_lengths", [(64, 64), (1, 63, 64), (63, 2, 63), (65,), (10, 300, 10), (1200,), (128, 1, 128)]
)
def test_table_gradients_of_runs_across_pieces(run_lengths: tuple[int, ...]) -> None:
    from roberta_kernels.triton.embedding_layer_norm import _table_gradient

    ids = torch.repeat_interleave(torch.arange(len(run_lengths)), torch.tensor(run_lengths)).to(DEVICE)
    ids = ids[torch.randperm(ids.shape[0], device=DEVICE)] + 1
    grad_z = randn(ids.shape[0], 16, dtype=torch.float32)
    table = torch.empty(len(run_lengths) + 2, 16, device=DEVICE)
    expected = torch.zeros(table.shape, dtype=torch.float64, device=DEVICE).index_add_(0, ids, grad_z.double())
    torch.testing.assert_close(_table_gradient(grad_z, ids, table, -1).double(), expected, rtol=1e-5, atol=1e-5)
    expected[1] = 0
    torch.testing.assert_close(_table_gradient(grad_z, ids, table, 1).double(), expected, rtol=1e-5, atol=1e-5)


def test_an_id_outside_of_its_table_gives_nan_and_touches_nothing() -> None:
    tables = [randn(rows, 16, dtype=torch.float32) for rows in (5, 6, 2)]
    weight = randn(16, dtype=torch.float32)
    inside = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    input_ids = torch.tensor([0, 5, -1], device=DEVICE)
    arguments = (input_ids, inside, inside, *tables, weight)
    out, mean, rstd = KERNELS["embedding_layer_norm_forward"](*arguments, weight, 1e-5, -1, -1, 0.0, None)
    assert out.isnan().all(1).tolist() == [False, True, True]
    grad_word = KERNELS["embedding_layer_norm_backward"](out.nan_to_num(), *arguments, mean, rstd, -1, -1, 0.0, None)[0]
    assert grad_word.shape == (5, 16)
    assert not grad_word.isnan().any()


# The interpreter


@triton.jit
def round_kernel(x_ptr, out_ptr, N: tl.constexpr):
    index = tl.arange(0, N)
    tl.store(out_ptr + index, tl.load(x_ptr + index).to(tl.bfloat16))


@triton.jit
def product_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    index = tl.arange(0, N)
    offset = index[:, None] * N + index[None, :]
    tl.store(out_ptr + offset, tl.dot(tl.load(a_ptr + offset), tl.load(b_ptr + offset)))


def test_bfloat16_is_rounded_to_nearest_even_and_multiplied() -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (1024,), dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32).to(DEVICE)
    out = torch.empty(1024, dtype=torch.bfloat16, device=DEVICE)
    round_kernel[(1,)](x, out, N=1024)
    assert torch.equal(out.nan_to_num(0.0), x.bfloat16().nan_to_num(0.0))
    assert torch.equal(out.isnan(), x.isnan())
    a, b = randn(16, 16, dtype=torch.bfloat16), randn(16, 16, dtype=torch.bfloat16)
    product = torch.empty(16, 16, device=DEVICE)
    product_kernel[(1,)](a, b, product, N=16)
    torch.testing.assert_close(product, a.float() @ b.float(), rtol=1e-5, atol=1e-5)
