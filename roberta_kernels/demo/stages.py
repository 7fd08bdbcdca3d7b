"""The demo from end to end: real text, a model that embeds it, a model that learns from it, and what came of it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from roberta_kernels import backends
from roberta_kernels.demo import corpus, results, throughput, training
from roberta_kernels.demo.options import Options
from roberta_kernels.encoding import longest_input


class DemoError(RuntimeError):
    """The demo cannot run here; the message says why."""


@dataclass(frozen=True)
class _Scale:
    """How much of everything: docstrings (None: all), vocabulary, the two models, seconds for each part."""

    texts: int | None
    vocabulary: int
    layers: int
    hidden: int
    embedding_seconds: float
    student_vocabulary: int
    student_layers: int
    student_hidden: int
    training_seconds: float


_FULL = _Scale(None, 8192, 12, 768, 100.0, 2048, 2, 128, 85.0)
_QUICK = _Scale(1200, 2048, 2, 128, 3.0, 1024, 2, 64, 6.0)


def run(options: Options, console: Console, *, model: Any = None, tokenizer: Any = None) -> bool:
    """The whole demo; whether the promise held. `model`, with its `tokenizer`, embeds in place of the random one."""
    from roberta_kernels.demo import pictures  # here, so that what it needs is missed before the work, not after

    begin = time.perf_counter()
    scale = _QUICK if options.quick else _FULL
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    console.print("[bold]1  The text[/bold]: the docstrings of this Python's standard library")
    texts = corpus.docstrings(scale.texts)
    if len(texts) < 200:
        raise DemoError(f"this Python's standard library has {len(texts)} docstrings; the demo needs its sources (200)")
    longest = corpus.LONGEST if model is None else min(corpus.LONGEST, longest_input(model))
    own_tokenizer = corpus.train_tokenizer(texts, scale.vocabulary)
    encoded = corpus.encode(tokenizer or own_tokenizer, texts, longest)
    origin = f"trained on them ({len(own_tokenizer):,} words)" if tokenizer is None else "that came with the model"
    _print_text(encoded, origin, console)

    console.print("\n[bold]2  Embedding it[/bold]: original and patched, the same batches, turn by turn")
    embedder = _embedder(model, len(own_tokenizer), options, scale, device)
    embedded = _embed(embedder, encoded, (tokenizer or own_tokenizer).pad_token_id, options, scale, console)

    console.print("\n[bold]3  Training[/bold]: a small RoBERTa learns to fill in masked words, from the same weights")
    console.print("   three times, step by step in turns: original, patched, and the original with eager attention")
    trained = _train(texts, options, scale, device, console)
    results.print_predictions(trained, console)

    lengths = [len(ids) for ids in encoded]
    files = [options.output / name for name in ("throughput.png", "loss.png", "summary.json")]
    title = f"Embedding real text, {embedder.name}, {embedder.dtype}"
    pictures.throughput_picture(embedded, lengths, title, files[0])
    pictures.loss_picture(trained, f"Training a RoBERTa of {trained.parameters / 1e6:.1f} million weights", files[1])
    summary = results.summary(options, embedder.description(), embedded, trained, lengths)
    summary["seconds"] = round(time.perf_counter() - begin, 1)
    files[2].write_text(json.dumps(summary, indent=2) + "\n")
    results.print_results(embedded, trained, console)
    console.print(f"{summary['seconds']:.0f} s. Pictures and figures: " + ", ".join(str(file) for file in files))
    holds = embedded.holds and trained.holds
    if not holds:
        results.print_broken(embedded, trained, console)
    return holds


def _print_text(encoded: list[list[int]], origin: str, console: Console) -> None:
    lengths = [len(ids) for ids in encoded]
    middle = sorted(lengths)[len(lengths) // 2]
    console.print(
        f"   {len(encoded):,} docstrings, {sum(lengths):,} tokens of a byte-level BPE {origin}"
        f"; half are shorter than {middle} tokens, the longest has {max(lengths)}"
    )


# -- embedding ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Embedder:
    """The model of the embedding part, where it is, and what computes it. where: for people."""

    model: Any
    name: str
    dtype: str
    where: str
    backend: str
    detail: str

    def description(self) -> dict[str, Any]:
        return {"device": self.where, "backend": {"name": self.backend, "detail": self.detail}, "dtype": self.dtype}


def _embedder(model: Any, vocabulary: int, options: Options, scale: _Scale, device: torch.device) -> _Embedder:
    dtype = _dtype(options.dtype, device, model)
    if model is None:
        model = _random_encoder(vocabulary, scale, options.seed)
        name = f"random weights of {'a small' if options.quick else 'roberta-base'} size"
    else:
        name = type(model).__name__
        if next((p for p in model.parameters() if p.is_floating_point()), None) is None:
            raise DemoError(f"{name} has no floating-point weights")
    backend = backends.serving(torch.empty(0, device=device, dtype=dtype))
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"
    dtype_name = str(dtype).removeprefix("torch.")
    return _Embedder(model.to(device, dtype), name, dtype_name, where, str(backend), backend.detail)


def _embed(
    embedder: _Embedder, encoded: list[list[int]], pad: int, options: Options, scale: _Scale, console: Console
) -> throughput.Throughput:
    console.print(
        f"   {embedder.name}, {embedder.dtype}, batches of {options.batch_size}, on {embedder.where}; "
        f"kernels: {embedder.backend} ({embedder.detail})",
        highlight=False,
    )
    embedded = throughput.measure(
        embedder.model,
        encoded,
        pad=pad,
        batch_size=options.batch_size,
        budget=scale.embedding_seconds,
        console=console,
    )
    if not embedded.patch_report.replaced:
        raise DemoError(f"patch finds nothing to replace in {embedder.name}")
    for detour in embedded.detours:
        console.print(Text(f"   not packed: {detour}", "yellow"))
    return embedded


def _dtype(name: str, device: torch.device, model: Any) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    if model is not None and device.type == "cpu":
        return model.dtype
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _random_encoder(vocabulary: int, scale: _Scale, seed: int) -> Any:
    from transformers import RobertaConfig, RobertaModel

    torch.manual_seed(seed)
    return RobertaModel(
        RobertaConfig(
            vocab_size=vocabulary,
            hidden_size=scale.hidden,
            num_hidden_layers=scale.layers,
            num_attention_heads=scale.hidden // 64,
            intermediate_size=4 * scale.hidden,
            max_position_embeddings=corpus.LONGEST + 2,
            type_vocab_size=1,
            attn_implementation="sdpa",  # type: ignore[call-arg]
        ),
        add_pooling_layer=False,
    )


# -- training ----------------------------------------------------------------------------------------------------------


def _train(
    texts: list[str], options: Options, scale: _Scale, device: torch.device, console: Console
) -> training.Training:
    # A small vocabulary and no line breaks: more of the little that it can learn in so short a time is words. It learns
    # the frequencies of tokens first, then context, of which a minute on a CPU shows only the beginning.
    lines = list(dict.fromkeys(" ".join(text.split()) for text in texts))
    return training.train(
        corpus.train_tokenizer(lines, scale.student_vocabulary),
        lines,
        device=device,
        seed=options.seed,
        layers=scale.student_layers,
        hidden=scale.student_hidden,
        budget=scale.training_seconds if options.training_seconds is None else options.training_seconds,
        console=console,
    )
