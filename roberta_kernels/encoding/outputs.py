"""Where the embeddings go: into memory, or into a file that an interrupted run can continue.

While a run is on, its rows lie in `OUT.partial`, an npy file that is filled in place, and `OUT.state.json` says how far
it is. OUT itself appears when it is whole: the partial file under its final name (.npy), or written from it (.parquet).
So there is one mechanism for both formats, and a run that was interrupted ends with the same bytes as one that was not.
The state has a checksum of all that it says is done: what a crash of the machine took from the files is encoded again.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from roberta_kernels.encoding.sources import EncodingError, WorthlessRunError, import_pyarrow
from roberta_kernels.encoding.state import Block, Counts, State, differences

try:
    import fcntl
except ModuleNotFoundError:  # not a POSIX system: two runs at once into one file are then not noticed
    fcntl = None  # type: ignore[assignment]

SAVE_EVERY = 10.0  # seconds: the most work that is lost when a run is killed
_PARQUET_ROWS = 8192  # in a row group
_OVERWRITE = "overwrite=True, --overwrite"
SHOWN = 5  # bad rows that a report of a file output names


class MemoryOutput:
    """Keeps everything. A context manager like FileOutput."""

    damaged = 0

    def __init__(self, width: int, dtype: np.dtype) -> None:
        self.state = State()
        self.bad: list[tuple[int, str]] = []
        self._width, self._dtype = width, dtype
        self._windows: list[np.ndarray] = []
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def __enter__(self) -> MemoryOutput:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def start_window(self, count: int, bad: list[tuple[int, str]]) -> None:
        window = np.full((count, self._width), np.nan, self._dtype)
        self._windows.append(window)
        self.bad += [(self.state.rows + row, reason) for row, reason in bad]

    def done(self, batches: list[np.ndarray]) -> int:
        return 0

    def write(self, rows: np.ndarray, values: np.ndarray) -> None:
        self._windows[-1][rows] = values

    def end_window(self, count: int, counts: Counts) -> None:
        self.state = State((Block(self.state.rows + count, counts),))

    def finish(self) -> np.ndarray:
        return np.concatenate([np.empty((0, self._width), self._dtype), *self._windows])


class FileOutput:
    """OUT.npy or OUT.parquet, `[rows, width]`; a context manager: its end saves the state, however it comes about.

    description: what the run depends on, as JSON values; an earlier run is continued only where all of it is the same.
    None: the input cannot be read a second time, so nothing is kept of a run that ends early. damaged: rows that an
    earlier run had done and that are not in the file as it wrote them (a crash of the machine, a full disk); these and
    what follows them are encoded again.
    """

    def __init__(
        self, path: Path, width: int, dtype: np.dtype, description: dict[str, Any] | None, overwrite: bool
    ) -> None:
        self.state = State()
        self.errors_path = beside(path, ".errors.jsonl")
        self._path, self._dtype, self._width = path, dtype, width
        self._parquet = check_output(path) == "parquet"
        self._row_bytes = width * dtype.itemsize
        self._partial, self._state_path = beside(path, ".partial"), beside(path, ".state.json")
        self._description, self._overwrite = description, overwrite
        self.damaged = 0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def __enter__(self) -> FileOutput:
        resuming = self._state_path.exists() and not self._overwrite
        if not resuming and self._path.exists() and not self._overwrite:
            raise EncodingError(f"{self._path} exists; to replace it ask for that ({_OVERWRITE})")
        state = self._saved_state() if resuming else State()
        self._file = _open(self._partial)
        try:
            self._lock()
            if not resuming:
                self._state_path.unlink(missing_ok=True)  # before the rows that it speaks of
                self._file.truncate(0)
            self._file.write(self._header())
            self._errors = _open(self.errors_path)
            state = self._intact(state)
            self._errors.truncate(state.end.errors_bytes)
            self._errors.seek(state.end.errors_bytes)
        except BaseException:
            self._file.close()
            raise
        self.state = state
        self._began = time.perf_counter() - state.seconds
        self._save()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._file.closed:  # finished
            return
        keep = self._description is not None and not (kind and issubclass(kind, WorthlessRunError))
        try:
            if keep:
                self._save()
        finally:
            self._file.close()
            self._errors.close()
        if not keep:
            for path in (self._state_path, self._partial, self.errors_path):
                path.unlink(missing_ok=True)

    def _lock(self) -> None:
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise EncodingError(f"another run is writing {self._partial}") from None

    def _saved_state(self) -> State:
        """What an earlier run left. Raises EncodingError where this one cannot continue it."""
        start_again = f"start again ({_OVERWRITE})"
        try:
            saved = json.loads(self._state_path.read_bytes())
            before = saved["description"].copy()
            state = State.from_json(saved["state"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise EncodingError(f"{self._state_path} is damaged; {start_again} ({error!r})") from error
        if self._description is None:
            raise EncodingError(
                f"{self._state_path} is of an interrupted run, which a pipe or an iterator cannot continue; "
                f"{start_again}"
            )
        changed = differences(before, self._description)
        if changed:
            raise EncodingError(
                f"{self._state_path} is of an interrupted run that differs in: {', '.join(changed)}. Continue it with "
                f"what it began with, or {start_again}"
            )
        return state

    def _intact(self, state: State) -> State:
        """The state up to the first block that is not in the files as it says."""
        before = Block()
        for number, block in enumerate(state.blocks):
            rows = _checksum(self._file, self._offset(before.rows), (block.rows - before.rows) * self._row_bytes)
            errors = _checksum(self._errors, before.errors_bytes, block.errors_bytes - before.errors_bytes)
            if (rows, errors) != (block.checksum, block.errors_checksum):
                self.damaged = state.rows - before.rows
                return State(state.blocks[:number], (), state.seconds)
            before = block
        return state

    def _header(self, rows: int = 0) -> bytes:
        """Its length does not depend on the number of rows: numpy leaves room for it to grow."""
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": self._dtype.str, "fortran_order": False, "shape": (rows, self._width)}
        )
        return header.getvalue()

    def _offset(self, row: int) -> int:
        return len(self._header()) + row * self._row_bytes

    def start_window(self, count: int, bad: list[tuple[int, str]]) -> None:
        """Marks the bad rows (row in the window, reason) of the next `count`, and puts them on record."""
        self._window_errors = b""
        nothing = np.full((1, self._width), np.nan, self._dtype)
        for row, reason in bad:
            self._put(np.array([row]), nothing)
            number = self.state.rows + row
            entry = json.dumps({"row": number, "line": number + 1, "reason": reason})
            self._window_errors += entry.encode() + b"\n"
        self._errors.write(self._window_errors)

    def done(self, batches: list[np.ndarray]) -> int:
        """How many of the window's batches (the rows of each) an earlier run had done, and are in the file as it left
        them."""
        claimed = self.state.batches
        for number, (rows, checksum) in enumerate(zip(batches, claimed, strict=False)):
            found = 0
            for row in rows.tolist():
                self._file.seek(self._offset(self.state.rows + row))
                found = zlib.crc32(self._file.read(self._row_bytes), found)
            if found != checksum:
                self.damaged += sum(map(len, batches[number : len(claimed)]))
                self.state = replace(self.state, batches=claimed[:number])
                return number
        return len(claimed)

    def write(self, rows: np.ndarray, values: np.ndarray) -> None:
        """A batch: values `[n, width]` to the `n` rows, numbered from the window's beginning."""
        self._put(rows, values)
        self.state = replace(self.state, batches=(*self.state.batches, zlib.crc32(values.tobytes())))
        if time.perf_counter() - self._saved >= SAVE_EVERY:
            self._save()

    def _put(self, rows: np.ndarray, values: np.ndarray) -> None:
        for row, value in zip(rows.tolist(), values, strict=True):
            self._file.seek(self._offset(self.state.rows + row))
            self._file.write(value.tobytes())

    def end_window(self, count: int, counts: Counts) -> None:
        """Reads the window's rows again, out of the system's cache: batches wrote them in another order."""
        closed, last = self.state.open_block()
        block = Block(
            rows=last.rows + count,
            counts=counts,
            errors_bytes=self._errors.tell(),
            checksum=_checksum(self._file, self._offset(last.rows), count * self._row_bytes, last.checksum),
            errors_checksum=zlib.crc32(self._window_errors, last.errors_checksum),
        )
        self.state = replace(self.state, blocks=(*closed, block), batches=())

    def _save(self) -> None:
        """The rows first, then the state that counts on them."""
        self._saved = time.perf_counter()
        if self._description is None:
            return
        for file in (self._file, self._errors):
            file.flush()
            os.fsync(file.fileno())
        saved = {"description": self._description, "state": asdict(replace(self.state, seconds=self.seconds))}
        with _replacing(self._state_path) as new:
            new.write_text(json.dumps(saved, indent=1) + "\n")

    def finish(self) -> np.ndarray | None:
        """Puts the whole output in its place; the array, memory-mapped, where it is npy."""
        self._file.seek(0)
        self._file.write(self._header(self.state.rows))
        self._file.truncate(self._offset(self.state.rows))
        self._errors.flush()
        os.fsync(self._file.fileno())
        if self._parquet:
            with _replacing(self._path) as new:
                self._write_parquet(new)
            self._partial.unlink()
        else:
            os.replace(self._partial, self._path)
        self._state_path.unlink(missing_ok=True)
        self._file.close()
        self._errors.close()
        if not self.state.end.errors_bytes:
            self.errors_path.unlink()
        return None if self._parquet else np.load(self._path, mmap_mode="r")

    @property
    def bad(self) -> list[tuple[int, str]]:
        """The first bad rows, and why they are."""
        if not self._errors.closed:
            self._errors.flush()
        return list(itertools.islice(self._bad_rows(), SHOWN))

    def _bad_rows(self) -> Iterator[tuple[int, str]]:
        if self.errors_path.exists():
            with open(self.errors_path, "rb") as file:
                for line in file:
                    entry = json.loads(line)
                    yield entry["row"], entry["reason"]

    def _write_parquet(self, path: Path) -> None:
        """One column, `embedding`: a list of `width` numbers, or null for a bad row."""
        pyarrow = import_pyarrow()
        width = self._width
        kind = pyarrow.list_(pyarrow.from_numpy_dtype(self._dtype), width)
        schema = pyarrow.schema([pyarrow.field("embedding", kind)])
        bad = self._bad_rows()
        next_bad = next(bad, None)
        self._file.seek(self._offset(0))
        with pyarrow.parquet.ParquetWriter(path, schema) as writer:
            for start in range(0, self.state.rows, _PARQUET_ROWS):
                count = min(_PARQUET_ROWS, self.state.rows - start)
                values = np.frombuffer(self._file.read(count * self._row_bytes), self._dtype)
                null = np.zeros(count, bool)
                while next_bad is not None and next_bad[0] < start + count:
                    null[next_bad[0] - start] = True
                    next_bad = next(bad, None)
                column = pyarrow.FixedSizeListArray.from_arrays(
                    pyarrow.array(values), type=kind, mask=pyarrow.array(null)
                )
                writer.write_table(pyarrow.table([column], schema=schema))


def check_output(path: Path) -> str:
    """ "npy" or "parquet", by the extension. Raises EncodingError for another, or where pyarrow is missing."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("npy", "parquet"):
        raise EncodingError(f"the output must end in .npy or .parquet, got {path}")
    if kind == "parquet":
        import_pyarrow()
    return kind


def _open(path: Path) -> BinaryIO:
    """For reading and writing, made where it is not there; what it holds stays."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")


def _checksum(file: BinaryIO, start: int, length: int, before: int = 0) -> int:
    """CRC-32 of a part of a file, going on from `before`; of less where it is shorter."""
    file.seek(start)
    checksum = before
    while length > 0 and (part := file.read(min(length, 1 << 20))):
        checksum = zlib.crc32(part, checksum)
        length -= len(part)
    return checksum if length == 0 else ~checksum


def beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path to write to; `path` is replaced by it at the end, in one step."""
    new = beside(path, ".new")
    try:
        yield new
        with open(new, "rb") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
