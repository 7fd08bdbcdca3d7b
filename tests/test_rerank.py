"""Rerankers: the benchmark runs end to end and checks before it times, and the example says what it says."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import forks
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
    done = forks.python("-m", "benchmarks", "rerank", "--smoke", "--out", tmp_path, cwd=ROOT)
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


def test_without_an_environment_for_them_the_backends_are_named(rerank, tmp_path):
    known, missing = rerank.contenders(tmp_path, 1, tmp_path / "no-python")
    for backend in ("onnx", "openvino"):
        name = f"sentence-transformers, backend {backend}"
        assert name not in known
        assert "make bench-rerank" in missing[name]


STAND_IN = """
class CrossEncoder:
    def __init__(self, model, backend, device, model_kwargs):
        print("a library that prints")
        assert (backend, device, model_kwargs["export"]) == ("openvino", "cpu", True)
        assert model_kwargs["ov_config"]["INFERENCE_NUM_THREADS"] == 1

    def predict(self, pairs, activation_fn, show_progress_bar):
        import numpy
        if pairs[0][0] == "die":
            raise SystemExit("out of memory")
        if pairs[0][0] == "fail":
            raise ValueError("no such question")
        return numpy.array([len(question) + len(passage) for question, passage in pairs], numpy.float32)

    def rank(self, question, passages, show_progress_bar):
        print("ranking", question)
"""


@pytest.fixture
def a_process(rerank, tmp_path, monkeypatch):
    """A backend in another process, around a stand-in for sentence-transformers."""
    from benchmarks import backend_process

    (tmp_path / "sentence_transformers.py").write_text(STAND_IN)
    (tmp_path / "passages.json").write_text(json.dumps(["a", "bcd"]))
    script = tmp_path / "backend_process.py"  # a script's own folder is where it imports from first
    packages = 'BACKENDS["openvino"] = ()\n_ALWAYS = ("torch",)\n\n\nif __name__'
    script.write_text(Path(backend_process.__file__).read_text().replace("if __name__", packages))
    monkeypatch.setattr(backend_process, "__file__", str(script))
    return backend_process.BackendProcess(
        Path(sys.executable), "openvino", tmp_path / "model", tmp_path / "passages.json", 1
    )


def test_a_backend_in_a_process_of_its_own(a_process):
    assert a_process.versions == {"torch": torch.__version__}
    assert a_process.scores("what").tolist() == [5.0, 7.0]
    assert a_process.rank("what") is None
    with pytest.raises(RuntimeError, match="ValueError: no such question"):
        a_process.scores("fail")
    assert a_process.scores("who").tolist() == [4.0, 6.0]  # it goes on
    with pytest.raises(RuntimeError, match=r"its process ended \(1\): out of memory"):
        a_process.scores("die")
    with pytest.raises(RuntimeError, match="its process ended"):
        a_process.rank("what")


@pytest.mark.full
def test_the_example(folder):
    command = [ROOT / "examples/rerank.py", "What is a file?", "--model", folder, "--passages", "12"]
    done = forks.python(*command, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "12 passages" in done.stdout
    assert len(re.findall(r"^0\.\d{4}  ", done.stdout, re.MULTILINE)) == 5
    found = re.search(r"largest difference of a score: (\S+)", done.stdout)
    assert found is not None
    assert float(found[1]) < 1e-5
