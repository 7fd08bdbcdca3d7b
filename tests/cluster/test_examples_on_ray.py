"""The examples that need Ray run, and do what they say."""

from __future__ import annotations

import json
import os
import re
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
    told = run("encode_with_ray.py", source, tmp_path / "out", "--model", folder, "--workers", 1)
    assert f"{len(TEXTS)} rows with the columns text, embedding, error" in told
    table = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "out")
    alone = rk.encode(*load(), TEXTS, normalize=True).embeddings
    by_text = dict(zip(TEXTS, alone, strict=True))
    for row in table.to_pylist():
        np.testing.assert_array_equal(np.array(row["embedding"], np.float32), by_text[row["text"]])


def test_serve(folder):
    told = run("serve.py", "--model", folder, "--seconds", 2, "--clients", 4)
    for name in ("stock", "patched"):
        found = re.search(
            rf"^{name}: ([\d.]+) requests/s, p50 ([\d.]+) ms, p99 ([\d.]+) ms, 0 refused", told, re.MULTILINE
        )
        assert found is not None, told
        rate, half, most = map(float, found.groups())
        assert rate > 0
        assert 0 < half <= most


def test_the_benchmark(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "benchmarks", "cluster", "--smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "cluster.json").read_text())
    assert results["quick"] is True
    assert results["start_s"] > 0
    for turn in results["tokens_per_s"]:
        assert 0 < turn["whole_run"] < turn["workers"]
        assert turn["alone"] > 0
