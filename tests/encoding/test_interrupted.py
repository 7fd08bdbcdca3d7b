"""However often it is stopped, the same file; and what cannot be continued is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import roberta_kernels as rk
from encoding.cases import SMALL, TEXTS, Stop, read, right_embed
from roberta_kernels.demo import corpus
from roberta_kernels.encoding import embedding, outputs


@pytest.mark.parametrize("out", ["out.npy", "out.parquet"])
def test_interrupted_and_continued_is_the_same_file(model, tokenizer, file, tmp_path, monkeypatch, out):
    if out == "out.parquet":
        pytest.importorskip("pyarrow")
    whole, path = tmp_path / f"whole-{out}", tmp_path / out
    counted = Stop(monkeypatch)
    expected = rk.encode(model, tokenizer, file, whole, **SMALL)
    batches = counted.calls
    assert batches > 8
    done = 0
    for after, error in ((0, KeyboardInterrupt), (3, KeyboardInterrupt), (4, RuntimeError)):
        stop = Stop(monkeypatch, after, error)
        with pytest.raises(error):
            rk.encode(model, tokenizer, file, path, **SMALL)
        done += stop.calls
        assert not path.exists()
        assert not rk.is_patched(model)
    rest = Stop(monkeypatch)
    report = rk.encode(model, tokenizer, file, path, **SMALL)
    assert done + rest.calls == batches  # nothing twice
    assert report.resumed > 0
    assert path.read_bytes() == whole.read_bytes()
    errors = outputs.beside(path, ".errors.jsonl")
    assert errors.read_bytes() == outputs.beside(whole, ".errors.jsonl").read_bytes()
    for name in ("texts", "tokens", "padding_avoided", "bad", "truncated", "bad_rows"):
        assert getattr(report, name) == getattr(expected, name)
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {file.name, *(p.name for p in (path, whole, errors, outputs.beside(whole, ".errors.jsonl")))}


def test_an_interrupt_at_any_point_of_saving_keeps_the_file_whole(model, tokenizer, file, tmp_path, monkeypatch):
    """Interrupts come between any two steps: here before and after each that changes a file or the state."""
    whole = tmp_path / "whole.npy"
    rk.encode(model, tokenizer, file, whole, **SMALL)
    monkeypatch.setattr(outputs, "SAVE_EVERY", 0.0)
    steps = [(name, before) for name in ("start_window", "_put", "write", "end_window", "_save") for before in (0, 1)]
    for number, (name, before) in enumerate(steps):
        path, calls = tmp_path / f"out{number}.npy", 0
        right = getattr(outputs.FileOutput, name)

        def step(self, *args, right=right, before=before):
            nonlocal calls
            calls += 1
            if calls == 3 and before:
                raise KeyboardInterrupt
            result = right(self, *args)
            if calls == 3:
                raise KeyboardInterrupt
            return result

        with monkeypatch.context() as patched:
            patched.setattr(outputs.FileOutput, name, step)
            with pytest.raises(KeyboardInterrupt):
                rk.encode(model, tokenizer, file, path, **SMALL)
        rk.encode(model, tokenizer, file, path, **SMALL)
        assert path.read_bytes() == whole.read_bytes(), name


def test_interrupted_while_the_parquet_file_is_written(model, tokenizer, file, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    path = tmp_path / "out.parquet"
    with monkeypatch.context() as patched:
        write_parquet = outputs.FileOutput._write_parquet

        def interrupted(self, new):
            write_parquet(self, new)
            raise KeyboardInterrupt

        patched.setattr(outputs.FileOutput, "_write_parquet", interrupted)
        with pytest.raises(KeyboardInterrupt):
            rk.encode(model, tokenizer, file, path, **SMALL)
    assert not path.exists()
    rest = Stop(monkeypatch)
    report = rk.encode(model, tokenizer, file, path, **SMALL)
    assert rest.calls == 0
    assert report.resumed == report.texts == len(read(path)) == len(TEXTS)


# Once there is something to continue from it waits to be killed: however fast or busy the machine, it does not end.
KILLED = """
import json, sys, time, torch, transformers
torch.set_num_threads(1)
import roberta_kernels as rk
from pathlib import Path
from roberta_kernels.encoding import embedding, outputs
outputs.SAVE_EVERY = 0.0
embed = embedding.embed
folder, source, out = sys.argv[1:]
state = outputs.beside(Path(out), ".state.json")
def waiting(*args):
    while state.exists() and json.loads(state.read_text())["state"]["blocks"]:
        time.sleep(1)
    return embed(*args)
embedding.embed = waiting
model = transformers.RobertaForMaskedLM.from_pretrained(folder)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
rk.encode(model, tokenizer, Path(source), out, window=16, batch_tokens=100)
"""


def test_killed_and_continued_is_the_same_file(model, tokenizer, folder, file, tmp_path):
    whole, path = tmp_path / "whole.npy", tmp_path / "out.npy"
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rk.encode(model, tokenizer, file, whole, **SMALL)
        package = str(Path(rk.__file__).resolve().parent.parent)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
        process = subprocess.Popen([sys.executable, script, folder, file, path], env=environment)
        state, rows = outputs.beside(path, ".state.json"), 0
        deadline = time.monotonic() + 600
        while rows == 0 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
            if state.exists():
                rows = sum(block["rows"] for block in json.loads(state.read_text())["state"]["blocks"])
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL  # and had not ended by itself
        assert not path.exists()
        report = rk.encode(
            model, transformers.AutoTokenizer.from_pretrained(folder), file, path, **SMALL
        )  # as another process would
    finally:
        torch.set_num_threads(threads)
    assert report.resumed >= rows > 0
    assert path.read_bytes() == whole.read_bytes()


def change_input(model, tokenizer, file):
    file.write_text(file.read_text().replace("seven", "eight"), encoding="utf-8")


def change_model(model, tokenizer, file):
    with torch.no_grad():
        model.roberta.encoder.layer[1].output.dense.weight[3, 5] += 1e-6


def change_config(model, tokenizer, file):
    model.config.layer_norm_eps = 1e-3


@pytest.mark.parametrize(
    ("change", "options", "named"),
    [
        (change_input, {}, "input"),
        (change_model, {}, "model"),
        (change_config, {}, "model"),
        (None, {"format": "text"}, "format"),
        (None, {"field": "body"}, "field"),
        (None, {"pooling": "cls"}, "pooling"),
        (None, {"normalize": True}, "normalize"),
        (None, {"dtype": "float16"}, "dtype"),
        (None, {"max_length": 9}, "max_length"),
        (None, {"batch_tokens": 101}, "batch_tokens"),
        (None, {"window": 17}, "window"),
        (None, {"patch": False}, "kernels"),
        (None, {"backend": "reference"}, "kernels"),
    ],
)
def test_what_changed_is_refused_and_named(model, tokenizer, file, interrupted, change, options, named):
    if change is not None:
        change(model, tokenizer, file)
    before = {path: path.read_bytes() for path in interrupted.parent.iterdir()}
    with pytest.raises(rk.EncodingError, match=rf"differs in: .*\b{named} \(was .*overwrite"):
        rk.encode(model, tokenizer, file, interrupted, **(SMALL | options))
    assert {path: path.read_bytes() for path in interrupted.parent.iterdir()} == before
    report = rk.encode(model, tokenizer, file, interrupted, overwrite=True, **(SMALL | options))
    assert report.resumed == 0
    assert report.texts == len(TEXTS)


def test_another_tokenizer_is_refused(model, file, interrupted):
    other = corpus.train_tokenizer(["nothing of it"], 300)
    with pytest.raises(rk.EncodingError, match="differs in: tokenizer"):
        rk.encode(model, other, file, interrupted, **SMALL)


def test_damaged_states_are_refused(model, tokenizer, file, interrupted):
    state = outputs.beside(interrupted, ".state.json")
    good = state.read_text()
    for damage in (
        *("", "{", "[]", "{}", good.replace('"rows"', '"rose"'), good.replace('"batches": ', '"batches": "')),
        *(good.replace('"checksum": ', '"checksum": -'), good.replace('"rows": ', '"rows": 0.5, "r": ')),
    ):
        state.write_text(damage)
        with pytest.raises(rk.EncodingError, match="damaged"):
            rk.encode(model, tokenizer, file, interrupted, **SMALL)
    state.write_text(good)
    with pytest.raises(rk.EncodingError, match="iterator cannot continue"):
        rk.encode(model, tokenizer, iter(TEXTS), interrupted, **SMALL)


def test_an_iterator_leaves_nothing_behind(model, tokenizer, tmp_path, monkeypatch):
    Stop(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        rk.encode(model, tokenizer, iter([*TEXTS, None]), tmp_path / "out.npy", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_an_output_is_not_overwritten_unasked(model, tokenizer, file, tmp_path):
    path = tmp_path / "out.npy"
    path.write_bytes(b"precious")
    with pytest.raises(rk.EncodingError, match="exists"):
        rk.encode(model, tokenizer, file, path)
    assert path.read_bytes() == b"precious"
    assert not outputs.beside(path, ".partial").exists()
    rk.encode(model, tokenizer, file, path, overwrite=True)
    assert np.load(path).shape == (len(TEXTS), 32)


def test_two_runs_into_one_file_are_refused(model, tokenizer, file, tmp_path, monkeypatch):
    pytest.importorskip("fcntl")
    refused = []

    def embed(*args):
        if not refused:
            refused.append(True)
            for options in ({}, {"overwrite": True}):
                with pytest.raises(rk.EncodingError, match="another run"):
                    rk.encode(model, tokenizer, file, tmp_path / "out.npy", **options, **SMALL)
        return right_embed(*args)

    monkeypatch.setattr(embedding, "embed", embed)
    rk.patch(model)
    rk.encode(model, tokenizer, file, tmp_path / "out.npy", **SMALL)
    expected = rk.encode(model, tokenizer, file, **SMALL).embeddings
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)


def test_a_file_that_changes_under_the_run_is_noticed(model, tokenizer, file, tmp_path, monkeypatch):
    def embed(*args):
        os.truncate(file, file.stat().st_size - 100)
        return right_embed(*args)

    monkeypatch.setattr(embedding, "embed", embed)
    with pytest.raises(rk.EncodingError, match="changed while it was read"):
        rk.encode(model, tokenizer, file, tmp_path / "out.npy", **SMALL)
    assert list(tmp_path.iterdir()) == [file]  # what of it was encoded cannot be told


def test_a_list_that_changes_under_the_run_is_noticed(model, tokenizer, tmp_path, monkeypatch):
    texts = TEXTS.copy()

    def embed(*args):
        texts.pop()
        return right_embed(*args)

    monkeypatch.setattr(embedding, "embed", embed)
    with pytest.raises(rk.EncodingError, match="changed while they were read"):
        rk.encode(model, tokenizer, texts, tmp_path / "out.npy", **SMALL)
    assert list(tmp_path.iterdir()) == []
