"""embedding_layer_norm in every backend: three-way against eager torch, and what must hold exactly."""

from __future__ import annotations

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
    on_every_backend,
    output_and_gradients,
    poisoned,
    uninitialised_is_nan,
)


@dataclass(frozen=True)
class Case:
    id: str
    tokens: int
    hidden: int
    vocabulary: int = 50
    positions: int = 40
    types: int = 2
    type_ids: bool = True  # False: None is passed
    padding: tuple[int | None, int | None] = (None, None)  # of the word and the position table
    dropout_p: float = 0.0
    layout: str = "contiguous"  # of the tables: one of `poisoned`
    grad: str = "random"  # or "expanded": the gradient of out.sum(); or one of `poisoned`
    repeat: bool = False  # every token has the same ids: all gradients meet in one row
    heavy: bool = False
    only: torch.dtype | None = None


CASES = [
    Case("1x32", 1, 32),
    Case("1x768", 1, 768, type_ids=False, padding=(1, 1)),
    Case("7x48", 7, 48, layout="columns", padding=(1, 1)),
    Case("7x1000", 7, 1000, grad="expanded", vocabulary=9),
    Case("97x32", 97, 32, types=1, layout="rows", grad="transposed"),
    Case("97x768", 97, 768, padding=(0, 0), grad="columns", heavy=True),
    Case("97x1000", 97, 1000, type_ids=False, layout="columns", heavy=True),
    Case("257x48", 257, 48, types=5, padding=(1, 1), layout="transposed"),
    Case("257x768", 257, 768, vocabulary=500, positions=300, heavy=True),
    Case("257x1024", 257, 1024, vocabulary=1000, type_ids=False, grad="expanded", heavy=True),
    Case("3x1024", 3, 1024, type_ids=False),
    Case("6x17", 6, 17, padding=(3, None)),
    Case("6x5", 6, 5, padding=(None, 3), vocabulary=7, positions=5),
    Case("0x768", 0, 768, padding=(1, 1)),
    Case("0x32-dropout", 0, 32, type_ids=False, dropout_p=0.5),
    Case("one-word", 33, 48, repeat=True),
    Case("one-word-257", 257, 32, repeat=True, type_ids=False, grad="expanded"),
    Case("one-word-700", 700, 16, repeat=True),  # a run of more pieces than warps that join them
    Case("66000-words", 33, 16, vocabulary=66000),  # of which 16 bits cannot number the rows
    Case("one-row-tables", 20, 48, vocabulary=1, positions=1, types=1),
    Case("all-padding", 12, 32, vocabulary=1, positions=1, types=1, padding=(0, 0)),
    Case("dropout-0.1", 97, 48, dropout_p=0.1, padding=(1, 1), layout="columns"),
    Case("dropout-0.5", 7, 1000, dropout_p=0.5, type_ids=False, grad="transposed"),
    Case("dropout-0.5-257", 257, 32, dropout_p=0.5, grad="expanded"),
    Case("dropout-0.999", 33, 1024, dropout_p=0.999, padding=(1, 1), heavy=True),
    Case("dropout-odd", 5, 37, dropout_p=0.3),
]


def draw_inputs(case: Case, draw: Draw, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
    """(tables, weight and bias; ids and options; the gradient of the output)."""
    hidden = case.hidden
    rows = {"word": case.vocabulary, "position": case.positions, "token_type": case.types}
    inputs = {
        f"{table}_embeddings": poisoned(draw.normal(count, hidden, dtype=dtype), case.layout)
        for table, count in rows.items()
    }
    inputs["weight"] = draw.normal(hidden, dtype=dtype, std=0.5, mean=1.0)
    inputs["bias"] = draw.normal(hidden, dtype=dtype, std=0.5)

    def ids(count: int) -> Tensor:
        drawn = draw.integers(0, count, case.tokens)
        return drawn[:1].expand(case.tokens) if case.repeat else drawn

    rest = {
        "input_ids": ids(case.vocabulary),
        "position_ids": ids(case.positions),
        "token_type_ids": ids(case.types) if case.type_ids else None,
        "eps": 1e-5,
        "dropout_p": case.dropout_p,
        "seed": draw.seed() if case.dropout_p else None,
        "word_padding_idx": case.padding[0],
        "position_padding_idx": case.padding[1],
    }
    shape = (case.tokens, hidden)
    if case.grad == "expanded":
        return inputs, rest, torch.ones((), dtype=dtype, device=draw.device).expand(shape)
    grad = draw.normal(*shape, dtype=dtype)
    return inputs, rest, grad if case.grad == "random" else poisoned(grad, case.grad)


def run_case(case: Case, draw: Draw, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs, rest, grad = draw_inputs(case, draw, dtype)
    got = check_three_way(
        lambda **tensors: ops.embedding_layer_norm(**tensors, **rest),
        lambda **tensors: eager.embedding_layer_norm(**tensors, **rest),
        inputs,
        grad,
    )
    for table, padding_idx in (("word", case.padding[0]), ("position", case.padding[1])):
        if padding_idx is not None:
            assert not got[f"gradient of {table}_embeddings"][padding_idx].any()
    return got


@cases_on_every_backend(CASES)
def test_three_way(served: Served, case: Case, draw: Draw) -> None:
    got = run_case(case, draw, served.dtype)
    assert got["output"].is_contiguous()


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@on_every_backend(dtypes=[FLOAT32])
def test_three_way_random_shapes(served: Served, data: st.DataObject) -> None:
    rows = {name: data.draw(st.integers(1, 60), name) for name in ("vocabulary", "positions", "types")}
    case = Case(
        "random",
        tokens=data.draw(st.integers(0, 12 if served.interpreted else 70), "tokens"),
        hidden=data.draw(st.integers(3, 300 if served.interpreted else 1100), "hidden"),
        type_ids=data.draw(st.booleans(), "type_ids"),
        padding=(
            data.draw(st.one_of(st.none(), st.integers(0, rows["vocabulary"] - 1)), "word padding"),
            data.draw(st.one_of(st.none(), st.integers(0, rows["positions"] - 1)), "position padding"),
        ),
        dropout_p=data.draw(st.sampled_from([0.0, 0.1, 0.5]), "dropout_p"),
        layout=data.draw(st.sampled_from(["contiguous", "rows", "columns", "transposed"]), "layout"),
        grad=data.draw(st.sampled_from(["random", "expanded", "columns"]), "grad"),
        **rows,
    )
    run_case(case, Draw(data.draw(st.integers(0, 2**32 - 1), "seed"), served.device), served.dtype)


@on_every_backend()
def test_the_sum_of_the_rows_that_the_ids_name(served: Served) -> None:
    """Tables of distinct constants, told apart in the saved mean: no table's ids go to another."""
    word, position, token_type = (
        (torch.arange(count, device=served.device)[:, None] * step).to(served.dtype).expand(count, 32).contiguous()
        for count, step in ((5, 1), (3, 8), (2, 64))
    )
    ids = {"input_ids": [4, 0, 2, 1], "position_ids": [2, 2, 0, 1], "token_type_ids": [1, 0, 1, 0]}
    tensors = [torch.tensor(value, device=served.device) for value in ids.values()]
    weight = torch.ones(32, dtype=served.dtype, device=served.device)
    with uninitialised_is_nan(weight):
        _, mean, rstd = served.kernels().embedding_layer_norm_forward(
            *tensors, word, position, token_type, weight, weight, 4.0, -1, -1, 0.0, None
        )
    assert mean.dtype == rstd.dtype == FLOAT32
    assert mean.tolist() == [4 + 16 + 64, 16, 2 + 64, 1 + 8]
    assert rstd.tolist() == pytest.approx([0.5] * 4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@on_every_backend(dtypes=[FLOAT32])
def test_ids_of_either_width_and_any_stride(served: Served, draw: Draw, dtype: torch.dtype) -> None:
    inputs, rest, grad = draw_inputs(Case("", 9, 48, padding=(1, 1)), draw, served.dtype)
    expected = output_and_gradients(lambda **t: ops.embedding_layer_norm(**t, **rest), inputs, grad)
    for name in ("input_ids", "position_ids", "token_type_ids"):
        room = torch.full((9, 3), 10**6, dtype=dtype, device=served.device)
        room[:, 1] = rest[name]
        rest[name] = room[:, 1]
    got = output_and_gradients(lambda **t: ops.embedding_layer_norm(**t, **rest), inputs, grad)
    for name, t in expected.items():
        assert torch.equal(got[name], t), name


@on_every_backend()
def test_rows_that_no_token_names_have_no_gradient(served: Served, draw: Draw) -> None:
    inputs, rest, grad = draw_inputs(Case("", 6, 48, vocabulary=30, positions=20, types=4), draw, served.dtype)
    with uninitialised_is_nan(*inputs.values()):
        got = output_and_gradients(lambda **t: ops.embedding_layer_norm(**t, **rest), inputs, grad)
    for table, ids in (("word", "input_ids"), ("position", "position_ids"), ("token_type", "token_type_ids")):
        gradient = got[f"gradient of {table}_embeddings"]
        named = torch.zeros(len(gradient), dtype=torch.bool, device=served.device)
        named[rest[ids]] = True
        assert not gradient[~named].any(), table
        assert gradient[named].any(-1).all(), table


@on_every_backend()
def test_tokens_do_not_see_each_other(served: Served, draw: Draw) -> None:
    """A nan in the table stays with the tokens that name its row."""
    inputs, rest, _ = draw_inputs(Case("", 9, 48, vocabulary=9), draw, served.dtype)
    rest["input_ids"] = torch.arange(9, device=served.device)
    clean = ops.embedding_layer_norm(**inputs, **rest)
    inputs["word_embeddings"][5, 3] = float("nan")
    dirty = ops.embedding_layer_norm(**inputs, **rest)
    others = torch.arange(9, device=served.device) != 5
    assert dirty[5].isnan().all()
    assert torch.equal(dirty[others], clean[others])
