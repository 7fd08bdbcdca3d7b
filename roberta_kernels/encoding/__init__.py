"""encode: a corpus into embeddings, one row for each text, in the order of the input.

Texts are read in windows. A window is tokenized (while the one before it is encoded), sorted by length and cut into
batches of about equal numbers of tokens; each batch is padded no further than its own longest row, and a patched model
does not compute even that padding. Windows bound the memory, and they and their batches follow from the input and the
options alone: that is what lets an interrupted run continue to the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from roberta_kernels import backends, patching
from roberta_kernels._version import __version__
from roberta_kernels.encoding.outputs import Counts, FileOutput, MemoryOutput, check_output
from roberta_kernels.encoding.sentence_model import as_sentence_model
from roberta_kernels.encoding.sources import Bad, EncodingError, InputChangedError, Row, Source, format_of, open_source

__all__ = [
    "POOLINGS",
    "WINDOW",
    "EncodeReport",
    "EncodingError",
    "check_output",
    "encode",
    "format_of",
    "longest_input",
    "plan",
    "pool",
]

POOLINGS = ("mean", "cls", "max")
OUTPUT_DTYPES = ("float32", "float16")
WINDOW = 8192  # texts
WINDOW_CHARACTERS = 16 << 20  # a window of long texts ends earlier
BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}

_TOKENIZED_TEXTS, _TOKENIZED_CHARACTERS = 256, 1 << 20  # at once: what a tokenizer returns is far larger than the ids
_PLAIN_BATCH = 32  # rows of the batches that padding is compared with


@dataclass
class EncodeReport:
    """What encode() did. str() is a table.

    texts: rows of the output. tokens: real ones, special ones included. padding: tokens of padding that were computed.
    padding_avoided: what batches of 32 in the order of the input would have computed beyond that. bad: rows without an
    embedding. bad_rows: (row, reason) of them; only the first for a file output, which has them all in `errors`.
    truncated: texts that were longer than the model takes. packed: whether padding was left out of the computation.
    detours: why not, and what else ran on original code. resumed: rows that an earlier run had done. seconds: those of
    earlier runs included. embeddings: `[texts, width]`, in memory, memory-mapped for .npy, None for .parquet.
    quantization: what the layers' weights were rounded to.
    """

    texts: int
    tokens: int
    padding: int
    padding_avoided: int
    bad: int
    truncated: int
    seconds: float
    packed: bool
    detours: list[str] = field(default_factory=list)
    resumed: int = 0
    bad_rows: list[tuple[int, str]] = field(default_factory=list)
    output: Path | None = None
    errors: Path | None = None
    embeddings: np.ndarray | None = field(default=None, repr=False)
    quantization: str | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Everything but the embeddings, as JSON values."""
        values = {name: value for name, value in vars(self).items() if name != "embeddings"}
        values |= {name: None if values[name] is None else str(values[name]) for name in ("output", "errors")}
        return values | {"tokens_per_second": self.tokens_per_second}

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_row("texts", f"{self.texts:,}" + (f" ({self.resumed:,} by an earlier run)" if self.resumed else ""))
        table.add_row("tokens", f"{self.tokens:,} in {self.seconds:,.1f} s: {self.tokens_per_second:,.0f} tokens/s")
        computed = "none computed" if self.padding == 0 else f"{self.padding:,} computed"
        table.add_row("padding", f"{computed}; {self.padding_avoided:,} avoided")
        for reason in self.detours:
            table.add_row("", f"not packed, or not fused: {reason}")
        if self.quantization is not None:
            table.add_row("weights", f"rounded to {self.quantization}")
        table.add_row("truncated", f"{self.truncated:,}")
        table.add_row("bad rows", f"{self.bad:,}" + (f": all in {self.errors}" if self.errors else ""))
        for row, reason in self.bad_rows[:5]:
            table.add_row("", f"line {row + 1}: {reason}")
        if self.output is not None:
            table.add_row("written", str(self.output))
        return table

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=120, color_system=None).print(self)
        return text.getvalue().rstrip()


def encode(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str] | Path,
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
        texts: a collection or iterator of strings, or the Path of a file: text (a line each), JSONL or Parquet.
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
        backend: the kernels that shall serve, for this call.
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
    sentences = as_sentence_model(model, POOLINGS)
    if sentences is not None:
        model, tokenizer = sentences.model, tokenizer or sentences.tokenizer
        pooling = sentences.pooling if pooling is None else pooling
        normalize = sentences.normalize if normalize is None else normalize
    pooling, normalize = pooling or "mean", bool(normalize)
    _check_options(pooling, dtype, max_length, batch_tokens, window)
    base = _encoder(model)
    if quantization is not None and (not patch or patching.is_patched(model)):
        raise ValueError("quantization is an option of patching, and this call does not patch the model")
    if tokenizer is None:
        raise TypeError("encode needs the model's tokenizer; only a SentenceTransformer brings its own")
    device = next(base.parameters()).device
    path = None if output is None else Path(output)
    if path is not None:
        check_output(path)
        if isinstance(texts, Path) and path.exists() and path.samefile(texts):
            raise EncodingError(f"{path} is both the input and the output")
    source = open_source(texts, format, field)
    longest = longest_input(base, tokenizer)
    if max_length is not None and max_length > longest:
        raise EncodingError(f"max_length is {max_length}, and the model takes {longest}")
    tokens = _Tokens(tokenizer, max_length or longest, base.config)
    budget = batch_tokens or BATCH_TOKENS.get(device.type, BATCH_TOKENS["cuda"])
    # Before weights leave memory, which reading them would bring back.
    weights = _model_fingerprint(base) if path is not None and source.fingerprint is not None else None
    with _running(model, patch, backend, quantization) as unknown:
        width, packed, detours = _probe(base, tokens.pad, unknown)
        state = _patch_state(base)
        kind = np.dtype(dtype)
        target: FileOutput | MemoryOutput
        if path is None:
            target = MemoryOutput(width, kind)
        else:
            description = None
            if source.fingerprint is not None:
                description = {
                    "version": __version__,
                    "input": source.fingerprint,
                    "model": weights,
                    "tokenizer": _tokenizer_fingerprint(tokenizer),
                    "format": format_of(texts, format) if isinstance(texts, Path) else "objects",
                    "field": field,
                    "pooling": pooling,
                    "normalize": normalize,
                    "dtype": dtype,
                    "max_length": tokens.longest,
                    "batch_tokens": budget,
                    "window": window,
                    "device": device.type,
                    "packed": packed,
                    "kernels": _kernels(base),
                }
            target = FileOutput(path, width, kind, description, overwrite)

        # The reader-ahead ends last: it may be in the middle of a window, and the state is to be saved before that.
        with ThreadPoolExecutor(1) as ahead, target, _bar(progress, source) as bar:
            resumed = target.state.rows
            bar.update(resumed, 0)
            windows = _windows(source, target.state.rows, window)

            def read_ahead() -> Any:
                rows = next(windows, None)
                return None if rows is None else ahead.submit(tokens.window, rows)

            future = read_ahead()
            while future is not None:
                current: _Window = future.result()
                future = read_ahead()
                batches = plan(current.lengths, budget, packed)
                counts = _counted(target.state.counts, current, batches, packed)
                target.start_window(len(current.lengths), current.bad)
                done = target.state.batches  # by an earlier run
                earlier = sum(map(len, batches[:done]))
                resumed += earlier
                bar.update(len(current.bad) + earlier, 0)
                for rows in batches[done:]:
                    values = _embed(base, [current.ids[row] for row in rows], tokens.pad, pooling, normalize)
                    target.write(rows, values.cpu().numpy().astype(kind))
                    target.end_batch()
                    bar.update(len(rows), int(current.lengths[rows].sum()))
                target.end_window(len(current.lengths), counts)
            if source.rows is not None and target.state.rows != source.rows:
                raise InputChangedError("the texts were changed while they were read")
            embeddings = target.finish()

    counts = target.state.counts
    errors = target.errors_path if isinstance(target, FileOutput) and counts.bad else None
    return EncodeReport(
        texts=target.state.rows,
        tokens=counts.tokens,
        padding=counts.padding,
        padding_avoided=counts.plain_padding - counts.padding,
        bad=counts.bad,
        truncated=counts.truncated,
        seconds=target.seconds,
        packed=packed,
        detours=detours,
        resumed=resumed,
        bad_rows=target.bad,
        output=path,
        errors=errors,
        embeddings=embeddings,
        quantization=None if state is None else state.quantization,
    )


def _check_options(pooling: str, dtype: str, max_length: int | None, batch_tokens: int | None, window: int) -> None:
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}, and must be one of {', '.join(POOLINGS)}")
    if dtype not in OUTPUT_DTYPES:
        raise ValueError(f"dtype is {dtype!r}, and must be one of {', '.join(OUTPUT_DTYPES)}")
    for name, value in (("max_length", max_length), ("batch_tokens", batch_tokens), ("window", window)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, and must be at least 1")


# -- the model ---------------------------------------------------------------------------------------------------------


def _encoder(model: nn.Module) -> Any:
    """The bare encoder of a transformers model.

    A wrapper is refused: what it does around the encoder (prompts, a pooling of its own) would be left out in silence.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"encode needs a transformers model or a SentenceTransformer, not {type(model).__name__}; pass the one "
            "inside it (cross_encoder.model, peft_model.merge_and_unload())"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise EncodingError(f"{type(model).__name__} is an encoder and a decoder; pass its encoder")
    return model.base_model


def longest_input(model: Any, tokenizer: Any = None) -> int:
    """The most tokens that the model has positions for, and that its tokenizer, if given, allows."""
    table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    if isinstance(table, nn.Embedding):
        # RoBERTa's positions begin after the padding's.
        longest = table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    else:
        longest = getattr(model.config, "max_position_embeddings", 512)
    return max(1, min(longest, getattr(tokenizer, "model_max_length", longest)))


@contextlib.contextmanager
def _running(model: nn.Module, patch: bool, backend: str, quantization: str | None) -> Iterator[list[str]]:
    """The model in evaluation mode and patched where wished; afterwards all is as before. Gives why it runs on its
    original code, if it does."""
    modes = [(module, module.training) for module in model.modules()]
    patched_here = patch and not patching.is_patched(model)
    with backends.backend(backend) if backend != "auto" else contextlib.nullcontext(), torch.no_grad():
        reasons = [] if patching.is_patched(model) else ["patch=False"]
        if patched_here:
            report = patching.patch(model, quantization=quantization)
            reasons = [] if report else sorted({left.reason for left in report.left})
        try:
            model.eval()
            yield reasons
        finally:
            for module, training in modes:
                module.training = training
            if patched_here:
                patching.unpatch(model)


def _patch_state(base: Any) -> Any:
    return base.__dict__.get("_rk_state")


def _probe(base: Any, pad: int, original: list[str]) -> tuple[int, bool, list[str]]:
    """The width of its embeddings, whether it leaves padding out, and why not: from two rows, one of them padded."""
    token = 1 if pad == 0 else 0
    state = _patch_state(base)
    before = Counter() if state is None else state.padded + state.fallbacks
    hidden, _ = _hidden(base, [np.array([token, token], np.int32), np.array([token], np.int32)], pad)
    if state is None:
        return hidden.shape[2], False, original
    detours = ["packed=False"] if state.packed is False else []
    detours += (state.padded + state.fallbacks) - before
    return hidden.shape[2], not detours, detours


def _kernels(base: Any) -> str:
    state = _patch_state(base)
    if state is None:
        return "original"
    serving = str(backends.serving(next(base.parameters()))) if state.backend == "auto" else state.backend
    return serving if state.quantization is None else f"{serving}, {state.quantization} weights"


def _hidden(base: Any, rows: list[np.ndarray], pad: int) -> tuple[Tensor, Tensor]:
    """Last hidden states `[B, S, H]` of rows of token ids, and which are real, bool `[B, S]`."""
    lengths = np.array([len(row) for row in rows])
    real = np.arange(lengths.max())[None] < lengths[:, None]
    ids = np.full(real.shape, pad, np.int64)
    ids[real] = np.concatenate(rows)
    device = next(base.parameters()).device
    mask = torch.from_numpy(real).to(device)
    output = base(input_ids=torch.from_numpy(ids).to(device), attention_mask=mask.long())
    return output.last_hidden_state, mask


def _embed(base: Any, rows: list[np.ndarray], pad: int, pooling: str, normalize: bool) -> Tensor:
    hidden, real = _hidden(base, rows, pad)
    return pool(hidden, real, pooling, normalize)


def pool(hidden: Tensor, real: Tensor, pooling: str = "mean", normalize: bool = False) -> Tensor:
    """Embeddings `[B, H]` in float32 (float64 of float64) from token vectors `[B, S, H]`; real: bool `[B, S]`, with a
    real token in each row, "cls" takes position 0."""
    hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
    if pooling == "cls":
        pooled = hidden[:, 0]
    elif pooling == "max":
        pooled = hidden.masked_fill(~real[..., None], -torch.inf).amax(1)
    else:
        pooled = hidden.masked_fill(~real[..., None], 0.0).sum(1) / real.sum(1, keepdim=True)
    return nn.functional.normalize(pooled, dim=1) if normalize else pooled


def _model_fingerprint(base: Any) -> str:
    """Of the configuration and every weight but the pooler's, which is not read, and often random: not in the files."""
    config = base.config.to_dict()
    for irrelevant in ("_name_or_path", "transformers_version"):
        config.pop(irrelevant, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, value in base.state_dict().items():
        if name.startswith("pooler."):
            continue
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


def _tokenizer_fingerprint(tokenizer: Any) -> str:
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:
        content = json.loads(fast.to_str())
        for of_the_last_call in ("truncation", "padding"):
            content.pop(of_the_last_call, None)
    else:
        content = [type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


# -- windows and batches -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Window:
    """ids: of each row, int32; empty for a bad one. lengths: of those. bad: (row in the window, reason)."""

    ids: list[np.ndarray]
    lengths: np.ndarray
    bad: list[tuple[int, str]]
    truncated: int


def _windows(source: Source, start: int, texts: int) -> Iterator[list[Row]]:
    window: list[Row] = []
    characters = 0
    for row in source.read(start):
        window.append(row)
        characters += len(row) if isinstance(row, str) else 0
        if len(window) == texts or characters >= WINDOW_CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window


class _Tokens:
    """Texts to token ids, as the tokenizer gives them one by one."""

    def __init__(self, tokenizer: Any, longest: int, config: Any) -> None:
        self._tokenizer, self.longest = tokenizer, longest
        self._vocabulary = getattr(config, "vocab_size", None)
        pads = (getattr(config, "pad_token_id", None), getattr(tokenizer, "pad_token_id", None), 0)
        self.pad: int = next(pad for pad in pads if pad is not None)

    def window(self, rows: list[Row]) -> _Window:
        nothing = np.empty(0, np.int32)
        ids = [nothing] * len(rows)
        bad = [(i, row.reason) for i, row in enumerate(rows) if isinstance(row, Bad)]
        truncated = 0
        for chunk in _chunks([(i, row) for i, row in enumerate(rows) if isinstance(row, str)]):
            # One token more than the model takes tells the texts that are too long from those that just fit.
            found = self._ids([text for _, text in chunk], self.longest + 1)
            over = [j for j, row in enumerate(found) if len(row) > self.longest]
            for j, cut in zip(over, self._ids([chunk[j][1] for j in over], self.longest), strict=True):
                found[j] = cut
            truncated += len(over)
            for (i, _), row in zip(chunk, found, strict=True):
                ids[i] = np.array(row, np.int32)
                if len(row) == 0:
                    bad.append((i, "no tokens"))
        lengths = np.array([len(row) for row in ids])
        highest = max((int(row.max()) for row in ids if len(row)), default=0)
        if self._vocabulary is not None and highest >= self._vocabulary:
            raise EncodingError(
                f"the tokenizer is not this model's: it gives token {highest}, and the model knows {self._vocabulary}"
            )
        return _Window(ids, lengths, sorted(bad), truncated)

    def _ids(self, texts: list[str], longest: int) -> list[list[int]]:
        if not texts:
            return []
        found = self._tokenizer(
            texts, truncation=True, max_length=longest, return_attention_mask=False, return_token_type_ids=False
        )
        return found["input_ids"]


def _chunks(texts: list[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    rest = iter(texts)
    while chunk := list(itertools.islice(rest, 1)):
        characters = len(chunk[0][1])
        while characters < _TOKENIZED_CHARACTERS and len(chunk) < _TOKENIZED_TEXTS:
            following = next(rest, None)
            if following is None:
                break
            chunk.append(following)
            characters += len(following[1])
        yield chunk


def plan(lengths: np.ndarray, budget: int, packed: bool) -> list[np.ndarray]:
    """The rows of each batch, longest first, so that what does not fit in memory fails at once; empty rows in none.

    A batch has at most `budget` tokens: real ones where the model packs (and then at most twice as many with padding,
    for the ids and the last hidden state are padded all the same), else padded ones. A longer row is alone.
    """
    order = np.argsort(-lengths, kind="stable")
    batches: list[np.ndarray] = []
    first = real = 0
    for last, row in enumerate(order):
        length = int(lengths[row])
        if length == 0:
            order = order[:last]
            break
        padded = (last - first + 1) * int(lengths[order[first]])
        full = (real + length > budget or padded > 2 * budget) if packed else padded > budget
        if full and last > first:
            batches.append(order[first:last])
            first, real = last, 0
        real += length
    if first < len(order):
        batches.append(order[first:])
    return batches


def _counted(counts: Counts, window: _Window, batches: list[np.ndarray], packed: bool) -> Counts:
    def padding(rows: list[np.ndarray]) -> int:
        return sum(int((lengths.max() - lengths).sum()) for lengths in rows)

    real = window.lengths[window.lengths > 0]
    plain = [real[i : i + _PLAIN_BATCH] for i in range(0, len(real), _PLAIN_BATCH)]
    return counts.plus(
        tokens=int(real.sum()),
        padding=0 if packed else padding([window.lengths[rows] for rows in batches]),
        plain_padding=padding(plain),
        bad=len(window.bad),
        truncated=window.truncated,
    )


# -- the progress bar --------------------------------------------------------------------------------------------------


class _Bar:
    def __init__(self, progress: Any, task: Any) -> None:
        self._progress, self._task = progress, task
        self._texts = self._tokens = 0

    def update(self, texts: int, tokens: int) -> None:
        if self._progress is None:
            return
        self._texts += texts
        self._tokens += tokens
        elapsed = self._progress.tasks[0].elapsed or 0.0
        rate = f"{self._tokens / elapsed:,.0f} tokens/s" if elapsed > 0.5 else ""
        self._progress.update(self._task, completed=self._texts, rate=rate)


@contextlib.contextmanager
def _bar(wanted: bool, source: Source) -> Iterator[_Bar]:
    if not wanted:
        yield _Bar(None, None)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        *("encoding", BarColumn(30), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")),
        *(TimeElapsedColumn(), TimeRemainingColumn()),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield _Bar(progress, progress.add_task("encoding", total=source.rows, rate=""))
