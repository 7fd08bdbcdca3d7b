"""ray.encode(): what is to be done, found out and carried out by Ray Data."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import time
from collections.abc import Iterator
from typing import Any

from roberta_kernels.encoding import WINDOW
from roberta_kernels.encoding.corpus import check_options
from roberta_kernels.encoding.sources import EncodingError, WorthlessRunError, import_pyarrow
from roberta_kernels.encoding.subject import subject_of
from roberta_kernels.ray import results
from roberta_kernels.ray.answers import answer, values
from roberta_kernels.ray.encoder import Load, PartitionEncoder
from roberta_kernels.ray.partitions import InputFile, Partition, file_system, files_of, index, numbered
from roberta_kernels.ray.report import RayReport


def encode(
    load: Load,
    input: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    workers: int = 1,
    gpus_per_worker: float = 0,
    threads: int = 1,
    address: str | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
    dtype: str = "float32",
    max_length: int | None = None,
    batch_tokens: int | None = None,
    window: int = WINDOW,
    format: str | None = None,
    field: str = "text",
    patch: bool = True,
    backend: str = "auto",
    quantization: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: bool = False,
) -> RayReport:
    """One embedding for each text of a file or a folder of files, by workers on a Ray cluster, into Parquet partitions.

    Args:
        load: gives a model and its tokenizer (None for a SentenceTransformer's). Called here and in each worker.
        input: a file or folder of text, JSONL or Parquet, output: a folder; local or an fsspec URI that every node
            sees.
        workers: that run at once, each with a model of its own, `threads` CPUs and `gpus_per_worker` GPUs.
        address: of the cluster. None: as ray.init() finds one, or starts one here; "local": starts one. Where Ray is
            connected already, that is used.
        window: rows of a partition, at most; they are sorted by length together.
        overwrite: replace the output's parts, those of another run too.
        progress: Ray's, on stderr.
        The rest is encode()'s of one machine; `device` "auto" is the GPU where a worker has one.

    What an earlier run made of the same, and is whole, is kept. A row without a text is null in the column `embedding`,
    and the column `error` says why.

    Raises:
        EncodingError (a ValueError): the files, the parts that are there or the model do not allow it. The rest as
        encode() of one machine. What Ray raises by itself: its own errors.
    """
    ray = import_ray()
    import_pyarrow()
    began = time.perf_counter()
    check_options(dtype, batch_tokens, window)
    if workers < 1 or threads < 1:
        raise ValueError(f"workers and threads must be at least 1, got {workers} and {threads}")
    source, target = _uri(input), _uri(output)
    _check_output(source, target)
    files = files_of(source, format)
    identity = subject_of(*load(), pooling, normalize, max_length).identity()
    described = {
        **{**identity, "field": field, "dtype": dtype, "batch_tokens": batch_tokens, "patch": patch},
        **{"backend": backend, "quantization": quantization},
    }
    options = {
        **{"field": field, "pooling": pooling, "normalize": normalize, "dtype": dtype, "max_length": max_length},
        **{"batch_tokens": batch_tokens, "patch": patch, "backend": backend, "quantization": quantization},
        **{"device": device, "threads": threads, "identity": identity},
    }
    report = RayReport(workers=workers, files=len(files), output=str(output))
    with _connected(ray, address, progress):
        partitions = _indexed(ray, files, field, window)
        if overwrite:
            results.remove(target)
        done = _done(ray, target, partitions, described)
        report.resumed = sum(counts["texts"] for counts in done.values())
        report.resumed_tokens = sum(counts["tokens"] for counts in done.values())
        missing = [partition for partition in partitions if partition.number not in done]
        if missing:
            system, folder = file_system(target)
            system.makedirs(folder, exist_ok=True)
            arguments = {"load": load, "output": target, "described": described, **options}
            pool = ray.data.ActorPoolStrategy(size=min(workers, len(missing)), max_tasks_in_flight_per_actor=1)
            encoded = _items(ray, map(dataclasses.asdict, missing)).map(
                PartitionEncoder,
                fn_constructor_kwargs=arguments,
                compute=pool,
                num_cpus=threads,
                num_gpus=gpus_per_worker or None,
            )
            for made in values(encoded):
                done[made["number"]] = made["counts"]
                report.worker_seconds += made["seconds"]
    for partition in partitions:
        report.add(partition.name, partition.first, done[partition.number])
    if 0 < report.texts == report.bad:
        results.remove(target)
        name, row, reason = report.bad_rows[0]
        raise WorthlessRunError(f"none of the {report.texts:,} rows has a text; {name}, line {row + 1}: {reason}")
    results.remove(target, leftovers_only=True)
    report.seconds = time.perf_counter() - began
    return report


def import_ray() -> Any:
    """The package ray, with ray.data. Raises EncodingError, saying how to get it, where it is missing."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise EncodingError("a run on a cluster needs Ray: pip install roberta_kernels[ray]") from error
    return ray


def _uri(path: str | os.PathLike[str]) -> str:
    text = os.fspath(path)
    return text.rstrip("/") or text if "://" in text else os.path.abspath(text)  # workers have another directory


def _check_output(source: str, target: str) -> None:
    (system, folder), (other, root) = file_system(target), file_system(source)
    if system.isfile(folder):
        raise EncodingError(f"{target} is a file, and the output is a folder")
    if system is other and f"{folder}/".startswith(f"{root}/"):
        raise EncodingError(f"the output {target} lies in the input {source}, and would be read as such")


def _items(ray: Any, rows: Any) -> Any:
    """A dataset of dicts, each a task's."""
    listed = list(rows)
    return ray.data.from_items(listed, override_num_blocks=len(listed))


def _indexed(ray: Any, files: list[InputFile], field: str, window: int) -> list[Partition]:
    if not files:
        return []

    def look(row: dict[str, Any]) -> dict[str, str]:
        return answer(lambda: index(InputFile(**row), field, window))

    found = values(_items(ray, map(dataclasses.asdict, files)).map(look))
    return numbered(itertools.chain.from_iterable(found))


def _done(ray: Any, target: str, partitions: list[Partition], described: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The counts of the partitions that are there and whole."""
    there = results.parts(target)
    known = {partition.number: partition for partition in partitions}
    if there - known.keys():
        name = results.name_of(min(there - known.keys()))
        raise EncodingError(f"{target} holds {name}, which this run does not make: start again (--overwrite)")
    if not there:
        return {}

    def look(row: dict[str, Any]) -> dict[str, str]:
        partition = Partition(**row)
        return answer(lambda: (partition.number, results.read_whole(target, partition, described)))

    found = values(_items(ray, (dataclasses.asdict(known[number]) for number in sorted(there))).map(look))
    return {number: counts for number, counts in found if counts is not None}


@contextlib.contextmanager
def _connected(ray: Any, address: str | None, progress: bool) -> Iterator[None]:
    """A connection to Ray, ended if it was made here; Ray Data shows its progress, or is silent."""
    here = not ray.is_initialized()
    if here:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except ConnectionError as error:
            raise EncodingError(f"no Ray cluster answers at {address}: {error}") from error
    context, log = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before = context.enable_progress_bars, context.max_consecutive_actor_init_deaths, log.level
    context.enable_progress_bars = progress
    context.max_consecutive_actor_init_deaths = 3  # Ray's own: a worker that dies while it starts is replaced too
    if not progress:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars, context.max_consecutive_actor_init_deaths = before[:2]
        log.setLevel(before[2])
        if here:
            ray.shutdown()
