"""The examples that need Ray run, and do what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from encoding.cases import TEXTS, write

import roberta_kernels as rk

ROOT = Path(__file__).parents[2]


def run(name, *arguments):
    """As a user does, on a cluster of its own: what other tests did to theirs is not this one's."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "RAY_ADDRESS": "local"}
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_encode_with_ray(load, folder, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    path = write(source / "texts.jsonl", TEXTS)
    path.write_text(path.read_text().replace('"body"', '"text"'))
    said = run("encode_with_ray.py", source, tmp_path / "out", "--model", folder, "--workers", 1)
    assert f"{len(TEXTS)} rows with the columns text, embedding, error" in said
    table = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "out")
    alone = rk.encode(*load(), TEXTS, normalize=True).embeddings
    by_text = dict(zip(TEXTS, alone, strict=True))
    for row in table.to_pylist():
        np.testing.assert_array_equal(np.array(row["embedding"], np.float32), by_text[row["text"]])


def benchmark(name, folder):
    """The results of a smoke run, from its file."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "benchmarks", name, "--smoke", "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / f"{name}.json").read_text())
    assert results["quick"] is True
    return results


def test_serve(tmp_path):
    """examples/serve.py, as the benchmark runs it."""
    (turn,) = benchmark("service", tmp_path)["turns"]
    assert list(turn) == ["stock", "patched"]
    for found in turn.values():
        assert found["requests_per_s"] > 0
        assert 0 < found["p50_ms"] <= found["p99_ms"]
        assert found["refused"] == 0


def test_the_benchmark(tmp_path):
    results = benchmark("cluster", tmp_path)
    assert results["start_s"] > 0
    for turn in results["tokens_per_s"]:
        assert 0 < turn["whole_run"] < turn["workers"]
        assert turn["alone"] > 0
