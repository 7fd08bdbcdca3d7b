"""SentenceTransformer and CrossEncoder around a patched encoder: the same embeddings, scores and training as stock."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from model_cases import FLOOR_ULPS, SENTENCES, saved_model
from transformers import MPNetModel, RobertaForSequenceClassification, RobertaModel

import roberta_kernels as rk
from roberta_kernels.tolerance import compare

pytest.importorskip("tokenizers")
sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs roberta_kernels[test]")

from sentence_transformers import CrossEncoder, SentenceTransformer  # noqa: E402
from sentence_transformers.sentence_transformer.modules import CNN, Normalize, Pooling, Transformer  # noqa: E402

PAIRS = [(SENTENCES[0], text) for text in SENTENCES] + [(SENTENCES[3], text) for text in SENTENCES]
WIDTH = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("encoder"), RobertaModel)


@pytest.fixture(scope="module")
def reranker(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("reranker"), RobertaForSequenceClassification, num_labels=1)


def sentence_model(folder, pooling="mean", *modules):
    parts = [Transformer(str(folder)), Pooling(WIDTH, pooling), *modules]
    return SentenceTransformer(modules=parts, device="cpu", prompts={"query": "query: ", "passage": "passage: "})


def three(model, **options):
    """The model patched, as it is, and in float64; and the report."""
    ours = copy.deepcopy(model)
    report = rk.patch(ours, **options)
    assert report
    return ours, model, copy.deepcopy(model).double(), report


def assert_close_to(ours, original, exact, name="embeddings"):
    tensors = [torch.as_tensor(values) for values in (ours, original, exact)]
    comparison = compare(*tensors[:2], tensors[2].double(), name=name, floor_ulps=FLOOR_ULPS[torch.float32])
    assert comparison.holds, str(comparison)


def assert_all_fused(report):
    assert report.fallbacks() == {}
    assert report.padded() == {}, "padding must be left out"


# --- SentenceTransformer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"])
def test_every_pooling(folder, pooling):
    ours, original, exact, report = three(sentence_model(folder, pooling, Normalize()))
    assert_close_to(*(model.encode(list(SENTENCES), batch_size=4) for model in (ours, original, exact)))
    assert_all_fused(report)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_mpnet(tmp_path, pooling):
    """As all-mpnet-base-v2 is made: its padding is left out, since nobody reads it."""
    saved = saved_model(tmp_path, MPNetModel)
    ours, original, exact, report = three(sentence_model(saved, pooling, Normalize()))
    assert_close_to(*(model.encode(list(SENTENCES), batch_size=4) for model in (ours, original, exact)))
    assert_all_fused(report)


ENCODE_OPTIONS = {
    "one at a time": {"batch_size": 1},
    "normalised": {"normalize_embeddings": True},
    "a tensor": {"convert_to_tensor": True},
    "tensors": {"convert_to_numpy": False},
    "truncated": {"truncate_dim": 16},
    "a prompt": {"prompt": "search: "},
    "a prompt by name": {"prompt_name": "query"},
    "token vectors": {"output_value": "token_embeddings"},
    "everything": {"output_value": None},
}


@pytest.mark.parametrize("options", ENCODE_OPTIONS.values(), ids=ENCODE_OPTIONS)
def test_encode(folder, options):
    ours, original, exact, report = three(sentence_model(folder))
    for texts in (list(SENTENCES), SENTENCES[1]):
        results = [model.encode(texts, **options) for model in (ours, original, exact)]
        got, want, _ = results
        assert type(got) is type(want)
        if options.get("output_value", "") is None:
            results = [[values] if isinstance(values, dict) else values for values in results]
            assert [row.keys() for row in results[0]] == [row.keys() for row in results[1]]
            results = [[row["sentence_embedding"] for row in rows] for rows in results]
        if isinstance(results[0], list):
            assert [row.dtype for row in results[0]] == [row.dtype for row in results[1]]
            for rows in zip(*results, strict=True):
                assert_close_to(*rows)
        else:
            assert (got.dtype, got.shape) == (want.dtype, want.shape)
            assert_close_to(*results)
    assert_all_fused(report)


def test_queries_documents_and_prompts_left_out_of_the_pooling(folder):
    ours, original, exact, report = three(sentence_model(folder))
    for model in (ours, original, exact):
        model.set_pooling_include_prompt(False)
    for encode in ("encode_query", "encode_document"):
        assert_close_to(*(getattr(model, encode)(list(SENTENCES)) for model in (ours, original, exact)), encode)
    embeddings = [model.encode(list(SENTENCES), convert_to_tensor=True) for model in (ours, original, exact)]
    assert_close_to(*(model.similarity(e, e) for model, e in zip((ours, original, exact), embeddings, strict=True)))
    assert_all_fused(report)


def test_unpatched_it_is_what_it_was(folder):
    original = sentence_model(folder, "mean", Normalize())
    ours = copy.deepcopy(original)
    rk.patch(ours)
    ours.encode(list(SENTENCES))
    rk.unpatch(ours)
    assert not rk.is_patched(ours)
    assert np.array_equal(ours.encode(list(SENTENCES)), original.encode(list(SENTENCES)))


def test_a_module_that_mixes_token_vectors_gets_them_exact(folder):
    # A convolution over tokens reads padded rows.
    cnn = CNN(WIDTH, 8, kernel_sizes=[3])
    pooling = Pooling(cnn.get_embedding_dimension(), "mean")
    model = SentenceTransformer(modules=[Transformer(str(folder)), cnn, pooling], device="cpu")
    ours, original, exact, report = three(model)
    assert report.state.known_reader is False
    assert_close_to(*(m.encode(list(SENTENCES), convert_to_tensor=True) for m in (ours, original, exact)))
    assert report.fallbacks() == {}


def files_of(path):
    """Name -> content of the files that a model is saved as; JSON without what says where it came from."""
    found = {}
    for file in sorted(p for p in Path(path).rglob("*") if p.is_file() and p.name != "README.md"):
        content = file.read_bytes()
        if file.suffix == ".json":
            content = json.loads(content)
        found[str(file.relative_to(path))] = content
    return found


def test_saved_and_loaded(folder, tmp_path):
    ours, original, exact, _ = three(sentence_model(folder, "mean", Normalize()))
    for name, model in (("ours", ours), ("original", original)):
        model.save_pretrained(str(tmp_path / name), create_model_card=False)
    assert files_of(tmp_path / "ours") == files_of(tmp_path / "original")
    again = SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    assert not rk.is_patched(again)
    assert np.array_equal(again.encode(list(SENTENCES)), original.encode(list(SENTENCES)))
    report = rk.patch(again)
    assert_close_to(*(model.encode(list(SENTENCES)) for model in (again, original, exact)))
    assert_all_fused(report)


def train(kind, model, dataset, path, loss, **options):
    """A few steps; the losses. kind: "sentence_transformer" or "cross_encoder"."""
    if kind == "cross_encoder":
        trainer, arguments = sentence_transformers.CrossEncoderTrainer, "CrossEncoderTrainingArguments"
    else:
        trainer, arguments = sentence_transformers.SentenceTransformerTrainer, "SentenceTransformerTrainingArguments"
    arguments = getattr(sentence_transformers, arguments)(
        output_dir=str(path),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        seed=1,
        disable_tqdm=True,
        **options,
    )
    trainer = trainer(model=model, args=arguments, train_dataset=dataset, loss=loss(model))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_trained_alike(kind, model, dataset, path, loss, **options):
    ours = copy.deepcopy(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = rk.patch(ours)
    losses = [train(kind, m, dataset, path, loss, **options) for m in (ours, model)]
    assert len(losses[1]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert rk.is_patched(ours)
    changed = 0
    for (name, got), want in zip(ours.state_dict().items(), model.state_dict().values(), strict=True):
        changed += not torch.equal(want, before[name])
        torch.testing.assert_close(got, want, rtol=1e-2, atol=2e-3, msg=name)
    assert changed > 10
    assert_all_fused(report)


@pytest.mark.parametrize("loss", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"])
def test_sentence_transformer_trainer(folder, tmp_path, loss):
    datasets = pytest.importorskip("datasets", reason="needs roberta_kernels[test]")
    pytest.importorskip("accelerate")
    from sentence_transformers.sentence_transformer import losses

    rows = {"anchor": list(SENTENCES) * 2, "positive": list(SENTENCES[::-1]) * 2}
    options = {"gradient_accumulation_steps": 2} if loss == "MultipleNegativesRankingLoss" else {}
    model, dataset = sentence_model(folder), datasets.Dataset.from_dict(rows)
    assert_trained_alike("sentence_transformer", model, dataset, tmp_path, getattr(losses, loss), **options)


# --- roberta_kernels' own encode ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
@pytest.mark.parametrize("modules", [(), (Normalize(),)], ids=["plain", "normalised"])
def test_encode_of_a_sentence_transformer(folder, pooling, modules):
    model = sentence_model(folder, pooling, *modules)
    exact = copy.deepcopy(model).double()
    report = rk.encode(model, None, list(SENTENCES))
    assert report.packed
    assert_close_to(report.embeddings, model.encode(list(SENTENCES)), exact.encode(list(SENTENCES)))
    assert not rk.is_patched(model)


def test_arguments_of_encode_come_before_what_the_model_does(folder):
    model = sentence_model(folder, "cls", Normalize())
    told = rk.encode(model, None, list(SENTENCES), pooling="mean", normalize=False).embeddings
    np.testing.assert_allclose(told, sentence_model(folder).encode(list(SENTENCES)), rtol=1e-3, atol=1e-5)


def test_encode_refuses_what_it_does_not_do(folder):
    from sentence_transformers.sentence_transformer.modules import Dense

    for model, why in (
        (sentence_model(folder, "lasttoken"), "pools by lasttoken"),
        (sentence_model(folder, "mean", Dense(WIDTH, 8)), "has the modules Transformer, Pooling, Dense"),
    ):
        with pytest.raises(rk.EncodingError, match=rf"{why}.*model\.encode\(texts\)"):
            rk.encode(model, None, list(SENTENCES))
    model = sentence_model(folder)
    model.default_prompt_name = "query"
    with pytest.raises(rk.EncodingError, match="a prompt before each text"):
        rk.encode(model, None, list(SENTENCES))
    with pytest.raises(TypeError, match="tokenizer"):
        rk.encode(model[0].auto_model, None, list(SENTENCES))
    with pytest.raises(TypeError, match="the one inside it"):
        rk.encode(model[0], None, list(SENTENCES))


def test_encode_in_a_shell_takes_the_folder_of_a_sentence_transformer(folder, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from roberta_kernels.cli.commands import app

    model = sentence_model(folder, "cls", Normalize())
    model.save_pretrained(str(tmp_path / "model"), create_model_card=False)
    (tmp_path / "in.txt").write_text("\n".join(SENTENCES), encoding="utf-8")
    command = ["encode", str(tmp_path / "in.txt"), str(tmp_path / "out.npy"), "--model", str(tmp_path / "model")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), model.encode(list(SENTENCES)), rtol=1e-3, atol=1e-5)
    result = CliRunner().invoke(app, [*command, "--pooling", "mean", "--overwrite"])
    assert result.exit_code == 0, result.output
    want = sentence_model(folder).encode(list(SENTENCES))
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), want, rtol=1e-3, atol=1e-5)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    result = CliRunner().invoke(app, [*command, "--overwrite"])
    assert result.exit_code != 0
    assert "pip install sentence-transformers" in " ".join(result.output.split())


# --- CrossEncoder ---------------------------------------------------------------------------------------------------


def cross_encoder(folder):
    return CrossEncoder(str(folder), device="cpu")


def test_predict(reranker):
    ours, original, exact, report = three(cross_encoder(reranker))
    for options in ({}, {"batch_size": 3}, {"convert_to_tensor": True}, {"activation_fn": torch.nn.Identity()}):
        got, want, truth = (model.predict(PAIRS, **options) for model in (ours, original, exact))
        assert type(got) is type(want)
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        assert_close_to(got, want, truth, str(options))
    assert ours.predict(PAIRS[1]) == pytest.approx(original.predict(PAIRS[1]), rel=1e-4)
    assert_all_fused(report)
    rk.unpatch(ours)
    assert np.array_equal(ours.predict(PAIRS), original.predict(PAIRS))


def test_several_labels(folder, tmp_path):
    path = saved_model(tmp_path, RobertaForSequenceClassification, num_labels=3)
    ours, original, exact, report = three(cross_encoder(path))
    assert_close_to(*(model.predict(PAIRS, apply_softmax=True) for model in (ours, original, exact)))
    assert_all_fused(report)


def test_rank(reranker):
    ours, original, _, report = three(cross_encoder(reranker))
    for options in ({}, {"top_k": 3, "return_documents": True}):
        got, want = (model.rank(SENTENCES[1], list(SENTENCES), **options) for model in (ours, original))
        assert [hit["corpus_id"] for hit in got] == [hit["corpus_id"] for hit in want]
        assert [hit.keys() for hit in got] == [hit.keys() for hit in want]
        assert [hit["score"] for hit in got] == pytest.approx([hit["score"] for hit in want], rel=1e-3)
    assert_all_fused(report)


def test_cross_encoder_trainer(reranker, tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs roberta_kernels[test]")
    pytest.importorskip("accelerate")
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    rows = {"query": [a for a, _ in PAIRS], "passage": [b for _, b in PAIRS]}
    dataset = datasets.Dataset.from_dict(rows | {"label": [float(i % 2) for i in range(len(PAIRS))]})
    model = cross_encoder(reranker)
    assert_trained_alike("cross_encoder", model, dataset, tmp_path / "run", BinaryCrossEntropyLoss)
    ours = copy.deepcopy(model)
    rk.patch(ours)
    for name, saved in (("ours", ours), ("original", model)):
        saved.save_pretrained(str(tmp_path / name), create_model_card=False)
    assert files_of(tmp_path / "ours") == files_of(tmp_path / "original")
    again = CrossEncoder(str(tmp_path / "ours"), device="cpu")
    assert np.array_equal(again.predict(PAIRS), model.predict(PAIRS))


# --- processes ------------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("kind", ["embeddings", "scores"])
def test_several_processes(folder, reranker, kind):
    # Each process has a patched copy of its own: its calls are not in this process's report.
    model = sentence_model(folder) if kind == "embeddings" else cross_encoder(reranker)
    ours, original, exact, _ = three(model, padded_rows="zeros")
    run, inputs = ("encode", list(SENTENCES) * 3) if kind == "embeddings" else ("predict", PAIRS)
    pool = ours.start_multi_process_pool(["cpu", "cpu"])
    try:
        got = getattr(ours, run)(inputs, pool=pool, chunk_size=5)
        rows = ours.encode(inputs, pool=pool, chunk_size=5, output_value=None) if kind == "embeddings" else []
    finally:
        ours.stop_multi_process_pool(pool)
    assert_close_to(got, *(getattr(model, run)(inputs) for model in (original, exact)))
    padding = [row["token_embeddings"][row["attention_mask"] == 0] for row in rows]
    # Rows at padding are zeros in a model that was patched so, and in no other: the processes ran that.
    assert all(vectors.abs().sum() == 0 for vectors in padding)
    assert kind == "scores" or sum(map(len, padding)) > 0
