"""What the tests of encode have in common: texts, the right answer, files, and a run that is stopped."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from roberta_kernels.cli import commands, loading
from roberta_kernels.encoding import embedding

TEXTS = [
    *loading.SENTENCES,
    "",
    " ",
    *(" ".join(random.Random(i).choices(("the", "ferry", "leaves", "at", "seven", "là"), k=i)) for i in range(1, 40)),
]
SMALL = {"window": 16, "batch_tokens": 100}  # several windows, and several batches in each


def one_by_one(model, tokenizer, texts):
    """Token vectors by the book: no padding, no batches."""
    rows = []
    for text in texts:
        batch = tokenizer([text], truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            rows.append(model.base_model(**batch).last_hidden_state[0])
    return rows


def pooled(rows, pooling, normalize=False):
    pool = {"mean": lambda row: row.mean(0), "cls": lambda row: row[0], "max": lambda row: row.max(0).values}[pooling]
    return torch.stack([pool(row) / pool(row).norm() if normalize else pool(row) for row in rows])


def write(path: Path, texts: list[str | None]) -> Path:
    if path.suffix == ".txt":
        path.write_bytes("".join(f"{text}\n" for text in texts).encode())
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"id": range(len(texts)), "body": texts}), path, row_group_size=7)
    return path


def read(path: Path, dtype=np.float32) -> np.ndarray:
    if path.suffix == ".npy":
        return np.load(path)
    column = pytest.importorskip("pyarrow.parquet").read_table(path)["embedding"].combine_chunks()
    width = column.type.list_size
    return np.array([np.full(width, np.nan) if row is None else row for row in column.to_pylist()], dtype)


right_embed = embedding.embed


class Stop:
    """embedding.embed, interrupted after some calls; it counts them."""

    def __init__(self, monkeypatch, after: int | None = None, error: type[BaseException] = KeyboardInterrupt):
        self.calls, self._after, self._error = 0, after, error
        self._embed = right_embed
        monkeypatch.setattr(embedding, "embed", self)

    def __call__(self, *args):
        if self.calls == self._after:
            raise self._error
        self.calls += 1
        return self._embed(*args)


def invoke(*arguments: object):
    return CliRunner().invoke(commands.app, ["encode", *(str(argument) for argument in arguments)])
