"""`roberta-kernels demo`: real text embedded and a model trained, original against patched.

Needs no download and no GPU. What it claims it also checks: `run` returns False where an answer differs by more than
rounding explains.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from roberta_kernels import __version__, backends
from roberta_kernels.demo import corpus, throughput, training
from roberta_kernels.encoding import longest_input


class DemoError(RuntimeError):
    """The demo cannot run here; the message says why."""


@dataclass(frozen=True)
class Options:
    output: Path
    quick: bool = False
    seed: int = 0
    batch_size: int = 16
    dtype: str = "auto"
    training_seconds: float | None = None


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
    from roberta_kernels.demo import pictures

    begin = time.perf_counter()
    scale = _QUICK if options.quick else _FULL
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = _dtype(options.dtype, device, model)

    console.print("[bold]1  The text[/bold]: the docstrings of this Python's standard library")
    texts = corpus.docstrings(scale.texts)
    if len(texts) < 200:
        raise DemoError(f"this Python's standard library has {len(texts)} docstrings; the demo needs its sources (200)")
    own_tokenizer = corpus.train_tokenizer(texts, scale.vocabulary)
    longest = corpus.LONGEST if model is None else min(corpus.LONGEST, longest_input(model))
    encoded = corpus.encode(tokenizer or own_tokenizer, texts, longest)
    lengths = [len(ids) for ids in encoded]
    middle = sorted(lengths)[len(lengths) // 2]
    console.print(
        f"   {len(texts):,} docstrings, {sum(lengths):,} tokens of a byte-level BPE "
        + (f"trained on them ({len(own_tokenizer):,} words)" if tokenizer is None else "that came with the model")
        + f"; half are shorter than {middle} tokens, the longest has {max(lengths)}"
    )

    console.print("\n[bold]2  Embedding it[/bold]: original and patched, the same batches, turn by turn")
    if model is None:
        model = _random_encoder(len(own_tokenizer), scale, options.seed)
        name = f"random weights of {'a small' if options.quick else 'roberta-base'} size"
    else:
        name = type(model).__name__
        if next((p for p in model.parameters() if p.is_floating_point()), None) is None:
            raise DemoError(f"{name} has no floating-point weights")
    model = model.to(device, dtype)
    serving = backends.serving(torch.empty(0, device=device, dtype=dtype))
    served, detail = str(serving), serving.detail
    pad = (tokenizer or own_tokenizer).pad_token_id
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"
    console.print(
        f"   {name}, {str(dtype).removeprefix('torch.')}, batches of {options.batch_size}, on {where}; "
        f"served by {served} ({detail})",
        highlight=False,
    )
    embedded = throughput.measure(
        model, encoded, pad=pad, batch_size=options.batch_size, budget=scale.embedding_seconds, console=console
    )
    if not embedded.patch_report.replaced:
        raise DemoError(f"patch finds nothing to replace in {name}")
    for detour in embedded.detours:
        console.print(Text(f"   not packed: {detour}", "yellow"))
    del model

    console.print("\n[bold]3  Training[/bold]: a small RoBERTa learns to fill in masked words, from the same weights")
    console.print("   three times, step by step in turns: original, patched, and the original with eager attention")
    # A small vocabulary and no line breaks: more of the little that it can learn in so short a time is words. It learns
    # the frequencies of tokens first, then context, of which a minute on a CPU shows only the beginning.
    lines = list(dict.fromkeys(" ".join(text.split()) for text in texts))
    trained = training.train(
        corpus.train_tokenizer(lines, scale.student_vocabulary),
        lines,
        device=device,
        seed=options.seed,
        layers=scale.student_layers,
        hidden=scale.student_hidden,
        budget=scale.training_seconds if options.training_seconds is None else options.training_seconds,
        console=console,
    )
    _print_predictions(trained, console)

    holds = embedded.holds and trained.holds
    files = {
        "throughput": options.output / "throughput.png",
        "loss": options.output / "loss.png",
        "summary": options.output / "summary.json",
    }
    pictures.throughput_picture(
        embedded, lengths, f"Embedding real text, {name}, {str(dtype).removeprefix('torch.')}", files["throughput"]
    )
    pictures.loss_picture(
        trained, f"Training a RoBERTa of {trained.parameters / 1e6:.1f} million weights", files["loss"]
    )
    summary = _summary(options, embedded, trained, holds, served, detail, where, str(dtype), lengths)
    summary["seconds"] = round(time.perf_counter() - begin, 1)
    files["summary"].write_text(json.dumps(summary, indent=2) + "\n")
    _print_results(embedded, trained, console)
    console.print(
        f"{summary['seconds']:.0f} s. Pictures and figures: " + ", ".join(str(file) for file in files.values())
    )
    if not holds:
        broken = [str(comparison) for comparison in embedded.comparisons if not comparison.holds]
        if not trained.holds:
            broken.append(
                f"the loss curves part by {trained.largest_difference:.2e}, allowed {trained.allowed_difference:.2e}"
            )
        console.print(Text("The promise is BROKEN: " + "; ".join(broken), "bold red"))
    return holds


def _dtype(wish: str, device: torch.device, model: Any) -> torch.dtype:
    if wish != "auto":
        return getattr(torch, wish)
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


def _print_predictions(trained: training.Training, console: Console) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title="docstrings that it has not seen", title_justify="left")
    table.add_column("text", overflow="fold", ratio=3)
    table.add_column("was")
    table.add_column("guesses of the patched model", overflow="fold", ratio=3)
    for prediction in trained.predictions:
        guesses = Text(", ").join(
            Text(f"{word} {chance:.0%}", "bold green" if word == prediction.truth else "")
            for word, chance in prediction.guesses
        )
        table.add_row(Text(prediction.text), Text(prediction.truth), guesses)
    console.print(table)


def _print_results(embedded: throughput.Throughput, trained: training.Training, console: Console) -> None:
    def verdict(holds: bool) -> Text:
        return Text("holds", "green") if holds else Text("BROKEN", "bold red")

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading, justify in (("", "left"), ("original", "right"), ("patched", "right"), ("", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    table.add_row(
        f"embedding: {len(embedded.batches)} of {embedded.available} batches, {embedded.padding:.0%} padding",
        f"{embedded.real / embedded.original_seconds:,.0f} tokens/s",
        f"{embedded.real / embedded.patched_seconds:,.0f} tokens/s",
        Text(f"{embedded.speedup:.2f} times", "bold"),
    )
    worst = max(embedded.comparisons, key=lambda c: c.max_error / c.max_allowed if c.max_allowed else 0.0)
    table.add_row(
        f"largest error against float64 (allowed {worst.max_allowed:.1e})",
        f"{worst.max_error_original:.1e}",
        f"{worst.max_error:.1e}",
        verdict(embedded.holds),
    )
    table.add_row(
        f"training: {trained.steps} steps, {trained.padding:.0%} padding",
        f"{1000 * trained.seconds['original'] / trained.steps:,.0f} ms/step",
        f"{1000 * trained.seconds['patched'] / trained.steps:,.0f} ms/step",
        Text(f"{trained.speedup:.2f} times", "bold"),
    )
    table.add_row(
        f"loss on unseen text (at first {trained.losses['original'][0]:.2f}; frequencies {trained.frequencies:.2f})",
        f"{trained.held_out['original']:.4f}",
        f"{trained.held_out['patched']:.4f}",
        "",
    )
    table.add_row(
        f"largest difference of the losses (allowed {trained.allowed_difference:.1e})",
        f"{max(trained.drift('control')):.1e} (eager)",
        f"{trained.largest_difference:.1e}",
        verdict(trained.holds),
    )
    console.print(table)


def _summary(
    options: Options,
    embedded: throughput.Throughput,
    trained: training.Training,
    holds: bool,
    served: str,
    detail: str,
    where: str,
    dtype: str,
    lengths: list[int],
) -> dict[str, Any]:
    import transformers

    return {
        "holds": holds,
        "versions": {
            "roberta_kernels": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": where,
        "backend": {"name": served, "detail": detail},
        "seed": options.seed,
        "quick": options.quick,
        "text": {"docstrings": len(lengths), "tokens": sum(lengths), "longest": max(lengths)},
        "embedding": {
            "dtype": dtype.removeprefix("torch."),
            "parameters": embedded.parameters,
            "batch_size": options.batch_size,
            "batches": len(embedded.batches),
            "batches_in_all": embedded.available,
            "real_tokens": embedded.real,
            "padding": embedded.padding,
            "original_tokens_per_second": embedded.real / embedded.original_seconds,
            "patched_tokens_per_second": embedded.real / embedded.patched_seconds,
            "speedup": embedded.speedup,
            "largest_difference": embedded.difference,
            "three_way": [{**asdict(comparison), "holds": comparison.holds} for comparison in embedded.comparisons],
            "each": [asdict(batch) for batch in embedded.batches],
            "holds": embedded.holds,
        },
        "training": {
            "parameters": trained.parameters,
            "steps": trained.steps,
            "padding": trained.padding,
            "original_ms_per_step": 1000 * trained.seconds["original"] / trained.steps,
            "patched_ms_per_step": 1000 * trained.seconds["patched"] / trained.steps,
            "speedup": trained.speedup,
            "first_loss": trained.losses["original"][0],
            "held_out_loss": trained.held_out,
            "held_out_loss_of_frequencies": trained.frequencies,
            "largest_difference": trained.largest_difference,
            "allowed_difference": trained.allowed_difference,
            "control_difference": max(trained.drift("control")),
            "losses": trained.losses,
            "predictions": [asdict(prediction) for prediction in trained.predictions],
            "holds": trained.holds,
        },
    }
