"""Wrong input is refused as clearly as by the original, and before any kernel runs."""

from __future__ import annotations

import pytest
import torch
from model_cases import Case, build, patched

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 50, "pad_token_id": 1}


@pytest.fixture
def models():
    original = build(Case(seed=2, config=SMALL | {"type_vocab_size": 2}))
    return original, patched(original)


def ids(*shape):
    return torch.randint(6, 50, shape)


BAD = {
    "an id beyond the vocabulary": {"input_ids": torch.tensor([[2, 50]])},
    "a negative id": {"input_ids": torch.tensor([[2, -1]])},
    "a token type beyond the table": {"input_ids": ids(1, 2), "token_type_ids": torch.tensor([[0, 2]])},
    "a position beyond the table": {"input_ids": ids(1, 2), "position_ids": torch.tensor([[2, 48]])},
    "a negative position": {"input_ids": ids(1, 2), "position_ids": torch.tensor([[2, -1]])},
    "more tokens than positions": {"input_ids": ids(2, 47)},
    "neither ids nor embeddings": {"attention_mask": torch.ones(2, 3)},
    "both ids and embeddings": {"input_ids": ids(2, 3), "inputs_embeds": torch.randn(2, 3, 32)},
    "ids without a batch": {"input_ids": ids(3)},
    "ids that are no integers": {"input_ids": torch.rand(2, 3)},
    "token types of another length": {
        "input_ids": ids(2, 3),
        "token_type_ids": torch.zeros(2, 4, dtype=torch.int64),
    },
    "positions of another length": {"input_ids": ids(2, 3), "position_ids": torch.zeros(2, 4, dtype=torch.int64)},
    "a mask of another batch": {"input_ids": ids(2, 3), "attention_mask": torch.eye(3)},
    "a shorter mask": {"input_ids": ids(2, 3), "attention_mask": torch.eye(2)},
    "embeddings of another width": {"inputs_embeds": torch.randn(2, 3, 31)},
}


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("what", BAD)
def test_refused_as_by_the_original(models, what, mask):
    inputs = dict(BAD[what])
    if mask and "attention_mask" not in inputs and inputs.get("input_ids", ids(3)).dim() == 2:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    errors = (IndexError, RuntimeError, ValueError, TypeError)
    outcomes = []
    for model in models:
        try:
            with torch.no_grad():
                outcomes.append(model(**inputs).last_hidden_state)
        except errors as error:
            outcomes.append(error)
    if isinstance(outcomes[0], torch.Tensor):  # as it happens, the original makes something of it
        torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-4, atol=1e-5)
    else:
        assert str(outcomes[1])
        if isinstance(outcomes[0], IndexError):  # compiled kernels can raise nothing but RuntimeError
            assert isinstance(outcomes[1], IndexError) or "index out of range" in str(outcomes[1])


@pytest.mark.parametrize("length", [47, 60])
def test_more_tokens_than_positions(models, length):
    _, ours = models
    with pytest.raises(IndexError, match="48 position embeddings"):
        ours(input_ids=ids(2, length), attention_mask=torch.ones(2, length))


def test_as_many_tokens_as_positions(models):
    original, ours = models
    inputs = {"input_ids": ids(2, 46)}
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs)[0], original(**inputs)[0], rtol=1e-4, atol=1e-5)


def test_more_columns_than_positions_where_the_rest_is_padding(models):
    original, ours = models
    inputs = {"input_ids": torch.nn.functional.pad(ids(2, 40), (0, 30), value=1)}
    inputs["attention_mask"] = (inputs["input_ids"] != 1).long()
    with torch.no_grad():
        got, want = ours(**inputs)[0][:, :40], original(**inputs)[0][:, :40]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_longer_mask_is_as_in_the_original(models):
    inputs = {"input_ids": ids(2, 3), "attention_mask": torch.ones(2, 5)}
    outcomes = []
    for model in models:
        try:
            with torch.no_grad():
                outcomes.append(model(**inputs)[0])
        except (RuntimeError, ValueError, IndexError) as error:
            outcomes.append(str(error))
    assert type(outcomes[0]) is type(outcomes[1])
    if isinstance(outcomes[0], torch.Tensor):
        torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integer_ids_of_either_width(models, dtype):
    original, ours = models
    inputs = {"input_ids": ids(2, 5).to(dtype), "attention_mask": torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])}
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs)[0][real], original(**inputs)[0][real], rtol=1e-4, atol=1e-5)


def test_wrong_calls(models):
    for model in models:
        with pytest.raises(TypeError, match="multiple values"):
            model(ids(1, 2), input_ids=ids(1, 2))
        with pytest.raises(TypeError, match=r"positional|multiple values"):
            model(*[None] * 12)


def test_wrong_calls_of_a_head():
    original = build(Case(seed=2, head="masked_lm", config=SMALL))
    for model in (original, patched(original)):
        with pytest.raises(TypeError, match="multiple values"):
            model(ids(1, 2), None, attention_mask=None)


def test_an_error_leaves_nothing_behind(models):
    original, ours = models
    with pytest.raises((IndexError, RuntimeError), match="index out of range"):
        ours(input_ids=torch.tensor([[2, 50]]))
    inputs = {"input_ids": ids(2, 3)}
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs)[0], original(**inputs)[0], rtol=1e-4, atol=1e-5)
