from __future__ import annotations

import json

import pytest
import torch
import transformers

import roberta_kernels as rk
from encoding.cases import SMALL, TEXTS, Stop
from roberta_kernels.demo import corpus


@pytest.fixture(scope="module")
def tokenizer():
    return corpus.train_tokenizer(TEXTS, 400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A model with a head, and its tokenizer, as files."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=400,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=66,
    )
    path = tmp_path_factory.mktemp("model")
    model = transformers.RobertaForMaskedLM(config)
    for parameter in model.parameters():  # RobertaModel's own start is so small that every text embeds alike
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def model(folder):
    return transformers.RobertaForMaskedLM.from_pretrained(folder)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": text, "body": text[::-1]}) for text in TEXTS]
    lines[20] = '{"text": null}'
    lines[3] = "not JSON"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def interrupted(model, tokenizer, file, tmp_path, monkeypatch):
    """An output that stopped half way."""
    with monkeypatch.context() as patched:
        Stop(patched, 9)
        with pytest.raises(KeyboardInterrupt):
            rk.encode(model, tokenizer, file, tmp_path / "out.npy", **SMALL)
    return tmp_path / "out.npy"
