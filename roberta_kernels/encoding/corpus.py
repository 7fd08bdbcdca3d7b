"""encode: a corpus into embeddings, one row for each text, in the order of the input."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from roberta_kernels._version import __version__
from roberta_kernels.encoding import embedding
from roberta_kernels.encoding.batching import BATCH_TOKENS, batches_of, counted
from roberta_kernels.encoding.outputs import FileOutput, MemoryOutput, check_output
from roberta_kernels.encoding.progress import progress_bar
from roberta_kernels.encoding.report import EncodeReport
from roberta_kernels.encoding.sources import (
    EncodingError,
    InputChangedError,
    Source,
    WorthlessRunError,
    format_of,
    open_source,
)
from roberta_kernels.encoding.subject import Subject, subject_of
from roberta_kernels.encoding.tokenization import WINDOW, Window, windows
from roberta_kernels.patching import is_patched

OUTPUT_DTYPES = ("float32", "float16")


def encode(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str] | Path | Source,
    output: str | os.PathLike[str] | None = None,
    *,
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
    overwrite: bool = False,
    progress: bool = False,
) -> EncodeReport:
    """One embedding for each text, in the order of the texts.

    Args:
        model: a Hugging Face encoder, bare or with a head, which is not used; or a SentenceTransformer of an encoder, a
            pooling and perhaps a normalisation. Runs in evaluation mode, where it is.
        tokenizer: the model's own. None: a SentenceTransformer's.
        texts: a collection or iterator of strings, or the Path of a file: text (a line each), JSONL or Parquet. (A
            Source is what encoding makes of either; its rows may be Bad.)
        output: the file to write, .npy or .parquet; None: in memory only. With a file, and texts that can be read again
            (anything but an iterator), an interrupted run is continued by the same call, and ends with the same bytes.
        pooling: over a text's token vectors, special tokens included: "mean", "cls" (the first) or "max". None:
            the SentenceTransformer's, else "mean".
        normalize: divide each embedding by its Euclidean length. None: as the SentenceTransformer does, else not.
        dtype: of the output, "float32" or "float16"; pooling is in float32 whatever the model's dtype.
        max_length: tokens; longer texts are truncated, and counted. None: what the model and its tokenizer can take.
        batch_tokens: the most in a batch: real ones where the model leaves padding out, else with padding. None: 2048
            on a CPU, 32768 on a GPU. A longer text is a batch of its own.
        window: texts that are sorted by length together. The memory taken is bounded by it, not by the corpus.
        format: of the file, "text", "jsonl" or "parquet"; None: by its extension.
        field: the JSON field or Parquet column with the text.
        patch: run on the fused kernels, and unpatch afterwards; a model that is patched already stays as it is. False:
            run the model as it comes.
        backend: the kernels to use, for this call.
        quantization: patch's, of a float32 model on a CPU; only where this call patches.
        overwrite: replace an output that exists, and start again where a run was interrupted.
        progress: show a bar on stderr.

    A row without a text (null, not a string, not JSON, no such field, not UTF-8, no tokens, longer than 4 MiB) does not
    stop the rest: its embedding is NaN (null in Parquet), and the report and OUTPUT.errors.jsonl say why. An empty text
    is a text: its special tokens are encoded.

    Raises:
        EncodingError (a ValueError): the files, the saved state or the model do not allow it. ValueError: an unknown
        option. TypeError: not a transformers model, no tokenizer, or one string as texts. BackendError. OSError.
    """
    check_options(dtype, batch_tokens, window)
    subject = subject_of(model, tokenizer, pooling, normalize, max_length)
    if quantization is not None and (not patch or is_patched(subject.model)):
        raise ValueError("quantization is an option of patching, and this call does not patch the model")
    base, tokens = subject.base, subject.tokens
    path = _checked_output(output, texts)
    source = texts if isinstance(texts, Source) else open_source(texts, format, field)
    # Before weights leave memory, which reading them would bring back.
    identity = subject.identity() if path is not None and source.fingerprint is not None else None
    with embedding.running(subject.model, patch, backend, quantization) as original:
        device = next(base.parameters()).device.type
        width, unpadded, detours = embedding.probe(base, tokens.pad, original)
        budget = batch_tokens or BATCH_TOKENS.get(device, BATCH_TOKENS["cuda"])
        job = _Job(subject, source, np.dtype(dtype), budget, window, unpadded, detours)
        target: FileOutput | MemoryOutput
        if path is None:
            target = MemoryOutput(width, job.dtype)
        else:
            form = {"format": format_of(texts, format) if isinstance(texts, Path) else "objects", "field": field}
            target = FileOutput(path, width, job.dtype, _description(job, identity, form), overwrite)
        resumed, embeddings = _run(job, target, progress)
        return _report(job, target, path, resumed, embeddings)


@dataclass(frozen=True)
class _Job:
    """What is to be done, with every option decided. budget: tokens of a batch. detours: why padding is computed."""

    subject: Subject
    source: Source
    dtype: np.dtype
    budget: int
    window: int
    unpadded: bool
    detours: list[str]


# -- checks ------------------------------------------------------------------------------------------------------------


def check_options(dtype: str, batch_tokens: int | None, window: int) -> None:
    """Raises ValueError."""
    if dtype not in OUTPUT_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(OUTPUT_DTYPES)}, got {dtype!r}")
    for name, value in (("batch_tokens", batch_tokens), ("window", window)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _checked_output(output: str | os.PathLike[str] | None, texts: Any) -> Path | None:
    if output is None:
        return None
    path = Path(output)
    check_output(path)
    if isinstance(texts, Path) and path.exists() and path.samefile(texts):
        raise EncodingError(f"{path} is both the input and the output")
    return path


def _description(job: _Job, identity: dict[str, Any] | None, form: dict[str, str]) -> dict[str, Any] | None:
    """What the bytes of the output depend on; None where the input cannot be read a second time."""
    if identity is None:
        return None
    return {
        "version": __version__,
        "input": job.source.fingerprint,
        **identity,
        **form,
        "dtype": job.dtype.name,
        "batch_tokens": job.budget,
        "window": job.window,
        "device": next(job.subject.base.parameters()).device.type,
        "packed": job.unpadded,
        "kernels": embedding.kernels(job.subject.base),
    }


# -- the run -----------------------------------------------------------------------------------------------------------


def _run(job: _Job, target: FileOutput | MemoryOutput, progress: bool) -> tuple[int, np.ndarray | None]:
    """Encodes what is not yet done. Returns how many rows an earlier run had done, and the embeddings."""
    # The reader-ahead ends last: it may be in the middle of a window, and the state is to be saved before that.
    with ThreadPoolExecutor(1) as ahead, target, progress_bar(progress, job.source) as bar:
        resumed = target.state.rows
        bar.update(resumed, 0)
        rest = windows(job.source, target.state.rows, job.window)

        def read_ahead() -> Any:
            rows = next(rest, None)
            return None if rows is None else ahead.submit(job.subject.tokens.window, rows)

        future = read_ahead()
        while future is not None:
            window: Window = future.result()
            future = read_ahead()
            resumed += _encode_window(job, target, window, bar.update)
        if job.source.rows is not None and target.state.rows != job.source.rows:
            raise InputChangedError("the texts were changed while they were read")
        if isinstance(target, FileOutput) and 0 < target.state.rows == target.state.counts.bad:
            row, reason = target.bad[0]
            raise WorthlessRunError(f"none of the {target.state.rows:,} rows has a text; line {row + 1}: {reason}")
        return resumed, target.finish()


def _encode_window(
    job: _Job, target: FileOutput | MemoryOutput, window: Window, progressed: Callable[[int, int], None]
) -> int:
    """Encodes and writes a window's rows. Returns how many of them an earlier run had done."""
    subject = job.subject
    batches = batches_of(window.lengths, job.budget, job.unpadded)
    counts = counted(target.state.counts, window, batches, job.unpadded)
    target.start_window(len(window.lengths), window.bad)
    done = target.done(batches)
    earlier = sum(map(len, batches[:done]))
    progressed(len(window.bad) + earlier, 0)
    for rows in batches[done:]:
        ids = [window.ids[row] for row in rows]
        values = embedding.embed(subject.base, ids, subject.tokens.pad, subject.pooling, subject.normalize)
        target.write(rows, values.cpu().numpy().astype(job.dtype))
        progressed(len(rows), int(window.lengths[rows].sum()))
    target.end_window(len(window.lengths), counts)
    return earlier


def _report(
    job: _Job, target: FileOutput | MemoryOutput, path: Path | None, resumed: int, embeddings: np.ndarray | None
) -> EncodeReport:
    counts = target.state.counts
    return EncodeReport(
        texts=target.state.rows,
        tokens=counts.tokens,
        padding=counts.padding,
        padding_avoided=counts.plain_padding - counts.padding,
        bad=counts.bad,
        truncated=counts.truncated,
        seconds=target.seconds,
        packed=job.unpadded,
        detours=job.detours,
        resumed=resumed,
        damaged=target.damaged,
        bad_rows=target.bad,
        output=path,
        errors=target.errors_path if isinstance(target, FileOutput) and counts.bad else None,
        embeddings=embeddings,
        quantization=embedding.patched_quantization(job.subject.base),
    )
