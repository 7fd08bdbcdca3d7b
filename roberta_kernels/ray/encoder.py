"""The actors: a model that is loaded and patched once, and encodes whatever batches it is given."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Callable
from typing import Any

import torch

from roberta_kernels import backends
from roberta_kernels.encoding import embedding
from roberta_kernels.encoding import encode as encode_source
from roberta_kernels.encoding.report import EncodeReport
from roberta_kernels.encoding.sources import EncodingError, Source, column_bytes, row_of_cell
from roberta_kernels.encoding.subject import subject_of
from roberta_kernels.patching import patch as patch_model
from roberta_kernels.ray import results
from roberta_kernels.ray.answers import REFUSALS, answer
from roberta_kernels.ray.partitions import Partition, source_of

# A model and its tokenizer; None for a SentenceTransformer's. Called on a worker, so it is pickled.
Load = Callable[[], tuple[Any, Any]]
_REFUSALS: tuple[type[Exception], ...] = (*REFUSALS, backends.BackendError)


class Encoder:
    """An actor class for `ray.data.Dataset.map_batches`, in batches of the format "pyarrow".

        dataset.map_batches(Encoder, fn_constructor_kwargs={"load": load}, batch_format="pyarrow", batch_size=8192,
                            compute=ray.data.ActorPoolStrategy(size=4), num_cpus=1)

    A batch comes back with the columns `embedding`, a list of numbers, and `error`: where a row has no text the former
    is null, and the latter says why. The rows of a batch are sorted by length together, so large ones are best.

    load: gives a model and its tokenizer. field: the column with the text. device: "auto" is the GPU where the worker
    has one. threads: on a CPU; None: as many as torch takes, which Ray sets to the actor's `num_cpus`. The rest is
    encode()'s.
    """

    def __init__(
        self,
        load: Load,
        *,
        field: str = "text",
        pooling: str | None = None,
        normalize: bool | None = None,
        dtype: str = "float32",
        max_length: int | None = None,
        batch_tokens: int | None = None,
        patch: bool = True,
        backend: str = "auto",
        quantization: str | None = None,
        device: str = "auto",
        threads: int | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        """identity: what this must be, of Subject; an actor with another model or tokenizer raises EncodingError."""
        if threads is not None:
            torch.set_num_threads(threads)
        subject = subject_of(*load(), pooling, normalize, max_length)
        if identity is not None and subject.identity() != identity:
            raise EncodingError(
                f"the model or tokenizer that was loaded on {socket.gethostname()} is not the one that was loaded "
                "where the run was started: are its files the same on every node?"
            )
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        subject.model.to(device)
        self.field = field
        self._model, self._base = subject.model, subject.base
        self._backend = backend
        self._options: dict[str, Any] = {
            "tokenizer": subject.tokens.tokenizer,
            "pooling": subject.pooling,
            "normalize": subject.normalize,
            "dtype": dtype,
            "max_length": max_length,
            "batch_tokens": batch_tokens,
            "patch": patch,
            "backend": backend,
        }
        if patch:
            with self._in_force():
                patch_model(self._model, quantization=quantization)
        elif quantization is not None:
            raise ValueError("quantization is an option of patching, and this call does not patch the model")
        with self._in_force():
            self.kernels = embedding.kernels(self._base)
        if device == "cpu" and backends.cpu_isas():
            self.kernels += f" ({backends.cpu_isa()})"  # nodes may differ in it
        self.encode(Source(1, None, lambda start: iter([""])), 1)  # what the first call makes is made now

    def _in_force(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._backend == "auto" else backends.backend(self._backend)

    def encode(self, source: Source, rows: int) -> EncodeReport:
        """In memory, all rows sorted by length together."""
        return encode_source(self._model, texts=source, window=rows, **self._options)

    def __call__(self, batch: Any) -> Any:
        """A pyarrow table with two columns more."""
        if not hasattr(batch, "append_column"):
            raise TypeError(f'Encoder needs batch_format="pyarrow" in map_batches, got a {type(batch).__name__}')
        if self.field not in batch.column_names:
            raise EncodingError(f"there is no column {self.field!r}; there are: {', '.join(batch.column_names)}")
        column = batch.column(self.field).combine_chunks()
        rows = [row_of_cell(value) for value in column_bytes(column)]
        report = self.encode(Source(len(rows), None, lambda start: itertools.islice(rows, start, None)), len(rows))
        for name, values in zip(("embedding", "error"), results.columns_of(report), strict=True):
            batch = batch.append_column(name, values)
        return batch


class PartitionEncoder(Encoder):
    """Reads, encodes and writes a partition. output: the folder. described: the options that its parts depend on."""

    def __init__(self, load: Load, output: str, described: dict[str, Any], **options: Any) -> None:
        self._output, self._described = output, described
        self._refusal: Exception | None = None
        try:
            super().__init__(load, **options)
        except _REFUSALS as error:  # said in the place of the first partition
            self._refusal = error

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        """A Partition's fields -> an answer: its number, its counts, and the seconds that encoding took."""
        return answer(lambda: self._made(Partition(**row)), _REFUSALS)

    def _made(self, partition: Partition) -> dict[str, Any]:
        if self._refusal is not None:
            raise self._refusal
        report = self.encode(source_of(partition, self.field), partition.rows)
        counts = results.counts_of(report, self.kernels)
        told = {"description": results.description(partition, self._described), "counts": counts}
        results.write(self._output, partition, report, told)
        return {"number": partition.number, "counts": counts, "seconds": report.seconds}
