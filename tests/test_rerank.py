"""Rerankers: the benchmark runs end to end and checks before it times, and the example says what it says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs roberta_kernels[test]")
pytest.importorskip("tokenizers")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def rerank():
    """benchmarks.rerank; the benchmarks are no part of the package, and are imported from the repository."""
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks import rerank

        yield rerank
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def folder(rerank, tmp_path_factory):
    path = tmp_path_factory.mktemp("reranker")
    rerank.save_reranker(path, rerank.texts(smoke=True)[1], smoke=True)
    return path


@pytest.mark.full
def test_the_benchmark(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "rerank", "--smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr + done.stdout
    results = json.loads((tmp_path / "rerank.json").read_text())
    rows = {row["contender"]: row for row in results["contenders"]}
    assert rows["ours"]["within_promise"] is True
    assert rows["ours"]["times_ours"] == [1.0, 1.0, 1.0]
    assert {"ours", "sentence-transformers"} <= rows.keys()
    for engine in ("ONNX Runtime", "OpenVINO"):  # measured, or named as missing
        assert (engine in rows) != (engine in results["unavailable"])
    for backend in ("onnx", "openvino"):
        name = f"sentence-transformers, backend {backend}"
        told = [name in rows, name in results["unavailable"], name in {row["contender"] for row in results["failures"]}]
        assert sum(told) == 1
    assert results["commit_info"]["id"]
    assert results["machine_info"]["threads"] == 1
    assert len(results["tokens"]) == 12
    for name in [*rows, *results["unavailable"]]:
        assert name in done.stderr


def test_wrong_scores_are_not_timed(rerank, folder):
    questions, passages = rerank.texts(smoke=True)
    stock = rerank._stock(folder)
    scores = rerank._scores(stock, questions[0], passages)
    exact = rerank._scores(rerank._stock(folder).double(), questions[0], passages)
    assert rerank._check(rerank.OURS, scores, scores, exact)["within_promise"] is True
    with pytest.raises(RuntimeError, match="promise is broken"):
        rerank._check(rerank.OURS, scores + 1e-3 * torch.arange(len(scores)), scores, exact)
    with pytest.raises(RuntimeError, match="wrong answers"):
        rerank._check("a peer", scores.flip(0), scores, exact)


def test_a_backend_that_does_not_go_with_this_transformers_is_named(rerank, tmp_path, monkeypatch):
    """optimum's module may import where its classes do not."""

    class Lazy(types.ModuleType):
        def __getattr__(self, name):
            raise ImportError(f"cannot import name {name!r}")

    for module in ("optimum.onnxruntime", "optimum.intel"):
        monkeypatch.setitem(sys.modules, module, Lazy(module))
    known, missing = rerank.contenders(tmp_path, 1)
    for backend in ("onnx", "openvino"):
        name = f"sentence-transformers, backend {backend}"
        assert name not in known
        assert "cannot import name" in missing[name]


def test_the_example(folder):
    command = [sys.executable, str(ROOT / "examples/rerank.py"), "What is a file?", "--model", str(folder)]
    done = subprocess.run([*command, "--passages", "12"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "12 passages" in done.stdout
    assert len(re.findall(r"^0\.\d{4}  ", done.stdout, re.MULTILINE)) == 5
    found = re.search(r"largest difference of a score: (\S+)", done.stdout)
    assert found is not None
    assert float(found[1]) < 1e-5
