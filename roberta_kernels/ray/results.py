"""What is written: a Parquet file for each partition, with what it depends on and checksums in it."""

from __future__ import annotations

import io
import json
import re
import uuid
from typing import Any

import numpy as np

from roberta_kernels._version import __version__
from roberta_kernels.encoding.report import EncodeReport
from roberta_kernels.encoding.sources import EncodingError, import_pyarrow
from roberta_kernels.encoding.state import differences
from roberta_kernels.ray.partitions import Partition, file_system

_KEY = b"roberta_kernels"
SHOWN = 5  # bad rows of a partition that its metadata names


def name_of(number: int) -> str:
    return f"part-{number:06d}.parquet"


def description(partition: Partition, options: dict[str, Any]) -> dict[str, Any]:
    """What a partition's bytes depend on. options: of the run."""
    return {
        "version": __version__,
        "input": f"{partition.name}, rows {partition.first} to {partition.first + partition.rows - 1}",
        "content": partition.digest,
        **options,
    }


def columns_of(report: EncodeReport) -> tuple[Any, Any]:
    """The columns `embedding`, null for a row without a text, and `error`, why; of a report in memory."""
    pyarrow = import_pyarrow()
    values = report.embeddings
    assert values is not None
    reasons = dict(report.bad_rows)
    bad = np.zeros(len(values), bool)
    bad[list(reasons)] = True
    kind = pyarrow.list_(pyarrow.from_numpy_dtype(values.dtype), values.shape[1])
    embedding = pyarrow.FixedSizeListArray.from_arrays(
        pyarrow.array(values.reshape(-1)), type=kind, mask=pyarrow.array(bad)
    )
    return embedding, pyarrow.array([reasons.get(row) for row in range(len(values))], pyarrow.string())


def counts_of(report: EncodeReport, kernels: str) -> dict[str, Any]:
    """What a partition's metadata tells of it, as JSON values. kernels: what computed."""
    names = ("texts", "tokens", "padding", "padding_avoided", "bad", "truncated", "packed", "detours", "quantization")
    counts = {name: getattr(report, name) for name in names}
    return counts | {"kernels": kernels, "bad_rows": report.bad_rows[:SHOWN]}


def write(folder: str, partition: Partition, report: EncodeReport, metadata: dict[str, Any]) -> None:
    """Under another name first: who reads the folder finds a part whole or not at all. metadata: the file's."""
    pyarrow = import_pyarrow()
    embedding, error = columns_of(report)
    columns = {
        "file": pyarrow.array([partition.name] * partition.rows, pyarrow.string()),
        "row": pyarrow.array(np.arange(partition.first, partition.first + partition.rows)),
        "embedding": embedding,
        "error": error,
    }
    table = pyarrow.table(columns).replace_schema_metadata({_KEY: json.dumps(metadata)})
    content = io.BytesIO()
    pyarrow.parquet.write_table(table, content, write_page_checksum=True)
    system, root = file_system(folder)
    beside = f"{root}/.{name_of(partition.number)}.{uuid.uuid4().hex}"  # two attempts may be at it at once
    system.pipe_file(beside, content.getvalue())
    system.mv(beside, f"{root}/{name_of(partition.number)}")


def read_whole(folder: str, partition: Partition, options: dict[str, Any]) -> dict[str, Any] | None:
    """The counts of a part that is there and whole; None where it has to be made.

    Raises EncodingError for one that is of another run.
    """
    pyarrow = import_pyarrow()
    system, root = file_system(folder)
    path = f"{root}/{name_of(partition.number)}"
    try:
        with system.open(path, "rb") as file:
            parquet = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
            metadata = parquet.schema_arrow.metadata or {}
            if _KEY not in metadata:
                raise _foreign(path)
            told = json.loads(metadata[_KEY])
            before, counts = told["description"].copy(), told["counts"]
            for batch in parquet.iter_batches():  # which compares the checksums
                del batch
    except EncodingError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    changed = differences(before, description(partition, options))
    if changed:
        raise EncodingError(
            f"{path} is of a run that differs in: {', '.join(changed)}. Continue it with what it began with, or start "
            "again (overwrite=True, --overwrite)"
        )
    return counts


def _foreign(path: str) -> EncodingError:
    return EncodingError(f"{path} was not written by such a run, and would be replaced: choose another output")


def parts(folder: str) -> set[int]:
    """The numbers of the parts that are in the folder."""
    found = (re.fullmatch(r"part-(\d+)\.parquet", name) for name in _names(folder))
    return {int(match[1]) for match in found if match}


def remove(folder: str, *, leftovers_only: bool = False) -> None:
    """Parts, and what killed workers left of them beside."""
    system, root = file_system(folder)
    for name in _names(folder):
        if re.match(r"\.part-\d+\.parquet\." if leftovers_only else r"\.?part-\d+\.parquet", name):
            system.rm_file(f"{root}/{name}")


def _names(folder: str) -> list[str]:
    """Of what is in a folder, which need not be there; as it is now, whatever the file system remembers."""
    system, root = file_system(folder)
    system.invalidate_cache()
    if not system.isdir(root):
        return []
    return [path.rstrip("/").rsplit("/", 1)[-1] for path in system.ls(root, detail=False)]
