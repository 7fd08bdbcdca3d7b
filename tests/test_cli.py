"""The command: exit codes, one-line errors, real loading from a folder."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from typer.testing import CliRunner

import roberta_kernels as rk
from roberta_kernels import backends, ops
from roberta_kernels.cli import commands, loading, options
from roberta_kernels.demo import corpus

RUN = CliRunner()


def invoke(*arguments: object):
    return RUN.invoke(commands.app, [str(argument) for argument in arguments])


def one_line_error(result) -> str:
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def tokenizer():
    return corpus.train_tokenizer(["one small text", *loading.SENTENCES], 400)


@pytest.fixture
def folder(tmp_path, tokenizer):
    return save(tmp_path, "RobertaForSequenceClassification", tokenizer)


def save(folder, architecture: str, tokenizer=None, **options):
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=400,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=66,
        **options,
    )
    getattr(transformers, architecture)(config).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def test_version_and_help():
    assert rk.__version__ in invoke("--version").output
    text = invoke("--help").output
    for command in ("env", "demo", "verify", "encode", "bench"):
        assert command in text


def test_env_names_every_backend():
    result = invoke("env")
    assert result.exit_code == 0
    for word in ("torch", "transformers", *rk.available_backends()):
        assert word in result.output


def test_verify_a_folder_with_a_tokenizer(folder):
    result = invoke("verify", folder)
    assert result.exit_code == 0, result.output
    assert "RobertaForSequenceClassification" in result.output
    assert f"{len(loading.SENTENCES)} sequences" in result.output
    assert "The promise holds" in result.output


@pytest.mark.parametrize("task", [task.value for task in options.Task])
def test_verify_for_every_task(folder, task):
    result = invoke("verify", folder, "--task", task)
    assert result.exit_code == 0, result.output


def test_verify_without_a_tokenizer_takes_random_ids(tmp_path):
    result = invoke("verify", save(tmp_path, "RobertaForMaskedLM"), "--dtype", "bfloat16", "--gradients")
    assert result.exit_code == 0, result.output
    assert "bfloat16" in result.output
    assert "gradient" in result.output


def test_verify_on_the_users_text(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one line\n\nand another\n", encoding="utf-8")
    result = invoke("verify", folder, "--text", text, "--sentence", "third", "--backend", "reference", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["batch"].startswith("3 sequences")
    assert report["backend"].startswith("reference")


def test_weights_that_are_not_in_the_files_are_named(tmp_path, tokenizer):
    folder = save(tmp_path, "RobertaForMaskedLM", tokenizer)
    result = invoke("verify", folder, "--task", "token-classification")
    assert result.exit_code == 0, result.output
    assert "random values: classifier.bias" in result.output


def test_verify_exits_1_on_a_broken_layer(folder, monkeypatch):
    right = ops.embedding_layer_norm
    monkeypatch.setattr(ops, "embedding_layer_norm", lambda *args, **kwargs: right(*args, **kwargs) * 1.001)
    result = invoke("verify", folder)
    assert result.exit_code == 1
    assert "BROKEN" in result.output


@pytest.mark.skipif(backends.missing_op("cpu", "encoder") is not None, reason="no compiled CPU kernels")
def test_verify_quantised(folder):
    result = invoke("verify", folder, "--quantization", "int8")
    assert result.exit_code == 0, result.output
    assert "The int8 weights are not held to it" in result.output
    assert "float32 model on a CPU" in one_line_error(
        invoke("verify", folder, "--quantization", "int8", "--dtype", "bfloat16")
    )


def test_damaged_folders_are_bad_input(folder, tmp_path):
    assert "no folder" in one_line_error(invoke("verify", tmp_path / "nowhere"))
    assert "is a file" in one_line_error(invoke("verify", folder / "config.json"))

    config, weights = folder / "config.json", folder / "model.safetensors"
    whole = config.read_bytes(), weights.read_bytes()
    weights.write_bytes(whole[1][:100])
    assert "cannot load" in one_line_error(invoke("verify", folder))
    weights.write_bytes(whole[1])
    config.write_bytes(whole[0][:20])
    assert "cannot load" in one_line_error(invoke("verify", folder))
    shape = json.loads(whole[0])
    shape["hidden_size"] = 64
    config.write_text(json.dumps(shape))
    assert "cannot load" in one_line_error(invoke("verify", folder))
    config.unlink()
    assert "cannot load" in one_line_error(invoke("verify", folder))


def test_bad_requests_are_one_line(folder, tmp_path, tokenizer):
    assert "cannot read" in one_line_error(invoke("verify", folder, "--text", tmp_path / "nothing.txt"))
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    assert "no text" in one_line_error(invoke("verify", folder, "--text", empty))
    assert "no such device" in one_line_error(invoke("verify", folder, "--device", "abacus"))
    if not rk.available_backends()["cuda"]:
        assert "not available" in one_line_error(invoke("verify", folder, "--backend", "cuda"))
    bare = save(tmp_path / "bare", "RobertaModel")
    assert "no tokenizer" in one_line_error(invoke("verify", bare, "--sentence", "text"))


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    larger = corpus.train_tokenizer([" ".join(loading.SENTENCES)], 600)
    folder = save(tmp_path, "RobertaModel", larger)
    result = invoke("verify", folder, "--sentence", loading.SENTENCES[-1])
    assert "not this model's" in one_line_error(result)


def test_a_model_with_nothing_to_patch_is_refused(tmp_path):
    config = transformers.AlbertConfig(
        vocab_size=50, embedding_size=16, hidden_size=16, intermediate_size=32, num_attention_heads=2
    )
    transformers.AlbertModel(config).save_pretrained(tmp_path)
    assert "nothing to replace" in one_line_error(invoke("verify", tmp_path))


def test_bench_without_a_checkout_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(commands, "__file__", str(tmp_path / "site" / "roberta_kernels" / "cli" / "commands.py"))
    assert "source checkout" in one_line_error(invoke("bench"))


@pytest.mark.parametrize("package", ["matplotlib", "tokenizers"])
def test_the_demo_names_what_it_needs(monkeypatch, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    assert "pip install roberta_kernels[demo]" in one_line_error(invoke("demo"))
