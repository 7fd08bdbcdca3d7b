"""What goes in: files of every format, Python objects, and what is wrong with a line."""

from __future__ import annotations

import contextlib
import copy
import gzip
import json
import lzma
import os
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import roberta_kernels as rk
from encoding.cases import SMALL, TEXTS, read, write
from roberta_kernels.encoding import embedding, sources, tokenization


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize("out", ["out.npy", "out.parquet"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_format(model, tokenizer, tmp_path, kind, out, dtype):
    if "parquet" in kind + out:
        pytest.importorskip("pyarrow")
    expected = rk.encode(model, tokenizer, TEXTS, **SMALL).embeddings.astype(dtype)
    source = write(tmp_path / f"in{kind}", TEXTS)
    report = rk.encode(model, tokenizer, source, tmp_path / out, field="body", dtype=dtype, **SMALL)
    np.testing.assert_array_equal(read(tmp_path / out, dtype), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source.name, out])
    if out == "out.npy":
        assert isinstance(report.embeddings, np.memmap)
        assert report.embeddings.dtype == dtype


@pytest.mark.parametrize("out", ["out.npy", "out.parquet"])
def test_a_corpus_of_nothing(model, tokenizer, tmp_path, out):
    if out == "out.parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / "in.txt").write_bytes(b"")
    report = rk.encode(model, tokenizer, tmp_path / "in.txt", tmp_path / out)
    assert (report.texts, report.tokens) == (0, 0)
    assert len(read(tmp_path / out)) == 0
    assert rk.encode(model, tokenizer, []).embeddings.shape == (0, 32)


def test_lines(tmp_path, monkeypatch):
    def rows(content: bytes, name: str = "in.txt"):
        (tmp_path / name).write_bytes(content)
        source = sources.open_source(tmp_path / name, None, "text")
        found = list(source.read(0))
        assert source.rows == len(found)
        assert list(source.read(2)) == found[2:]
        return [row.reason if isinstance(row, sources.Bad) else row for row in found]

    assert rows(b"\xef\xbb\xbfone\r\ntwo\n\n \nlast\x0bone\xe2\x80\xa8line") == [
        *("one", "two", "", " ", "last\x0bone\u2028line"),
    ]
    bad = rows(b"good\n\xff\xfe\ngood\n")
    assert bad[::2] == ["good", "good"]
    assert "not UTF-8" in bad[1]

    monkeypatch.setattr(sources, "LONGEST_LINE", 10)
    assert rows(b"0123456789\n012345678\n" + b"x" * 3_000_000 + b"\nnext") == [
        *("longer than 10 bytes", "012345678", "longer than 10 bytes", "next"),
    ]


BAD_JSON = {
    b"": "not JSON",
    b"{": "not JSON",
    b'{"text": NaN x}': "not JSON",
    b"[" * 200_000: "not JSON",
    b'["text"]': "not a JSON object",
    b"7": "not a JSON object",
    b'{"other": "x"}': "no field 'text'",
    b'{"text": null}': "null",
    b'{"text": 5}': "not a string: int",
    b'{"text": ["x"]}': "not a string: list",
    b'{"text": "\\ud800"}': "not text",
    b'{"text": "\xff"}': "not UTF-8",
}


@pytest.mark.parametrize("out", ["out.npy", "out.parquet"])
def test_a_bad_line_does_not_stop_the_rest(model, tokenizer, tmp_path, out):
    if out == "out.parquet":
        pytest.importorskip("pyarrow")
    good = b'{"text": "the ferry"}'
    lines = [line for bad in BAD_JSON for line in (bad, good)]
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(lines))
    report = rk.encode(model, tokenizer, path, tmp_path / out, window=5)
    found = read(tmp_path / out)
    assert report.bad == len(BAD_JSON)
    assert np.isnan(found[::2]).all()
    assert not np.isnan(found[1::2]).any()
    assert report.errors == tmp_path / f"{out}.errors.jsonl"
    entries = [json.loads(line) for line in report.errors.read_text().splitlines()]
    assert [entry["row"] for entry in entries] == list(range(0, len(lines), 2))
    assert [entry["line"] for entry in entries] == list(range(1, len(lines) + 1, 2))
    for entry, reason in zip(entries, BAD_JSON.values(), strict=True):
        assert entry["reason"].startswith(reason)
    assert "line 1: not JSON" in str(report)


def test_bad_rows_of_a_parquet_file(model, tokenizer, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    damaged = pyarrow.array([b"the ferry", b"\xff", None, b"leaves"]).cast(pyarrow.binary()).view(pyarrow.string())
    kinds = {
        "text": damaged,
        "large": damaged.cast(pyarrow.large_string()),
        "dictionary": damaged.dictionary_encode(),
        "number": [1, 2, 3, 4],
    }
    parquet.write_table(pyarrow.table(kinds), tmp_path / "in.parquet")
    for field in ("text", "large", "dictionary"):
        report = rk.encode(model, tokenizer, tmp_path / "in.parquet", field=field)
        assert [row for row, _ in report.bad_rows] == [1, 2]
        assert np.isnan(report.embeddings).all(1).tolist() == [False, True, True, False]
    with pytest.raises(rk.EncodingError, match="not text, but int64"):
        rk.encode(model, tokenizer, tmp_path / "in.parquet", field="number")
    with pytest.raises(rk.EncodingError, match="no column 'body'; it has: text, large"):
        rk.encode(model, tokenizer, tmp_path / "in.parquet", field="body")
    (tmp_path / "in.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(rk.EncodingError, match="not a Parquet file"):
        rk.encode(model, tokenizer, tmp_path / "in.parquet")


def test_texts_of_no_tokens_are_bad(model, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.backend_tokenizer.post_processor = None
    report = rk.encode(model, bare, ["", "the ferry"])
    assert report.bad_rows == [(0, "no tokens")]


def test_python_objects(model, tokenizer, tmp_path):
    texts = ["the ferry", None, 7, b"bytes", "leaves \ud800"]
    report = rk.encode(model, tokenizer, texts)
    assert [row for row, _ in report.bad_rows] == [1, 2, 3, 4]
    from_iterator = rk.encode(model, tokenizer, iter(texts), tmp_path / "out.npy")
    np.testing.assert_array_equal(from_iterator.embeddings, report.embeddings)
    with pytest.raises(TypeError, match="one string"):
        rk.encode(model, tokenizer, "the ferry")


# -- memory ------------------------------------------------------------------------------------------------------------


def test_no_more_than_two_windows_are_read_ahead(model, tokenizer, monkeypatch):
    read = 0

    def texts():
        nonlocal read
        for i in range(400):
            read = i + 1
            yield TEXTS[i % len(TEXTS)]

    ahead = []
    embed, done = embedding.embed, 0

    def embed_and_look(base, rows, *rest):
        nonlocal done
        ahead.append(read - done)
        done += len(rows)
        return embed(base, rows, *rest)

    monkeypatch.setattr(embedding, "embed", embed_and_look)
    rk.encode(model, tokenizer, texts(), **SMALL)
    assert done == 400
    assert max(ahead) <= 2 * SMALL["window"]

    ahead, done = [], 0
    monkeypatch.setattr(tokenization, "WINDOW_CHARACTERS", 100)  # two or three texts
    rk.encode(model, tokenizer, texts())
    assert done == 400
    assert max(ahead) < 100


def test_a_file_is_not_held_in_memory(tmp_path):
    path = tmp_path / "in.txt"
    with open(path, "wb") as file:
        for _ in range(200):
            file.write(b"x" * 100_000 + b"\n")
        file.write(b"x" * 20_000_000)
    tracemalloc.start()
    try:
        assert sum(1 for _ in sources.open_source(path, None, "text").read(0)) == 201
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12_000_000 < path.stat().st_size / 3


# -- what is no text ---------------------------------------------------------------------------------------------------

LINE = b'{"text": "the ferry"}\n'
GZIP = gzip.compress(LINE, mtime=0)  # the name of a test is made of it, in each worker alike
COMPRESSED = {
    "gzip": GZIP,
    "xz": lzma.compress(LINE),
    "zstd": b"\x28\xb5\x2f\xfd" + bytes(20),
    "zip": b"PK\x03\x04" + bytes(20),
    "UTF-16": LINE.decode().encode("utf-16"),
}


@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
@pytest.mark.parametrize("what", COMPRESSED)
def test_a_file_that_is_no_text_is_refused_by_its_first_bytes(model, tokenizer, tmp_path, what, kind):
    path = tmp_path / f"in{kind}"
    path.write_bytes(COMPRESSED[what])
    with pytest.raises(rk.EncodingError, match=f"must be UTF-8 text, got .*{what}"):
        rk.encode(model, tokenizer, path, tmp_path / "out.npy")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("out", ["out.npy", "out.parquet"])
def test_an_output_without_any_text_is_not_written(model, tokenizer, tmp_path, out):
    if out == "out.parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / "in.jsonl"
    path.write_bytes(LINE * 20)
    with pytest.raises(rk.EncodingError, match="none of the 20 rows has a text; line 1: no field 'body'"):
        rk.encode(model, tokenizer, path, tmp_path / out, field="body", window=8)
    assert list(tmp_path.iterdir()) == [path]
    assert rk.encode(model, tokenizer, path, field="body").bad == 20  # in memory the report is at hand
    rk.encode(model, tokenizer, path, tmp_path / out)  # and nothing is in the way of the right field
    assert len(read(tmp_path / out)) == 20


# -- pipes -------------------------------------------------------------------------------------------------------------


def in_pipe(content: bytes) -> tuple[Path, threading.Thread]:
    """What a shell makes of <(...): a pipe by its number; read to its end, or closed, by a reader."""
    reader, writer = os.pipe()

    def write_all():
        with contextlib.suppress(BrokenPipeError), os.fdopen(writer, "wb") as file:
            file.write(content)

    thread = threading.Thread(target=write_all)
    thread.start()
    return Path(f"/dev/fd/{reader}"), thread


pipes = pytest.mark.skipif(not Path("/dev/fd").exists(), reason="no /dev/fd here")


@pipes
@pytest.mark.parametrize("out", ["out.npy", "out.parquet"])
def test_a_pipe_is_read_as_it_comes(model, tokenizer, tmp_path, out):
    if out == "out.parquet":
        pytest.importorskip("pyarrow")
    expected = rk.encode(model, tokenizer, TEXTS, **SMALL).embeddings
    content = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    path, thread = in_pipe(content)
    report = rk.encode(model, tokenizer, path, tmp_path / out, format="jsonl", **SMALL)
    thread.join()
    os.close(int(path.name))
    assert report.texts == len(TEXTS)
    np.testing.assert_array_equal(read(tmp_path / out), expected)
    assert [file.name for file in tmp_path.iterdir()] == [out]


@pipes
@pytest.mark.parametrize(
    ("content", "format", "words"),
    [
        (LINE, None, "does not say its format.*--format"),
        (LINE, "parquet", "Parquet is read from its end, .* is a pipe"),
        (GZIP, "jsonl", "must be UTF-8 text, got a gzip file"),
    ],
)
def test_what_a_pipe_cannot_be_is_refused(model, tokenizer, tmp_path, content, format, words):
    path, thread = in_pipe(content)
    with pytest.raises(rk.EncodingError, match=words):
        rk.encode(model, tokenizer, path, tmp_path / "out.npy", format=format)
    os.close(int(path.name))
    thread.join()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_is_opened_once(model, tokenizer, tmp_path):
    pipe = tmp_path / "in.txt"
    os.mkfifo(pipe)
    thread = threading.Thread(target=lambda: pipe.write_bytes(b"the ferry\nleaves\n"))
    thread.start()
    assert rk.encode(model, tokenizer, pipe).texts == 2
    thread.join()


# -- columns and tables ------------------------------------------------------------------------------------------------


def column_of(library: str, texts: list[str | None]):
    if library == "pandas":
        return pytest.importorskip("pandas").DataFrame({"text": texts})["text"]
    if library == "pyarrow":
        return pytest.importorskip("pyarrow").table({"text": texts})["text"]
    if library == "datasets":
        return pytest.importorskip("datasets").Dataset.from_dict({"text": texts})["text"]
    return np.array(texts, object)


@pytest.mark.parametrize("library", ["numpy", "pandas", "pyarrow", "datasets"])
def test_a_column_of_a_table(model, tokenizer, tmp_path, library):
    texts = [*TEXTS[:20], None, "the ferry"]
    expected = rk.encode(model, tokenizer, texts, **SMALL)
    report = rk.encode(model, tokenizer, column_of(library, texts), tmp_path / "out.npy", **SMALL)
    assert [row for row, _ in report.bad_rows] == [20]
    np.testing.assert_array_equal(report.embeddings, expected.embeddings)


@pytest.mark.parametrize("library", ["dict", "pandas", "pyarrow", "datasets"])
def test_a_table_is_refused_and_the_column_named(model, tokenizer, library):
    columns = {"text": ["the ferry", "leaves"], "id": ["1", "2"]}  # as many columns as rows
    table: object = columns
    if library == "pandas":
        table = pytest.importorskip("pandas").DataFrame(columns)
    elif library == "pyarrow":
        table = pytest.importorskip("pyarrow").table(columns)
    elif library == "datasets":
        table = pytest.importorskip("datasets").Dataset.from_dict(columns)
    with pytest.raises(TypeError, match=r"must be one column, got a .*: give texts\['text'\]"):
        rk.encode(model, tokenizer, table)


def test_a_collection_with_another_length_than_its_items_is_refused(model, tokenizer):
    class Odd(list):
        def __len__(self):
            return 3

    with pytest.raises(TypeError, match="as its length says, 3, got 1"):
        rk.encode(model, tokenizer, Odd(["the ferry"]))


def test_a_generator(model, tokenizer, tmp_path):
    report = rk.encode(model, tokenizer, (text for text in TEXTS), tmp_path / "out.npy", **SMALL)
    np.testing.assert_array_equal(report.embeddings, rk.encode(model, tokenizer, TEXTS, **SMALL).embeddings)
