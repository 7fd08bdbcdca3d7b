"""What cannot be carried out is refused, in a sentence."""

from __future__ import annotations

import sys

import pytest
import torch
import transformers

import roberta_kernels as rk
from encoding.cases import TEXTS, write
from roberta_kernels.demo import corpus


def test_bad_requests(model, tokenizer, tmp_path, monkeypatch):
    for options in ({"pooling": "sum"}, {"dtype": "bfloat16"}, {"window": 0}, {"batch_tokens": 0}, {"max_length": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            rk.encode(model, tokenizer, TEXTS, **options)
    with pytest.raises(ValueError, match=r"max_length must be at most 64.*got 65"):
        rk.encode(model, tokenizer, TEXTS, max_length=65)
    with pytest.raises(TypeError, match="the one inside it"):
        rk.encode(torch.nn.Sequential(model), tokenizer, TEXTS)
    t5 = transformers.T5Config(vocab_size=400, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(rk.EncodingError, match="pass its encoder"):
        rk.encode(transformers.T5Model(t5), tokenizer, TEXTS)
    with pytest.raises(rk.EncodingError, match=r"\.npy or \.parquet"):
        rk.encode(model, tokenizer, TEXTS, tmp_path / "out.csv")
    with pytest.raises(rk.EncodingError, match="does not say its format"):
        rk.encode(model, tokenizer, tmp_path / "in.csv")
    with pytest.raises(FileNotFoundError):
        rk.encode(model, tokenizer, tmp_path / "in.txt")
    with pytest.raises(rk.EncodingError, match="not this model's"):
        rk.encode(model, corpus.train_tokenizer(TEXTS, 900), TEXTS)
    with pytest.raises(rk.BackendError):
        rk.encode(model, tokenizer, TEXTS, backend="abacus")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for texts, out in ((tmp_path / "in.parquet", "out.npy"), (TEXTS, "out.parquet")):
        with pytest.raises(rk.EncodingError, match=r"pip install roberta_kernels\[parquet\]"):
            rk.encode(model, tokenizer, texts, tmp_path / out)
    assert list(tmp_path.iterdir()) == []


def test_the_input_is_not_overwritten(model, tokenizer, tmp_path):
    pytest.importorskip("pyarrow")
    path = write(tmp_path / "in.parquet", TEXTS)
    with pytest.raises(rk.EncodingError, match="both the input and the output"):
        rk.encode(model, tokenizer, path, path, field="body", overwrite=True)
