"""SPLADE and ColBERT of sentence-transformers around a patched encoder: vectors, scores and training as stock."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from model_cases import SENTENCES, byte_tokenizer, logged, saved_model
from test_sentence_transformers import assert_all_fused, assert_close_to, three
from transformers import BertForMaskedLM, DistilBertForMaskedLM, RobertaForMaskedLM, RobertaModel

import roberta_kernels as rk
from benchmarks import splade as splade_benchmark

sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs roberta_kernels[test]")
pytest.importorskip("sentence_transformers.sparse_encoder")

from sentence_transformers import SparseEncoder  # noqa: E402
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Transformer  # noqa: E402
from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling  # noqa: E402

ROOT = Path(__file__).parents[2]
CONTENDERS = ("stock", "stock, chunk_size=16", "patched", "patched, return_logits=False")
TEXTS = [*SENTENCES, ""]
DISTILBERT = {"dim": 48, "n_layers": 2, "n_heads": 3, "hidden_dim": 80, "dropout": 0.0, "attention_dropout": 0.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("sparse")
    return {
        "roberta": saved_model(path / "roberta", RobertaForMaskedLM),
        "bert": saved_model(path / "bert", BertForMaskedLM),
        "distilbert": saved_model(path / "distilbert", DistilBertForMaskedLM, **DISTILBERT),
    }


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("multi-vector"), RobertaModel)


def splade(folder, *, legacy=False, **pooling):
    transformer = MLMTransformer(str(folder)) if legacy else Transformer(str(folder), transformer_task="fill-mask")
    return SparseEncoder(modules=[transformer, SpladePooling(**pooling)], device="cpu")


def vectors(model, texts=TEXTS, **options):
    return model.encode(list(texts), convert_to_tensor=True, **options).to_dense()


class Calls:
    """The rows of each call of the op."""

    def __init__(self, monkeypatch):
        self.rows, op = [], rk.ops.linear_log1p_max

        def run(x, *args, **kwargs):
            self.rows.append(x.shape[0])
            return op(x, *args, **kwargs)

        monkeypatch.setattr(rk.ops, "linear_log1p_max", run)


@pytest.mark.parametrize("family", ["roberta", "bert", "distilbert"])
@pytest.mark.parametrize("head", ["fused", "original"])
def test_splade(folders, family, head, monkeypatch):
    calls = Calls(monkeypatch)
    ours, original, exact, report = three(splade(folders[family]), return_logits=head == "original")
    want = vectors(original, batch_size=3)
    assert 0 < (want > 0).float().mean() < 1, "vectors that have something to say, and are sparse"
    assert_close_to(vectors(ours, batch_size=3), want, vectors(exact, batch_size=3))
    assert_all_fused(report)
    assert len(calls.rows) == (-(-len(TEXTS) // 3) if head == "fused" else 0)
    tokens = original.preprocess(TEXTS)["attention_mask"].sum()
    assert sum(calls.rows) in (0, tokens), "real tokens alone"
    assert ("for SpladePooling" in str(report)) == (head == "fused")


def test_every_way_to_encode(folders):
    ours, original, exact, report = three(splade(folders["roberta"], legacy=True, chunk_size=3), return_logits=False)
    for encode in ("encode_query", "encode_document"):
        got, want, truth = (getattr(m, encode)(TEXTS).to_dense() for m in (ours, original, exact))
        assert_close_to(got, want, truth, encode)
    got, want, truth = (model.encode(TEXTS[1]).to_dense() for model in (ours, original, exact))
    assert_close_to(got, want, truth)
    active = [(vectors(model, max_active_dims=4) > 0).sum(1) for model in (ours, original)]
    assert torch.equal(*active)
    assert_all_fused(report)


def test_what_a_caller_of_the_modules_gets(folders):
    """Logits by default; with return_logits=False none, and no number in their place."""
    model = splade(folders["roberta"])
    features = model.preprocess(TEXTS)
    want, exact = model(dict(features)), copy.deepcopy(model).double()(dict(features))
    rk.patch(model)
    got = model(dict(features))
    assert got.keys() == want.keys()
    assert_close_to(*(found["token_embeddings"] for found in (got, want, exact)))
    rk.patch(model, return_logits=False)
    got = model(dict(features))
    assert got.keys() == want.keys() - {"token_embeddings"}
    assert got["sentence_embedding"].dtype == want["sentence_embedding"].dtype
    assert_close_to(*(found["sentence_embedding"] for found in (got, want, exact)))
    logits = model[0](dict(features))["token_embeddings"]
    with pytest.raises(AttributeError, match=r"logits that were not made.*return_logits=False"):
        logits.sum()
    with pytest.raises(TypeError):
        torch.relu(logits)
    rk.unpatch(model)
    assert torch.equal(model(dict(features))["sentence_embedding"], want["sentence_embedding"])


def _doubled(module, args, out):
    return out * 2.0


FALLBACKS = {
    "sum": (lambda model: setattr(model[1], "pooling_strategy", "sum"), "pooling_strategy='sum'"),
    "log1p_relu": (lambda model: setattr(model[1], "activation_function", "log1p_relu"), "'log1p_relu'"),
    "a hook": (lambda model: model[0].model.lm_head.decoder.register_forward_hook(_doubled), "hooks"),
    "torch.func": (None, "torch.func"),
}


@pytest.mark.parametrize("change", FALLBACKS)
def test_what_is_not_known_runs_the_original_and_is_counted(folders, change):
    do, reason = FALLBACKS[change]
    ours, original, exact, report = three(splade(folders["roberta"]), return_logits=False)
    features = original.preprocess(TEXTS)

    def run(model):
        if do is not None:
            do(model)
            return model(dict(features))["sentence_embedding"]
        scale = torch.ones((), dtype=next(model.parameters()).dtype)
        return torch.func.vjp(lambda s: model(dict(features))["sentence_embedding"] * s, scale)[0]

    with logged(reason):
        got = run(ours)
    assert_close_to(got, run(original), run(exact))
    assert any(reason in said for said in report.fallbacks()), report.fallbacks()


def test_other_models_of_these_parts_keep_their_logits(folders, monkeypatch):
    """A module more, which may read them: return_logits=False concerns a SparseEncoder of two modules."""
    calls = Calls(monkeypatch)
    model = SparseEncoder(modules=[*splade(folders["roberta"]), torch.nn.Identity()], device="cpu")
    ours, _, exact, _ = three(model, return_logits=False)
    features = model.preprocess(TEXTS)
    made = [m(dict(features)) for m in (ours, model, exact)]
    for name in ("token_embeddings", "sentence_embedding"):
        assert_close_to(*(found[name] for found in made), name)
    assert calls.rows == []


def test_splade_is_trained_alike(folders):
    """Gradients of a loss over the vectors, and of SPLADE's regulariser: the same in every parameter."""
    model = splade(folders["roberta"]).train()
    exact = copy.deepcopy(model).double()
    ours = copy.deepcopy(model)
    report = rk.patch(ours, return_logits=False)
    features = model.preprocess(list(SENTENCES))
    gradients = []
    for one in (ours, model, exact):
        embedding = one(dict(features))["sentence_embedding"]
        flops = embedding.mean(0).square().sum()
        (-(embedding @ embedding.t()).log_softmax(-1).diagonal().mean() + 0.1 * flops).backward()
        gradients.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[1]:
        if not name.endswith("key.bias"):  # which softmax cancels to nothing
            assert_close_to(*(g[name] for g in gradients), name)
    assert report.fallbacks() == {}


def test_traced(folders):
    """A graph does not look at the mask: all logits, and the same vectors."""
    torch._dynamo.reset()
    ours, model, exact, _ = three(splade(folders["roberta"]), return_logits=False)
    inputs = model.preprocess(TEXTS)
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    compiled = torch.compile(ours[0].model, backend="aot_eager", fullgraph=True)
    assert_close_to(compiled(**given).logits, *(m[0].model(**given).logits for m in (model, exact)))


# --- ColBERT --------------------------------------------------------------------------------------------------------


def colbert(folder, expansion):
    MultiVectorEncoder = pytest.importorskip("sentence_transformers").MultiVectorEncoder
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    transformer = Transformer(str(folder), query_expansion=expansion)
    dense = Dense(48, 16, bias=False, activation_function=torch.nn.Identity(), module_input_name="token_embeddings")
    modules = [transformer, dense, Normalize(), MultiVectorMask(skiplist_words=["."])]
    return MultiVectorEncoder(modules=modules, device="cpu")


EXPANSIONS = {
    "none": None,
    "scored, not seen": {"strategy": "fixed", "length": 32, "attend": False},
    "scored and seen": {"strategy": "fixed", "length": 32, "attend": True},
    "of short ones": {"strategy": "min", "length": 12, "attend": False},
}


@pytest.mark.parametrize("expansion", EXPANSIONS)
def test_colbert(encoder, expansion):
    """Tokens that no other sees and that are scored: their vectors are those of the original."""
    if not hasattr(sentence_transformers, "MultiVectorEncoder"):
        pytest.skip("this release has no MultiVectorEncoder")
    model = colbert(encoder, EXPANSIONS[expansion])
    assert byte_tokenizer().mask_token_id is not None
    ours, original, exact, report = three(model)
    queries = [model.encode_query(TEXTS, batch_size=4) for model in (ours, original, exact)]
    documents = [model.encode_document(TEXTS, batch_size=4) for model in (ours, original, exact)]
    for got in (queries, documents):
        assert [len(rows) for rows in got[0]] == [len(rows) for rows in got[1]]
        assert_close_to(*(torch.cat([torch.as_tensor(rows) for rows in rows_of]) for rows_of in got))
    if expansion.startswith("scored"):
        assert {len(rows) for rows in queries[1]} == {32}
    scores = [m.similarity(q, d) for m, q, d in zip((ours, original, exact), queries, documents, strict=True)]
    assert_close_to(*scores)
    assert np.array_equal(*(torch.as_tensor(s).argmax(1).numpy() for s in scores[:2]))
    assert report.fallbacks() == {}
    seen_by_nobody = expansion in ("scored, not seen", "of short ones")
    assert bool(report.padded()) == seen_by_nobody, "documents are unpadded; such queries are computed in every row"


# --- the example and the benchmark ------------------------------------------------------------------------------------


def run_python(*arguments):
    done = forks.python(*arguments, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.full
def test_the_example(folders, tmp_path):
    splade(folders["roberta"]).save_pretrained(str(tmp_path), create_model_card=False)
    said = run_python("examples/sparse_retrieval.py", "What is a file?", "--model", str(tmp_path), "--passages", "12")
    assert "12 passages" in said
    assert len(re.findall(r"^\d+\.\d{3}  ", said, re.MULTILINE)) == 5
    found = re.search(r"largest difference of a weight: (\S+)", said)
    assert found is not None
    assert float(found[1]) < 1e-4


@pytest.mark.full
def test_the_benchmark(tmp_path):
    """A forward pass of all contenders, whose vectors it compares; a step of training of one."""
    small = ("-m", "benchmarks.splade", "--size", "tiny", "--batch", "2", "--length", "16", "--calls", "1")
    said = run_python(*small, "--out", str(tmp_path / "splade.json"))
    written = json.loads((tmp_path / "splade.json").read_text())
    assert list(written["results"]) == list(CONTENDERS)
    assert {"machine_info", "versions", "commit_info", "order"} <= written.keys()
    assert [row.split("|")[1].strip() for row in said.splitlines()[4:]] == list(CONTENDERS)
    order = {"size": "tiny", "layers": None, "batch": 2, "length": 16, "calls": 1, "threads": torch.get_num_threads()}
    trained = splade_benchmark.measure({**order, "backward": True, "contender": CONTENDERS[-1]})
    assert len(trained["seconds"]) == 1
    assert min(trained["means"]) > 0
