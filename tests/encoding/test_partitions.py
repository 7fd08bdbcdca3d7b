"""What a run on a cluster reads and writes, without a cluster: partitions of files, and the parts made of them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys

import numpy as np
import pytest

import roberta_kernels as rk
from encoding.cases import TEXTS, invoke, write
from roberta_kernels.encoding import EncodingError
from roberta_kernels.encoding import sources as texts
from roberta_kernels.ray import partitions, results

pytest.importorskip("fsspec")
pyarrow = pytest.importorskip("pyarrow")

LONG = "word " * 1_000_000
ODD = [*TEXTS, "a\rb", "\u2028", LONG, "last"]


def cut(path, rows, format=None, field="body"):
    """The partitions of a file or folder."""
    files = partitions.files_of(str(path), format)
    return partitions.numbered(found for file in files for found in partitions.index(file, field, rows))


def rows_of(found, field="body"):
    return [list(partitions.source_of(partition, field).read(0)) for partition in found]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
@pytest.mark.parametrize("rows", [1, 8, 1000])
def test_partitions_have_the_rows_of_the_file(tmp_path, name, rows):
    path = write(tmp_path / name, ODD)
    if name != "a.parquet":
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n", 3) + b"\xff\nno line end")
    found = cut(path, rows)
    parts = rows_of(found)
    assert [row for part in parts for row in part] == list(texts.open_source(path, None, "body").read(0))
    assert all(len(part) == partition.rows <= rows for part, partition in zip(parts, found, strict=True))
    assert [partition.number for partition in found] == list(range(len(found)))
    assert found[0].first == 0
    assert all(b.first == a.first + a.rows for a, b in itertools.pairwise(found))


def test_long_texts_make_smaller_partitions(tmp_path, monkeypatch):
    monkeypatch.setattr(partitions, "LONGEST_PARTITION", 100)
    found = cut(write(tmp_path / "a.txt", ["x" * 60] * 10), 1000)
    assert [partition.rows for partition in found] == [2] * 5


@pytest.mark.parametrize("name", ["a.txt", "a.parquet"])
def test_a_file_that_was_changed_after_the_index_is_noticed(tmp_path, name):
    path = write(tmp_path / name, TEXTS)
    found = cut(path, 16)
    write(path, [*TEXTS[:20], TEXTS[20] + "!", *TEXTS[21:]])
    with pytest.raises(EncodingError, match="was changed after it was indexed"):
        rows_of(found)
    write(path, TEXTS[:20])
    with pytest.raises(EncodingError, match="was changed after it was indexed"):
        rows_of(found)


def test_files_of_a_folder(tmp_path):
    for name in ("b.txt", "a/z.jsonl", "a/.hidden.txt", "_temporary/c.txt", ".git/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, TEXTS[:2])
    found = partitions.files_of(str(tmp_path), None)
    assert [(file.name, file.kind) for file in found] == [("a/z.jsonl", "jsonl"), ("b.txt", "text")]
    assert partitions.files_of((tmp_path / "b.txt").as_uri(), None)[0].name == "b.txt"
    write(tmp_path / "c.txt", []).rename(tmp_path / "c.log")
    with pytest.raises(EncodingError, match=r"c.log does not say its format"):
        partitions.files_of(str(tmp_path), None)
    assert len(partitions.files_of(str(tmp_path), "text")) == 3


@pytest.mark.parametrize("content", [b"\x1f\x8b and more\n", b""])
def test_a_file_that_is_no_text_and_an_empty_one(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    if content:
        with pytest.raises(EncodingError, match="gzip"):
            cut(tmp_path / "a.txt", 8)
    else:
        assert cut(tmp_path / "a.txt", 8) == []


@pytest.fixture
def part(model, tokenizer, tmp_path):
    """A part that was written, and its partition."""
    partition = cut(write(tmp_path / "a.jsonl", [TEXTS[0], None, TEXTS[5]]), 8)[0]
    report = rk.encode(model, tokenizer, partitions.source_of(partition, "body"))
    told = {
        "description": results.description(partition, {"pooling": "mean"}),
        "counts": results.counts_of(report, "cpu"),
    }
    (tmp_path / "out").mkdir()
    results.write(str(tmp_path / "out"), partition, report, told)
    return tmp_path / "out" / "part-000000.parquet", partition, report


def whole(part, partition, **options):
    return results.read_whole(str(part.parent), partition, {"pooling": "mean", **options})


def test_a_part_holds_its_rows_and_what_it_depends_on(part):
    path, partition, report = part
    rows = pyarrow.parquet.read_table(path).to_pylist()
    assert [row["row"] for row in rows] == [0, 1, 2]
    assert {row["file"] for row in rows} == {"a.jsonl"}
    assert [row["error"] for row in rows] == [None, "null", None]
    assert rows[1]["embedding"] is None
    np.testing.assert_array_equal(np.array(rows[2]["embedding"], np.float32), report.embeddings[2])
    assert whole(path, partition)["tokens"] == report.tokens
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with pytest.raises(EncodingError, match="differs in: pooling"):
        whole(path, partition, pooling="cls")
    with pytest.raises(EncodingError, match="differs in: content"):
        whole(path, dataclasses.replace(partition, digest="0"))


def test_a_damaged_part_is_not_whole(part):
    path, partition, _ = part
    content = path.read_bytes()
    for length in range(0, len(content), 40):
        path.write_bytes(content[:length])
        assert whole(path, partition) is None
    # A changed bit among the pages: noticed, or (in what a file says of a page) without consequence.
    path.write_bytes(content)
    right = pyarrow.parquet.read_table(path)["embedding"]
    pages = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(2)
    first = pages.dictionary_page_offset if pages.has_dictionary_page else pages.data_page_offset
    noticed = 0
    for place in range(first, first + pages.total_compressed_size, 7):
        path.write_bytes(bytes([*content[:place], content[place] ^ 4, *content[place + 1 :]]))
        if whole(path, partition) is None:
            noticed += 1
        else:
            assert pyarrow.parquet.read_table(path)["embedding"].equals(right), place
    assert noticed > 20
    path.write_bytes(content)
    assert whole(path, partition) is not None


def test_a_file_of_somebody_else_is_not_replaced(part):
    path, partition, _ = part
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), path)
    with pytest.raises(EncodingError, match="was not written by such a run"):
        whole(path, partition)


def test_removing_takes_parts_and_leftovers_alone(part):
    path, _, _ = part
    for name in (".part-000001.parquet.0123", "notes.txt", "part-000007.parquet"):
        (path.parent / name).write_text("")
    assert results.parts(str(path.parent)) == {0, 7}
    results.remove(str(path.parent), leftovers_only=True)
    assert results.parts(str(path.parent)) == {0, 7}
    results.remove(str(path.parent))
    assert [file.name for file in path.parent.iterdir()] == ["notes.txt"]


def test_the_command_without_ray(folder, file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    for address in ((), ("127.0.0.1:6379",)):
        result = invoke(file, tmp_path / "out", "--model", folder, "--ray", *address)
        assert result.exit_code == 2
        assert result.stderr.strip() == "error: a run on a cluster needs Ray: pip install roberta_kernels[ray]"
    result = invoke(file, tmp_path / "out.npy", "--model", folder, "--workers", 2)
    assert result.exit_code == 2
    assert "options of a run with --ray" in result.stderr


def test_counts_are_json(part):
    path, partition, report = part
    assert json.loads(json.dumps(results.counts_of(report, "cpu"))) == whole(path, partition)
