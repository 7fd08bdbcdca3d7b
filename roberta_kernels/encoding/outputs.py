"""Where the embeddings go: into memory, or into a file that an interrupted run can continue.

While a run is on, its rows lie in `OUT.partial`, an npy file that is filled in place, and `OUT.state.json` says how far
it is. OUT itself appears when it is whole: the partial file under its final name (.npy), or written from it (.parquet).
So one mechanism serves both formats, and a run that was interrupted ends with the same bytes as one that was not.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from roberta_kernels.encoding.sources import EncodingError, InputChangedError, import_pyarrow

try:
    import fcntl
except ModuleNotFoundError:  # not a POSIX system: two runs at once into one file are then not noticed
    fcntl = None  # type: ignore[assignment]

SAVE_EVERY = 10.0  # seconds: the most work that is lost when a run is killed
_PARQUET_ROWS = 8192  # in a row group
_OVERWRITE = "overwrite=True, --overwrite"
SHOWN = 5  # bad rows that a report of a file output names


@dataclass(frozen=True)
class Counts:
    """Sums over the rows so far. plain_padding: of batches of 32 in input order. padding: that was computed here."""

    tokens: int = 0
    padding: int = 0
    plain_padding: int = 0
    bad: int = 0
    truncated: int = 0

    def plus(self, **more: int) -> Counts:
        return replace(self, **{name: getattr(self, name) + value for name, value in more.items()})


@dataclass(frozen=True)
class State:
    """How far a run is. Replaced as a whole, never changed, so that no interrupt finds it half changed.

    rows: in the windows that are done. batches: done in the window that begins there. counts, errors_bytes (length of
    the errors file): at the beginning of that window. seconds: spent up to here.
    """

    rows: int = 0
    batches: int = 0
    counts: Counts = field(default_factory=Counts)
    errors_bytes: int = 0
    seconds: float = 0.0


class MemoryOutput:
    """Keeps everything. A context manager like FileOutput."""

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

    def write(self, rows: np.ndarray, values: np.ndarray) -> None:
        self._windows[-1][rows] = values

    def end_batch(self) -> None:
        self.state = replace(self.state, batches=self.state.batches + 1)

    def end_window(self, count: int, counts: Counts) -> None:
        self.state = replace(self.state, rows=self.state.rows + count, batches=0, counts=counts)

    def finish(self) -> np.ndarray:
        return np.concatenate([np.empty((0, self._width), self._dtype), *self._windows])


class FileOutput:
    """OUT.npy or OUT.parquet, `[rows, width]`; a context manager: its end saves the state, however it comes about.

    description: what the run depends on, as JSON values; an earlier run is continued only where all of it is the same.
    None: the input cannot be read a second time, so nothing is kept of a run that ends early.
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

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def __enter__(self) -> FileOutput:
        resuming = self._state_path.exists() and not self._overwrite
        if not resuming and self._path.exists() and not self._overwrite:
            raise EncodingError(f"{self._path} exists; to replace it ask for that ({_OVERWRITE})")
        if resuming:
            state = self._saved_state()
            self._file = open(self._partial, "r+b")
        else:
            state = State()
            self._file = os.fdopen(os.open(self._partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            self._lock()
            if not resuming:
                self._state_path.unlink(missing_ok=True)  # before the rows that it speaks of
                self._file.truncate(0)
                self._file.write(self._header())
            self._errors = open(self.errors_path, "ab")
            self._errors.truncate(state.errors_bytes)
            self._errors.seek(state.errors_bytes)
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
        keep = self._description is not None and not (kind and issubclass(kind, InputChangedError))
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
            state = State(**{**saved["state"], "counts": Counts(**saved["state"]["counts"])})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise EncodingError(f"{self._state_path} is damaged; {start_again} ({error!r})") from error
        if self._description is None:
            raise EncodingError(
                f"{self._state_path} is of an interrupted run, which an iterator cannot continue; {start_again}"
            )
        now = self._description
        told = [
            f"{key} (was {_short(before.get(key))}, is {_short(now.get(key))})"
            for key in {**now, **before}
            if before.get(key) != now.get(key)
        ]
        if told:
            raise EncodingError(
                f"{self._state_path} is of an interrupted run that differs in: {', '.join(told)}. Continue it with "
                f"what it began with, or {start_again}"
            )
        for path, least in ((self._partial, self._offset(state.rows)), (self.errors_path, state.errors_bytes)):
            if not path.exists() or path.stat().st_size < least:
                raise EncodingError(f"{path} is not what {self._state_path} speaks of; {start_again}")
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
        self._base = self._offset(self.state.rows)
        nothing = np.full((1, self._width), np.nan, self._dtype)
        for row, reason in bad:
            self.write(np.array([row]), nothing)
            number = self.state.rows + row
            entry = json.dumps({"row": number, "line": number + 1, "reason": reason})
            self._errors.write(entry.encode() + b"\n")

    def write(self, rows: np.ndarray, values: np.ndarray) -> None:
        """values `[n, width]` to the `n` rows, numbered from the window's beginning."""
        for row, value in zip(rows.tolist(), values, strict=True):
            self._file.seek(self._base + row * self._row_bytes)
            self._file.write(value.tobytes())

    def end_batch(self) -> None:
        self.state = replace(self.state, batches=self.state.batches + 1)
        if time.perf_counter() - self._saved >= SAVE_EVERY:
            self._save()

    def end_window(self, count: int, counts: Counts) -> None:
        state, errors = self.state, self._errors.tell()
        self.state = replace(state, rows=state.rows + count, batches=0, counts=counts, errors_bytes=errors)

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
        if not self.state.errors_bytes:
            self.errors_path.unlink()
        return None if self._parquet else np.load(self._path, mmap_mode="r")

    @property
    def bad(self) -> list[tuple[int, str]]:
        """The first bad rows, and why they are."""
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
        raise EncodingError(f"the output must end in .npy or .parquet, and is {path}")
    if kind == "parquet":
        import_pyarrow()
    return kind


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


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 16 else text[:12] + "..."
