"""The command: the same as the function, and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import transformers

import roberta_kernels as rk
from encoding.cases import TEXTS, Stop, invoke
from roberta_kernels import backends
from roberta_kernels.encoding import outputs


def test_the_command(model, tokenizer, folder, file, tmp_path):
    result = invoke(file, tmp_path / "out.npy", "--model", folder, "--pooling", "cls", "--normalize", "--window", 16)
    assert result.exit_code == 0, result.output
    assert "tokens/s" in result.output
    assert "line 4: not JSON" in result.output
    assert "random values" not in result.stderr  # the pooler's, which is not used
    expected = rk.encode(model, tokenizer, file, pooling="cls", normalize=True, window=16)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected.embeddings)

    again = (file, tmp_path / "out.npy", "--model", folder, "--output-dtype", "float16", "--json")
    assert invoke(*again).exit_code == 2
    result = invoke(*again, "--overwrite", "--original", "--max-length", 16, "--batch-tokens", 64)
    report = json.loads(result.stdout)
    assert (report["texts"], report["bad"], report["packed"]) == (len(TEXTS), 2, False)
    assert np.load(tmp_path / "out.npy").dtype == np.float16


@pytest.mark.skipif(backends.missing_op("cpu", "encoder") is not None, reason="no compiled CPU kernels")
def test_quantised(model, tokenizer, folder, file, tmp_path):
    plain = rk.encode(model, tokenizer, file)
    report = rk.encode(model, tokenizer, file, quantization="int8")
    assert report.quantization == "int8"
    assert report.packed
    assert "rounded to int8" in str(report)
    assert not rk.is_patched(model)
    good = ~np.isnan(plain.embeddings).any(1)
    errors = np.abs(report.embeddings - plain.embeddings)[good]
    assert 1e-5 < errors.max() < 0.3

    command = (file, tmp_path / "out.npy", "--model", folder, "--quantization", "int8")
    assert invoke(*command).exit_code == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), report.embeddings)
    with pytest.raises(ValueError, match="does not patch"):
        rk.encode(model, tokenizer, file, quantization="int8", patch=False)
    result = invoke(file, tmp_path / "b.npy", "--model", folder, "--quantization", "int8", "--dtype", "bfloat16")
    assert result.exit_code == 2
    assert "float32 model on a CPU" in result.stderr


@pytest.mark.skipif(backends.missing_op("cpu", "encoder") is not None, reason="no compiled CPU kernels")
def test_a_run_is_not_continued_with_other_weights(folder, file, tmp_path, monkeypatch):
    command = (file, tmp_path / "out.npy", "--model", folder, "--batch-tokens", 64, "--window", 8)
    with monkeypatch.context() as patched:
        Stop(patched, 3)
        invoke(*command)
    result = invoke(*command, "--quantization", "int8")
    assert result.exit_code == 2
    assert "kernels" in result.stderr


def test_the_command_interrupted_goes_on(folder, file, tmp_path, monkeypatch):
    command = (file, tmp_path / "out.npy", "--model", folder, "--batch-tokens", 64, "--window", 8)
    with monkeypatch.context() as patched:
        Stop(patched, 3)
        result = invoke(*command)
    assert result.exit_code == 130
    assert "the same command" in result.stderr
    result = invoke(*command)
    assert result.exit_code == 0, result.output
    assert "by an earlier run" in result.output


def test_bad_commands_are_one_line(folder, file, tmp_path):
    for arguments, message in (
        ((tmp_path / "none.txt", "out.npy", "--model", folder), "No such file"),
        ((file, "out.csv", "--model", folder), ".npy or .parquet"),
        ((tmp_path, "out.npy", "--model", folder), "does not say its format"),
        ((tmp_path, "out.npy", "--model", folder, "--format", "text"), "Is a directory"),
        ((file, tmp_path / "no" / "out.npy", "--model", folder), "No such file"),
        ((file, "out.npy", "--model", tmp_path / "nowhere"), "no folder"),
        ((file, "out.npy", "--model", folder, "--max-length", 100), "must be at most 64"),
        ((file, "out.npy", "--model", folder, "--device", "abacus"), "no such device"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2, result.output
        lines = result.stderr.strip().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        assert message in lines[0]


def test_no_row_with_a_text_is_an_error(folder, file, tmp_path):
    result = invoke(file, tmp_path / "out.npy", "--model", folder, "--field", "words")
    assert result.exit_code == 2, result.output
    assert "none of the" in result.stderr
    assert "line 1: no field 'words'" in result.stderr
    assert not (tmp_path / "out.npy").exists()


def test_a_folder_without_a_tokenizer_gets_advice_about_encode(folder, file, tmp_path):
    bare = tmp_path / "bare"
    transformers.AutoModel.from_pretrained(folder).save_pretrained(bare)
    result = invoke(file, tmp_path / "out.npy", "--model", bare)
    assert result.exit_code == 2, result.output
    line = " ".join(result.stderr.split())
    assert "has no tokenizer" in line
    assert "tokenizer.save_pretrained" in line
    assert "random token ids" not in line


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="no /dev/fd here")
def test_a_pipe_as_input(model, tokenizer, folder, tmp_path, monkeypatch):
    expected = rk.encode(model, tokenizer, TEXTS[:4]).embeddings

    def pipe():
        reader, writer = os.pipe()
        os.write(writer, "".join(f"{text}\n" for text in TEXTS[:4]).encode())
        os.close(writer)
        return f"/dev/fd/{reader}"

    command = (tmp_path / "out.npy", "--model", folder, "--format", "text")
    with monkeypatch.context() as patched:
        Stop(patched, 0)
        result = invoke(pipe(), *command)
    assert result.exit_code == 130
    assert "nothing is kept" in result.stderr
    assert list(tmp_path.iterdir()) == []
    result = invoke(pipe(), *command)
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_a_process_that_is_interrupted_can_be_continued(model, tokenizer, folder, tmp_path):
    source, out = tmp_path / "in.txt", tmp_path / "out.npy"
    source.write_text("the ferry leaves at seven\n" * 4000)
    package = str(Path(rk.__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
    options = ["--model", str(folder), "--batch-tokens", "1", "--threads", "1"]
    command = [sys.executable, "-m", "roberta_kernels", "encode", str(source), str(out), *options]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not outputs.beside(out, ".state.json").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=300)[1]
    assert (process.returncode, message) == (130, "interrupted; the same command continues it\n")
    assert not out.exists()
    result = invoke(source, out, *options[:-2])
    assert result.exit_code == 0, result.output
    assert np.load(out).shape == (4000, 32)


def test_a_pipe_that_gives_nothing_can_be_interrupted(folder, tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes here")
    package = str(Path(rk.__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
    pipe, out = tmp_path / "in.txt", tmp_path / "out.npy"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "roberta_kernels", "encode", str(pipe), str(out), "--model", str(folder)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    with open(pipe, "wb"):  # when it begins to read
        process.send_signal(signal.SIGINT)
        message = process.communicate(timeout=300)[1]
    assert (process.returncode, message) == (130, "interrupted; nothing is kept: its input was a pipe\n")
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]
