"""Where the texts come from: lines of a file, rows of a Parquet column, or Python objects.

Every source is read as a stream, one row after another, and gives a row for each line whatever is wrong with it: a
text, or a `Bad` with the reason. So row i of the output is always line i + 1 of the input.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMATS = {".txt": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
LONGEST_LINE = 4 << 20  # bytes; a longer line is bad, so that a file without line ends does not fill the memory


_NOT_TEXT = {
    b"\x1f\x8b": "a gzip file: unpack it (gunzip), or pipe it in (gunzip -c FILE | ... /dev/stdin --format)",
    b"\x28\xb5\x2f\xfd": "a zstd file: unpack it (unzstd)",
    b"\xfd7zXZ\x00": "an xz file: unpack it (unxz)",
    b"PK\x03\x04": "a zip file: unpack it (unzip)",
    b"\xff\xfe": "UTF-16: convert it (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "UTF-16: convert it (iconv -f UTF-16 -t UTF-8)",
}
MAGIC = 16  # bytes that tell these


class EncodingError(ValueError):
    """What was asked for cannot be encoded, or not continued; the message says why."""


class WorthlessRunError(EncodingError):
    """Nothing of the run is worth keeping; the message says why."""


class InputChangedError(WorthlessRunError):
    """The texts were changed while they were read."""


@dataclass(frozen=True, slots=True)
class Bad:
    """A row that has no text; why."""

    reason: str


Row = str | Bad


@dataclass(frozen=True)
class Source:
    """rows: how many, or None for an iterator. fingerprint: of all the content, or None where it can be read only once.
    read: rows from number `start` on."""

    rows: int | None
    fingerprint: str | None
    read: Callable[[int], Iterator[Row]]


def format_of(path: Path, format: str | None) -> str:
    """ "text", "jsonl" or "parquet": the format that is given, or what the extension says."""
    if format is not None:
        if format not in FORMATS.values():
            known = ", ".join(dict.fromkeys(FORMATS.values()))
            raise EncodingError(f"format must be one of {known}, got {format!r}")
        return format
    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        raise EncodingError(
            f"the extension of {path} does not say its format; known: {', '.join(FORMATS)}; or name the format "
            "(format=, --format)"
        ) from None


def check_source(path: Path, format: str | None) -> None:
    """Raises EncodingError or OSError for a file that cannot be encoded, as far as its first bytes tell."""
    kind = format_of(path, format)
    if kind == "parquet":
        import_pyarrow()
    if can_be_read_again(path):
        with open(path, "rb") as file:
            check_beginning(path, file.read(MAGIC), kind)
    elif kind == "parquet":
        raise EncodingError(f"Parquet is read from its end, and {path} is a pipe: write it to a file first")


def can_be_read_again(path: Path) -> bool:
    """False for a pipe, a terminal or another device. Raises OSError where there is none."""
    mode = os.stat(path).st_mode
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)  # opening a folder says what is wrong with that


def check_beginning(path: Path | str, head: bytes, kind: str) -> None:
    """Raises EncodingError for a file that is no text, by its first bytes, where it should be."""
    for magic, what in _NOT_TEXT.items():
        if kind != "parquet" and head.startswith(magic):
            raise EncodingError(f"{path} must be UTF-8 text, got {what}")


def open_source(texts: Iterable[Any] | Path, format: str | None, field: str) -> Source:
    """A file by its Path, a collection, or an iterator of texts.

    Raises EncodingError for a format that is unknown or a column that is not there, OSError for a file that cannot be
    read, TypeError for anything else.
    """
    if isinstance(texts, Path):
        kind = format_of(texts, format)
        check_source(texts, kind)
        if kind == "parquet":
            return _parquet_source(texts, field)
        return _line_source(texts, text_parser(kind, field))
    if isinstance(texts, (str, bytes)):
        raise TypeError("texts is one string: give a list of them, or a pathlib.Path to read a file")
    if isinstance(texts, Mapping) or hasattr(texts, "columns") or hasattr(texts, "column_names"):
        raise TypeError(f"texts must be one column, got a {type(texts).__name__}: give texts[{field!r}], or the like")
    if isinstance(texts, Iterator) or not hasattr(texts, "__len__"):
        return Source(None, None, lambda start: map(_checked, texts))
    rows = 0
    digest = hashlib.sha256()
    for text in texts:
        rows += 1
        digest.update(repr(_plain(text)).encode("utf-8", "backslashreplace") + b"\n")  # repr has no line ends
    if rows != len(texts):  # type: ignore[arg-type]
        raise TypeError(
            f"texts must have as many items as its length says, {len(texts)}, got {rows}"  # type: ignore[arg-type]
        )
    return Source(rows, digest.hexdigest(), lambda start: map(_checked, itertools.islice(texts, start, None)))


def _plain(value: Any) -> Any:
    """A Python object, of pyarrow's scalars too."""
    return value.as_py() if hasattr(value, "as_py") else value


def _checked(value: Any) -> Row:
    """A value as a row: a string that can be written as UTF-8, or what is wrong with it."""
    value = _plain(value)
    if value is None:
        return Bad("null")
    if not isinstance(value, str):
        return Bad(f"not a string: {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return Bad(f"not text: {error}")  # half of a surrogate pair, which JSON can spell
    return value


# -- lines -------------------------------------------------------------------------------------------------------------


def _line_source(path: Path, parse: Callable[[str], Row]) -> Source:
    """Rows are lines that end in \\n or \\r\\n; the last may lack its end. Reads a file once: counts, hashes. What
    can be read only once (a pipe) is read as it comes."""
    if not can_be_read_again(path):
        return Source(None, None, lambda start: _rows(path, start, None, parse))
    digest, rows, last = hashlib.sha256(), 0, b"\n"
    before = os.stat(path)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            rows += block.count(b"\n")
            last = block[-1:]
    rows += last != b"\n"

    def read(start: int) -> Iterator[Row]:
        yield from _rows(path, start, rows, parse)
        _unchanged(path, before)

    return Source(rows, digest.hexdigest(), read)


def _rows(path: Path, start: int, end: int | None, parse: Callable[[str], Row]) -> Iterator[Row]:
    with open(path, "rb") as file:
        check_beginning(path, file.peek(MAGIC), "text")
        for number, line in enumerate(itertools.islice(lines_of(file), end)):
            if number >= start:
                yield row_of_line(line, number, parse)


def lines_of(file: Any) -> Iterator[bytes | Bad]:
    """The lines of a binary file from where it stands, with their ends."""
    while line := file.readline(LONGEST_LINE + 1):
        if len(line) <= LONGEST_LINE:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(1 << 20)
        yield Bad(f"longer than {LONGEST_LINE} bytes")


def row_of_line(line: bytes | Bad, number: int, parse: Callable[[str], Row]) -> Row:
    """number: of the line in its file, from 0. parse: of `text_parser`."""
    if isinstance(line, Bad):
        return line
    if line.endswith(b"\n"):
        line = line[:-2] if line.endswith(b"\r\n") else line[:-1]
    try:
        text = line.decode("utf-8-sig" if number == 0 else "utf-8")
    except UnicodeDecodeError as error:
        return Bad(f"not UTF-8: {error}")
    row = parse(text)
    return row if isinstance(row, Bad) else _checked(row)


def text_parser(kind: str, field: str) -> Callable[[str], Any]:
    """What makes a text, or what is wrong with it, of a decoded line of a "text" or "jsonl" file."""
    if kind == "text":
        return lambda line: line

    def parse(line: str) -> Any:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            return Bad(f"not JSON: {error}")
        if not isinstance(value, dict):
            return Bad("not a JSON object")
        if field not in value:
            return Bad(f"no field {field!r}")
        return value[field]

    return parse


def _unchanged(path: Path, before: os.stat_result) -> None:
    now = os.stat(path)
    if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise InputChangedError(f"{path} was changed while it was read")


# -- Parquet -----------------------------------------------------------------------------------------------------------


def import_pyarrow() -> Any:
    """The package pyarrow, with pyarrow.parquet. Raises EncodingError, saying how to get it, where it is missing."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise EncodingError("Parquet needs pyarrow: pip install roberta_kernels[parquet]") from error
    return pyarrow


def _parquet_source(path: Path, field: str) -> Source:
    pyarrow = import_pyarrow()
    before = os.stat(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    try:
        with pyarrow.parquet.ParquetFile(path) as parquet:
            schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
    except pyarrow.ArrowInvalid as error:
        raise EncodingError(f"{path} is not a Parquet file: {error}") from error
    check_column(path, schema, field)

    def read(start: int) -> Iterator[Row]:
        with pyarrow.parquet.ParquetFile(path) as parquet:
            yield from map(row_of_cell, itertools.islice(cells_of(parquet, field), start, None))
        _unchanged(path, before)

    return Source(rows, digest.hexdigest(), read)


def check_column(path: Path | str, schema: Any, field: str) -> None:
    """Raises EncodingError where a Parquet file's schema has no such column of text."""
    import pyarrow

    if field not in schema.names:
        raise EncodingError(f"{path} has no column {field!r}; it has: {', '.join(schema.names)}")
    kind = schema.field(field).type
    value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not (pyarrow.types.is_string(value) or pyarrow.types.is_large_string(value)):
        raise EncodingError(f"column {field!r} of {path} is not text, but {kind}")


def cells_of(parquet: Any, field: str, row_groups: list[int] | None = None) -> Iterator[bytes | None]:
    """A column of text of an open ParquetFile, of these row groups or all."""
    for batch in parquet.iter_batches(batch_size=1024, row_groups=row_groups, columns=[field]):
        yield from column_bytes(batch.column(0))


def column_bytes(column: Any) -> list[bytes | None]:
    """A pyarrow array of text as bytes, because one value that is not UTF-8 would make all of it fail."""
    import pyarrow

    value = column.type.value_type if pyarrow.types.is_dictionary(column.type) else column.type
    return column.cast(value).cast(pyarrow.large_binary()).to_pylist()


def row_of_cell(value: bytes | None) -> Row:
    if value is None:
        return Bad("null")
    if len(value) > LONGEST_LINE:
        return Bad(f"longer than {LONGEST_LINE} bytes")
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        return Bad(f"not UTF-8: {error}")
