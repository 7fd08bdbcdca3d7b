"""The same text gives the same vector, bit for bit: alone or in any batch, in any order, padded to any length on either
side, and with any number of threads. With each instruction set, through a patched model, encode() and
sentence-transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from model_cases import saved_model
from transformers import AutoTokenizer, RobertaModel

import roberta_kernels as rk
from roberta_kernels import backends

pytest.importorskip("tokenizers")

LENGTHS = (1, 2, 9, 30, 3, 17, 58, 31)  # in tokens, with those that begin and end a text
ORDER = (5, 2, 7, 0, 4, 1, 6, 3)
KINDS = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "weights in bfloat16": {"quantization": "bfloat16"},
    "int8-dynamic": {"quantization": "int8-dynamic"},
}
# Sums over padded rows, which sentence-transformers' mean takes, round by how long the batch is.
POOLINGS = ("cls", "max", "lasttoken")

pytestmark = pytest.mark.skipif(not backends.available_backends()["cpu"], reason="needs the CPU kernels")
kinds = pytest.mark.parametrize("kind", KINDS)
isas = pytest.mark.parametrize("isa", backends.cpu_isas())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("encoder"), RobertaModel)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def rows():
    draw = np.random.default_rng(3)
    return [draw.integers(5, 250, length).tolist() for length in LENGTHS]


@pytest.fixture
def threads():
    """Sets the number of threads, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def patched(folder, kind):
    options = dict(KINDS[kind])
    model = RobertaModel.from_pretrained(folder, add_pooling_layer=False, dtype=options.pop("dtype", torch.float32))
    assert rk.patch(model.eval(), **options)
    return model


def vectors(model, tokenizer, rows, side="right", length=None):
    """Of each text, the hidden states of its tokens."""
    batch = tokenizer.pad(
        {"input_ids": rows},
        padding=True if length is None else "max_length",
        max_length=length,
        padding_side=side,
        return_tensors="pt",
    )
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    return [hidden[i, real] for i, real in enumerate(batch["attention_mask"].bool())]


def same(found, expected):
    return len(found) == len(expected) and all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@isas
@kinds
def test_a_patched_model(folder, tokenizer, rows, kind, isa, threads):
    model = patched(folder, kind)
    with backends.use_cpu_isa(isa):
        for _ in range(3):  # copies of weights are made once these have stayed the same for two calls
            alone = [vectors(model, tokenizer, [row])[0] for row in rows]
        for count in (1, 2):
            threads(count)
            assert same([vectors(model, tokenizer, [row])[0] for row in rows], alone), "alone again"
            assert same(vectors(model, tokenizer, rows), alone), "in a batch"
            assert same(vectors(model, tokenizer, rows, side="left"), alone), "padded on the left"
            assert same(vectors(model, tokenizer, rows, length=63), alone), "padded further"
            shuffled = vectors(model, tokenizer, [rows[i] for i in ORDER])
            assert same(shuffled, [alone[i] for i in ORDER]), "in another order"


@isas
@kinds
def test_sentence_transformers(folder, kind, isa):
    library = pytest.importorskip("sentence_transformers", reason="needs roberta_kernels[test]")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    options = dict(KINDS[kind])
    inner = {"model_kwargs": {"dtype": options.pop("dtype", torch.float32)}}
    texts = ["word " * length for length in (1, 2, 5, 9, 3, 7, 11)]
    for pooling in POOLINGS:
        model = library.SentenceTransformer(
            modules=[Transformer(str(folder), **inner), Pooling(48, pooling)], device="cpu"
        )
        assert rk.patch(model, **options)
        with backends.use_cpu_isa(isa):
            for _ in range(3):
                alone = np.stack([model.encode(text) for text in texts])
            for size in (3, 7):
                assert np.array_equal(model.encode(texts, batch_size=size), alone), (pooling, size)


@kinds
@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_encode(folder, tokenizer, kind, pooling, threads):
    model = patched(folder, kind)
    texts = ["word " * length for length in (1, 2, 5, 9, 3, 7, 11)]

    def encode(some, **options):
        return np.asarray(rk.encode(model, tokenizer, some, pooling=pooling, normalize=True, **options).embeddings)

    for _ in range(3):
        alone = np.concatenate([encode([text]) for text in texts])
    for count in (1, 2):
        threads(count)
        assert np.array_equal(encode(texts), alone)
        assert np.array_equal(encode(texts, batch_tokens=16), alone)
        assert np.array_equal(encode(texts[::-1])[::-1], alone)
