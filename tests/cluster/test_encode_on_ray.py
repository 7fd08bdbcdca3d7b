"""A corpus on a cluster: the bits of one machine, whatever dies, is cut short or cannot be read on the way."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from encoding.cases import TEXTS, invoke, write

import roberta_kernels as rk
from roberta_kernels import ray as rk_ray
from roberta_kernels.encoding import EncodingError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

SMALL = {"window": 16, "field": "body"}
ROOT = Path(__file__).parents[2]


@pytest.fixture
def corpus(tmp_path):
    """Files of all formats, in folders; rows without a text in two of them."""
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    write(folder / "a.txt", TEXTS)
    lines = write(folder / "b.jsonl", TEXTS).read_text().splitlines(keepends=True)
    lines[3], lines[20] = "not JSON\n", '{"body": null}\n'
    (folder / "b.jsonl").write_text("".join(lines))
    write(folder / "deep/c.parquet", [*TEXTS[:7], None, *TEXTS[8:]])
    (folder / "_SUCCESS").write_text("")
    return folder


def whole(output):
    """The parts in order, as one table."""
    return pyarrow.concat_tables(parquet.read_table(path) for path in sorted(output.glob("part-*.parquet")))


def vectors(table):
    width = table.schema.field("embedding").type.list_size
    rows = [np.full(width, np.nan) if row is None else row for row in table["embedding"].to_pylist()]
    return np.array(rows, np.float32)


def expected(load, path):
    return rk.encode(*load(), path, **SMALL)


def test_the_same_bits_as_on_one_machine(cluster, load, corpus, tmp_path):
    report = rk_ray.encode(load, corpus, tmp_path / "out", workers=2, **SMALL)
    table = whole(tmp_path / "out")
    assert table.column_names == ["file", "row", "embedding", "error"]
    order = list(zip(table["file"].to_pylist(), table["row"].to_pylist(), strict=True))
    names = ["a.txt", "b.jsonl", "deep/c.parquet"]
    assert order == [(name, row) for name in names for row in range(len(TEXTS))]
    sums = dict.fromkeys(("tokens", "bad", "texts"), 0)
    for number, name in enumerate(names):
        part = table.slice(number * len(TEXTS), len(TEXTS))
        alone = expected(load, corpus / name)
        np.testing.assert_array_equal(vectors(part), alone.embeddings)
        errors = {row: reason for row, reason in enumerate(part["error"].to_pylist()) if reason is not None}
        assert errors == dict(alone.bad_rows)
        for key in sums:
            sums[key] += getattr(alone, key)
    assert {key: getattr(report, key) for key in sums} == sums
    assert report.bad == 3
    assert [(name, row) for name, row, _ in report.bad_rows] == [("b.jsonl", 3), ("b.jsonl", 20), ("deep/c.parquet", 7)]
    assert "b.jsonl, line 4: not JSON" in str(report)
    assert report.packed
    assert (report.files, report.resumed) == (3, 0)
    assert report.partitions == len(list((tmp_path / "out").iterdir())), "nothing else is left there"
    json.dumps(report.as_dict())


def test_a_worker_that_is_killed_in_the_middle(cluster, load, tmp_path):
    source, output, loaded = write(tmp_path / "in.txt", TEXTS * 12), tmp_path / "out", tmp_path / "loaded"
    loaded.mkdir()
    here = os.getpid()

    def killed():
        """The first worker that loads dies once there are three parts."""

        def kill():
            while len(list(output.glob("part-*.parquet"))) < 3:
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGKILL)

        if os.getpid() != here:
            first = not list(loaded.iterdir())
            (loaded / str(os.getpid())).touch()
            if first:
                threading.Thread(target=kill, daemon=True).start()
        return load()

    report = rk_ray.encode(killed, source, output, workers=2, window=8)
    assert len(list(loaded.iterdir())) >= 3, "another worker took its place"
    assert report.partitions == -(-12 * len(TEXTS) // 8)
    np.testing.assert_array_equal(vectors(whole(output)), rk.encode(*load(), source).embeddings)
    assert all(path.name.startswith("part-") for path in output.iterdir())


def test_what_is_whole_is_kept_and_the_rest_is_made_again(cluster, load, corpus, tmp_path):
    output = tmp_path / "out"
    rk_ray.encode(load, corpus, output, **SMALL)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    cut, changed, gone = (output / f"part-{number:06d}.parquet" for number in (0, 4, 5))
    cut.write_bytes(before[cut.name][:-100])
    content = bytearray(before[changed.name])
    content[len(content) // 3] ^= 1
    changed.write_bytes(content)
    gone.unlink()
    times = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    report = rk_ray.encode(load, corpus, output, workers=2, **SMALL)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    made = {path.name for path in output.iterdir() if path.stat().st_mtime_ns != times.get(path.name)}
    assert made == {cut.name, changed.name, gone.name}
    assert report.texts - report.resumed == sum(parquet.read_metadata(path).num_rows for path in (cut, changed, gone))
    assert report.bad == 3, "those of the earlier run are reported too"
    again = rk_ray.encode(load, corpus, output, **SMALL)
    assert again.resumed == again.texts == 3 * len(TEXTS)


def test_another_run_is_not_continued(cluster, load, corpus, tmp_path):
    output = tmp_path / "out"
    rk_ray.encode(load, corpus, output, **SMALL)
    for options in ({**SMALL, "pooling": "cls"}, {**SMALL, "window": 14}, {**SMALL, "dtype": "float16"}):
        with pytest.raises(EncodingError, match="is of a run that differs in: "):
            rk_ray.encode(load, corpus, output, **options)
    with pytest.raises(EncodingError, match=r"part-\d+.parquet, which this run does not make"):
        rk_ray.encode(load, corpus / "a.txt", output, **SMALL)
    lines = (corpus / "a.txt").read_text().splitlines(keepends=True)
    (corpus / "a.txt").write_text("".join(["another text\n", *lines[1:]]))
    with pytest.raises(EncodingError, match="differs in: content"):
        rk_ray.encode(load, corpus, output, **SMALL)
    report = rk_ray.encode(load, corpus, output, overwrite=True, **SMALL)
    assert report.resumed == 0
    np.testing.assert_array_equal(vectors(whole(output))[: len(TEXTS)], expected(load, corpus / "a.txt").embeddings)


def test_files_that_cannot_be_read_are_said_before_anything_is_encoded(cluster, load, corpus, tmp_path):
    output = tmp_path / "out"
    content = (corpus / "deep/c.parquet").read_bytes()
    (corpus / "deep/c.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(EncodingError, match=r"deep/c.parquet is not a Parquet file"):
        rk_ray.encode(load, corpus, output, **SMALL)
    assert not output.exists()
    (corpus / "deep/c.parquet").rename(corpus / "deep/c.csv")
    with pytest.raises(EncodingError, match="does not say its format"):
        rk_ray.encode(load, corpus, output, **SMALL)
    with pytest.raises(FileNotFoundError):
        rk_ray.encode(load, corpus / "nothing", output, **SMALL)
    with pytest.raises(EncodingError, match="would be read as such"):
        rk_ray.encode(load, corpus, corpus / "out", **SMALL)
    with pytest.raises(EncodingError, match="is a file"):
        rk_ray.encode(load, corpus / "a.txt", corpus / "b.jsonl", **SMALL)


def test_a_node_with_another_model_refuses_to_work(cluster, load, corpus, tmp_path):
    here = os.getpid()

    def differs():
        model, tokenizer = load()
        if os.getpid() != here:
            next(model.parameters()).data += 1
        return model, tokenizer

    with pytest.raises(EncodingError, match="is not the one that was loaded where the run was started"):
        rk_ray.encode(differs, corpus / "a.txt", tmp_path / "out", **SMALL)


def test_the_actor_in_a_pipeline_of_ones_own(cluster, load):
    import ray

    table = pyarrow.table({"id": range(len(TEXTS)), "text": [None, *TEXTS[1:]]})
    dataset = ray.data.from_arrow(table).map_batches(
        rk_ray.Encoder,
        fn_constructor_kwargs={"load": load, "normalize": True},
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    rows = sorted(dataset.take_all(), key=lambda row: row["id"])
    assert (rows[0]["embedding"], rows[0]["error"]) == (None, "null")
    alone = rk.encode(*load(), [None, *TEXTS[1:]], normalize=True).embeddings
    np.testing.assert_array_equal(np.array([row["embedding"] for row in rows[1:]], np.float32), alone[1:])
    assert all(row["error"] is None for row in rows[1:])


def test_the_command(cluster, load, folder, corpus, tmp_path):
    source, output = (corpus / "b.jsonl").as_uri(), (tmp_path / "out").as_uri()
    command = [sys.executable, "-m", "roberta_kernels", "encode", source, output, "--model", str(folder)]
    command += ["--ray", cluster, "--workers", "2", "--window", "16", "--field", "body", "--json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}

    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["texts"], report["bad"], report["workers"]) == (len(TEXTS), 2, 2)
    np.testing.assert_array_equal(vectors(whole(tmp_path / "out")), expected(load, corpus / "b.jsonl").embeddings)

    # Here Ray is connected already, and an address is not needed.
    given = ("--model", folder, "--field", "body", "--window", "16", "--json", "--ray")
    result = invoke(source, output, "--pooling", "cls", *given)
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.search(r"part-\d+.parquet is of a run that differs in: pooling", result.stderr.splitlines()[-1])
    result = invoke(corpus / "b.jsonl", tmp_path / "none", "--model", folder, "--field", "words", "--ray")
    assert result.exit_code == 2
    assert "none of the" in result.output
    assert "line 1: no field 'words'" in result.output
    assert list((tmp_path / "none").iterdir()) == []


def test_importing_does_not_import_ray():
    code = (
        "import sys, roberta_kernels, roberta_kernels.ray, roberta_kernels.cli.loading; sys.exit('ray' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=600).returncode == 0
