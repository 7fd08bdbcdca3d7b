"""What is read: the files of an input, cut into partitions, each the rows of one window; local or any fsspec URI."""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from roberta_kernels.encoding.sources import (
    MAGIC,
    Bad,
    EncodingError,
    InputChangedError,
    Row,
    Source,
    cells_of,
    check_beginning,
    check_column,
    format_of,
    import_pyarrow,
    lines_of,
    row_of_cell,
    row_of_line,
    text_parser,
)

LONGEST_PARTITION = 16 << 20  # bytes of text; one that reaches this has fewer rows

Raw = bytes | Bad | None  # a row as it lies in the file


@dataclass(frozen=True)
class InputFile:
    """name: within the input. uri: what every node opens. kind: "text", "jsonl" or "parquet"."""

    name: str
    uri: str
    kind: str


@dataclass(frozen=True)
class Partition:
    """Rows `first` to `first + rows` of a file.

    number: of its part of the output. offset: bytes before it, in a file of lines. digest: of its rows as they lie
    there.
    """

    number: int
    name: str
    uri: str
    kind: str
    first: int
    rows: int
    offset: int
    digest: str


def file_system(uri: str) -> tuple[Any, str]:
    """The fsspec file system of a local path or a URI, and the path in it."""
    import fsspec

    return fsspec.core.url_to_fs(uri)


def files_of(uri: str, format: str | None) -> list[InputFile]:
    """The file, or those of the folder and its folders by name; not those that begin with a dot or an underscore.

    Raises EncodingError where a name does not tell a format and none is given, FileNotFoundError where there is none.
    """
    system, root = file_system(uri)
    if system.isfile(root):
        found = {PurePosixPath(root).name: root}
    elif system.isdir(root):
        paths = {path[len(root) :].lstrip("/"): path for path in system.find(root)}
        hidden = (".", "_")
        found = {
            name: path
            for name, path in sorted(paths.items())
            if not any(part.startswith(hidden) for part in PurePosixPath(name).parts)
        }
    else:
        raise FileNotFoundError(2, "No such file or directory", uri)
    kinds = {name: format_of(PurePosixPath(name), format) for name in found}  # type: ignore[arg-type]
    return [InputFile(name, system.unstrip_protocol(path), kinds[name]) for name, path in found.items()]


def index(file: InputFile, field: str, rows: int) -> list[dict[str, Any]]:
    """A file's partitions of at most `rows` rows, without their numbers: the other fields of a Partition.

    Raises EncodingError for a file that is not what its format says.
    """
    found: list[dict[str, Any]] = []
    with _Rows(file.uri, file.kind, field) as content:
        first = 0
        while True:
            offset, digest, count, size = content.offset(), hashlib.sha256(), 0, 0
            for raw in content:
                size += _add(digest, raw)
                count += 1
                if count == rows or size >= LONGEST_PARTITION:
                    break
            if count == 0:
                return found
            fields = {"name": file.name, "uri": file.uri, "kind": file.kind, "first": first, "rows": count}
            found.append(fields | {"offset": offset, "digest": digest.hexdigest()})
            first += count


def source_of(partition: Partition, field: str) -> Source:
    """Its rows, for encode(). Reading them all raises InputChangedError where they are not what was indexed."""
    return Source(partition.rows, None, lambda start: itertools.islice(_read(partition, field), start, None))


def _read(partition: Partition, field: str) -> Iterator[Row]:
    parse = text_parser(partition.kind, field)
    digest = hashlib.sha256()
    number = partition.first
    with _Rows(partition.uri, partition.kind, field) as content:
        content.seek(partition)
        for raw in itertools.islice(content, partition.rows):
            _add(digest, raw)
            yield row_of_cell(raw) if partition.kind == "parquet" else row_of_line(raw, number, parse)  # type: ignore[arg-type]
            number += 1
    if digest.hexdigest() != partition.digest:
        raise InputChangedError(f"{partition.uri} was changed after it was indexed")


def _add(digest: Any, raw: Raw) -> int:
    """Its length, so that no two lists of rows make the same bytes, and the row; gives its size."""
    if isinstance(raw, bytes):
        digest.update(b"%d:" % len(raw))
        digest.update(raw)
        return len(raw)
    digest.update(b"-" if raw is None else raw.reason.encode())
    return 0


class _Rows:
    """The rows of an open file, as they lie there; an iterator that can be moved to a partition."""

    def __init__(self, uri: str, kind: str, field: str) -> None:
        self._uri, self._kind, self._field = uri, kind, field

    def __enter__(self) -> _Rows:
        system, path = file_system(self._uri)
        # Not every file of fsspec's can read a line of limited length.
        self._file = io.BufferedReader(system.open(path, "rb"), 1 << 20)
        try:
            self._open()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _open(self) -> None:
        self._rows: Iterator[Raw]
        if self._kind != "parquet":
            check_beginning(self._uri, self._file.peek(MAGIC), self._kind)
            self._rows = lines_of(self._file)
            return
        pyarrow = import_pyarrow()
        try:
            self._parquet = pyarrow.parquet.ParquetFile(self._file)
        except pyarrow.ArrowInvalid as error:
            raise EncodingError(f"{self._uri} is not a Parquet file: {error}") from error
        check_column(self._uri, self._parquet.schema_arrow, self._field)
        self._rows = cells_of(self._parquet, self._field)

    def __iter__(self) -> Iterator[Raw]:
        return self._rows

    def offset(self) -> int:
        """Where the next line begins; 0 in a file without lines."""
        return 0 if self._kind == "parquet" else self._file.tell()

    def seek(self, partition: Partition) -> None:
        if self._kind != "parquet":
            self._file.seek(partition.offset)
            return
        metadata = self._parquet.metadata
        sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        ends = list(itertools.accumulate(sizes))
        # From the row group that holds the first row on.
        begin = next((number for number, end in enumerate(ends) if end > partition.first), len(ends))
        skipped = partition.first - (ends[begin - 1] if begin else 0)
        self._rows = itertools.islice(
            cells_of(self._parquet, self._field, list(range(begin, len(ends)))), max(0, skipped), None
        )


def numbered(found: Iterable[dict[str, Any]]) -> list[Partition]:
    """In the order of the files' names and of their rows."""
    ordered = sorted(found, key=lambda fields: (fields["name"], fields["first"]))
    return [Partition(number=number, **fields) for number, fields in enumerate(ordered)]
