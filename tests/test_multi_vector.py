"""ColBERT: the benchmark runs end to end and checks before it times, and the example ranks as it says."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path

import forks
import pytest
import torch

sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs roberta_kernels[test]")
pytest.importorskip("tokenizers")
if not hasattr(sentence_transformers, "MultiVectorEncoder"):
    pytest.skip("this sentence-transformers has no MultiVectorEncoder", allow_module_level=True)
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def multi_vector():
    """benchmarks.multi_vector; the benchmarks are no part of the package, and are imported from the repository."""
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks import multi_vector

        yield multi_vector
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def texts(multi_vector):
    return multi_vector.texts(smoke=True)


@pytest.fixture(scope="module")
def model(multi_vector, texts, tmp_path_factory):
    return multi_vector.multi_vector_encoder(tmp_path_factory.mktemp("colbert"), texts[1], smoke=True)


@pytest.mark.full
def test_the_benchmark(tmp_path):
    done = forks.python("-m", "benchmarks", "multi-vector", "--smoke", "--out", tmp_path, cwd=ROOT)
    assert done.returncode == 0, done.stderr + done.stdout
    results = json.loads((tmp_path / "multi_vector.json").read_text())
    names = {"sentence-transformers", "patched", "sentence-transformers, bfloat16", "patched, bfloat16"}
    assert set(results["errors"]) == names
    assert {part: set(rows) for part, rows in results["parts"].items()} == {"documents": names, "query": names}
    for name, row in results["parts"]["documents"].items():
        assert row["times_stock"][0] == 1.0 or name.startswith("patched")
        assert row["tokens_per_s"] == pytest.approx(sum(results["tokens"]) / row["median_s"])
        assert name in done.stderr
    assert {"machine_info", "versions", "commit_info"} <= results.keys()
    assert len(results["tokens"]) == 12


def test_wrong_vectors_are_not_timed(multi_vector, model, texts):
    stock, ours = multi_vector.contenders(model)[""]
    errors = multi_vector.check(stock, ours, *texts)
    assert errors.keys() == {multi_vector.OURS, multi_vector.STOCK}
    wrong = copy.deepcopy(stock)
    with torch.no_grad():
        wrong[1].linear.weight[0] *= 1.001
    with pytest.raises(RuntimeError, match="promise is broken"):
        multi_vector.check(stock, wrong, *texts)


@pytest.mark.full
def test_the_example(model, tmp_path):
    model.save_pretrained(str(tmp_path), create_model_card=False)
    command = [ROOT / "examples/multi_vector.py", "What is it?", "--model", tmp_path, "--passages", "12"]
    done = forks.python(*command, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "12 passages" in done.stdout
    assert "vectors: 32 of the question" in done.stdout, "lengthened with masks"
    scores = [float(score) for score in re.findall(r"^(\d+\.\d{3})  ", done.stdout, re.MULTILINE)]
    assert len(scores) == 5
    assert scores == sorted(scores, reverse=True)
    assert 0 < scores[0] <= 32.001, "32 cosines"
    found = re.search(r"largest difference of a number: (\S+)", done.stdout)
    assert found is not None
    assert float(found[1]) < 1e-5
