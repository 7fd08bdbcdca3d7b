"""The same embeddings as one text at a time, whatever shares a batch."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
import transformers

import roberta_kernels as rk
from encoding.cases import SMALL, TEXTS, one_by_one, pooled
from roberta_kernels import encoding, tolerance
from roberta_kernels.encoding import batching, embedding


@pytest.fixture(scope="module")
def vectors(folder, tokenizer):
    """Of the original model, in float32 and in float64."""
    model = transformers.RobertaForMaskedLM.from_pretrained(folder).eval()
    return one_by_one(model, tokenizer, TEXTS), one_by_one(model.double(), tokenizer, TEXTS)


@pytest.mark.parametrize(("pooling", "normalize"), [("mean", False), ("mean", True), ("cls", False), ("max", True)])
@pytest.mark.parametrize("patch", [True, False])
def test_the_embeddings_are_those_of_one_text_at_a_time(model, tokenizer, vectors, pooling, normalize, patch):
    original, exact = (pooled(rows, pooling, normalize) for rows in vectors)
    order = list(range(len(TEXTS)))
    for seed in range(2):  # batches of another composition
        random.Random(seed).shuffle(order)
        report = rk.encode(
            model, tokenizer, [TEXTS[i] for i in order], pooling=pooling, normalize=normalize, patch=patch, **SMALL
        )
        assert report.packed == patch
        ours = torch.empty_like(original)
        ours[order] = torch.from_numpy(report.embeddings)
        tolerance.assert_three_way(ours, original, exact, floor_ulps=4)
        for i, text in enumerate(TEXTS):  # no row hides behind the others
            assert (ours[i] - exact[i]).norm() < 1e-4 * exact[i].norm(), text


def test_what_it_reports(model, tokenizer, capsys):
    lengths = np.array([len(ids) for ids in tokenizer(TEXTS, truncation=True, max_length=64)["input_ids"]])
    longer = sum(len(ids) > 64 for ids in tokenizer(TEXTS)["input_ids"])
    fits = next(ids for ids in tokenizer(TEXTS)["input_ids"] if len(ids) > 64)[1:63]
    exactly = tokenizer.decode(fits)
    assert len(tokenizer(exactly)["input_ids"]) == 64
    plain = [lengths[i : i + 32] for i in range(0, len(lengths), 32)]
    padding = sum(len(rows) * rows.max() - rows.sum() for rows in plain)
    report = rk.encode(model, tokenizer, TEXTS, progress=True)
    assert f"{len(TEXTS)}/{len(TEXTS)}" in capsys.readouterr().err
    assert (report.texts, report.tokens, report.bad) == (len(TEXTS), lengths.sum(), 0)
    assert report.truncated == longer > 0
    assert (report.padding, report.padding_avoided) == (0, padding)
    assert report.tokens_per_second == pytest.approx(report.tokens / report.seconds)
    assert report.detours == []
    assert rk.encode(model, tokenizer, [exactly]).truncated == 0
    assert rk.encode(model, tokenizer, [exactly], max_length=63).truncated == 1
    for word in ("tokens/s", "truncated", "avoided"):
        assert word in str(report)
    json.dumps(report.as_dict())

    padded = rk.encode(model, tokenizer, TEXTS, patch=False, **SMALL)
    assert not padded.packed
    assert padded.padding > 0
    assert padded.detours == ["patch=False"]


def test_the_model_is_left_as_it_was(model, tokenizer):
    model.train()
    model.roberta.embeddings.eval()
    modes = [module.training for module in model.modules()]
    classes = [type(module) for module in model.modules()]
    first = rk.encode(model, tokenizer, TEXTS).embeddings  # dropout would show
    assert [module.training for module in model.modules()] == modes
    assert [type(module) for module in model.modules()] == classes

    with pytest.raises(RuntimeError, match="broken"):
        rk.encode(model, lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("broken")), TEXTS)
    assert not rk.is_patched(model)
    assert [module.training for module in model.modules()] == modes

    rk.patch(model, padded_rows="zeros")
    report = rk.encode(model, tokenizer, TEXTS)
    assert rk.is_patched(model)
    assert report.packed
    np.testing.assert_allclose(report.embeddings, first, rtol=1e-4, atol=1e-5)


def test_a_detour_is_found_and_batches_count_their_padding(model, tokenizer):
    model.roberta.encoder.register_forward_hook(lambda *args: None)
    report = rk.encode(model, tokenizer, TEXTS)
    assert not report.packed
    assert len(report.detours) == 1
    assert report.detours[0].startswith("hooks on")
    assert report.padding > 0


def test_a_model_of_another_family_runs_as_it_is(tokenizer):
    torch.manual_seed(0)
    config = transformers.AlbertConfig(
        vocab_size=400, embedding_size=16, hidden_size=16, intermediate_size=32, num_attention_heads=2
    )
    model = transformers.AlbertModel(config).eval()
    report = rk.encode(model, tokenizer, TEXTS[:8])
    assert not report.packed
    assert report.detours
    expected = model(**tokenizer([TEXTS[4]], return_tensors="pt")).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(report.embeddings[4], expected.detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["DistilBert", "MPNet"])
def test_families_with_parts_of_their_own(tokenizer, family):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    inner = {"hidden_dim": 32} if family == "DistilBert" else {"intermediate_size": 32}
    config = getattr(transformers, f"{family}Config")(vocab_size=400, max_position_embeddings=40, **sizes, **inner)
    model = getattr(transformers, f"{family}Model")(config).eval()
    report = rk.encode(model, tokenizer, TEXTS[:8])
    assert report.packed
    assert not report.detours
    given = tokenizer([TEXTS[4]], return_tensors="pt", truncation=True, max_length=encoding.longest_input(model))
    given.pop("token_type_ids", None)
    expected = model(**given).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(report.embeddings[4], expected.detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models(model, tokenizer, vectors, dtype):
    model = model.to(dtype).eval()
    original, exact = pooled(one_by_one(model, tokenizer, TEXTS), "mean"), pooled(vectors[1], "mean")
    ours = torch.from_numpy(rk.encode(model, tokenizer, TEXTS).embeddings)
    tolerance.assert_three_way(ours.to(dtype), original, exact)


def test_longest_input_of_both_kinds_of_position_tables(model):
    assert encoding.longest_input(model) == 64
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=40
    )
    assert encoding.longest_input(transformers.BertModel(config)) == 40


def test_batches_hold_every_row_once_and_their_budget():
    generator = np.random.default_rng(0)
    for budget in (1, 64, 300):
        for packed in (True, False):
            lengths = generator.integers(0, 65, 200)
            batches = batching.batches_of(lengths, budget, packed)
            assert sorted(np.concatenate(batches)) == np.flatnonzero(lengths).tolist()
            for rows in batches:
                padded = len(rows) * lengths[rows].max()
                fits = lengths[rows].sum() <= budget and padded <= 2 * budget if packed else padded <= budget
                assert fits or len(rows) == 1
    assert len(batching.batches_of(np.full(10, 10), 50, True)) == 2  # no smaller than they must be
    assert batching.batches_of(np.zeros(3, int), 50, True) == []


# -- longer than the model takes ---------------------------------------------------------------------------------------


class DoesNotTruncate:
    """A tokenizer of the user's own."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __call__(self, texts, **options):
        return {"input_ids": self._tokenizer(texts)["input_ids"]}

    def get_vocab(self):
        return self._tokenizer.get_vocab()

    @property
    def special_tokens_map(self):
        return self._tokenizer.special_tokens_map


def test_a_text_that_is_not_truncated_is_marked(model, tokenizer, tmp_path):
    lengths = [len(ids) for ids in tokenizer(TEXTS)["input_ids"]]
    long = [i for i, length in enumerate(lengths) if length > 64]
    assert 0 < len(long) < len(TEXTS)
    report = rk.encode(model, DoesNotTruncate(tokenizer), TEXTS, tmp_path / "out.npy", **SMALL)
    assert (report.bad, report.truncated) == (len(long), 0)
    first = f"{lengths[long[0]]} tokens, at most 64: the tokenizer does not truncate it"
    assert report.bad_rows[0] == (long[0], first)
    expected = rk.encode(model, tokenizer, TEXTS, **SMALL).embeddings
    expected[long] = np.nan
    np.testing.assert_allclose(report.embeddings, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("longest", [3, 4, 11, 63])
def test_max_length_is_applied_and_counted(model, tokenizer, longest, monkeypatch):
    lengths = np.array([len(ids) for ids in tokenizer(TEXTS)["input_ids"]])
    seen = []
    embed = embedding.embed

    def look(base, rows, *rest):
        seen.extend(map(len, rows))
        return embed(base, rows, *rest)

    monkeypatch.setattr(embedding, "embed", look)
    report = rk.encode(model, tokenizer, TEXTS, max_length=longest)
    assert sorted(seen) == sorted(np.minimum(lengths, longest))
    assert report.truncated == (lengths > longest).sum()


@pytest.mark.parametrize("longest", [1, 2])
def test_a_max_length_without_room_for_text_is_refused(model, tokenizer, longest):
    with pytest.raises(rk.EncodingError, match=f"max_length must be at least 3, .* got {longest}"):
        rk.encode(model, tokenizer, TEXTS, max_length=longest)


def test_a_position_table_that_was_made_longer_counts(model):
    table = model.roberta.embeddings.position_embeddings
    table.weight.data = torch.cat([table.weight.data, table.weight.data[-20:]])
    assert encoding.longest_input(model) == 84
