"""Summaries by RoBERTa2RoBERTa (an EncoderDecoderModel of two roberta-base): `python -m benchmarks generation`.

A batch of 8 sources of 512 tokens, 64 new tokens each, greedy, with a dynamic cache, float32. Weights are random: what
is timed does not depend on them. Contenders, in turns: transformers as it comes (sdpa); patched; patched and loaded
with attn_implementation="roberta_kernels", by which the decoder's attention of several queries runs fused as well.
Before anything is timed, the tokens of all must be those of transformers. Encoder and decoding are timed apart too.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import machine, timing
from benchmarks.results_file import finish
from benchmarks.runner import percentile
from benchmarks.timing import Call, Clock
from roberta_kernels import patch

BATCH, SOURCE, NEW = 8, 512, 64
SMOKE = (2, 12, 5)
STOCK, OURS, SWITCHED = "transformers", "patched", "patched, attn_implementation"
_EFFORT = timing.Effort(turns=5, min_turns=3, turn_seconds=0.1, max_calls=3, rest=0.15, budget=180.0)


def summariser(*, smoke: bool, attention: str = "sdpa") -> Any:
    from transformers import AutoConfig, EncoderDecoderConfig, EncoderDecoderModel

    size: dict[str, Any] = {"vocab_size": 50265, "max_position_embeddings": 514, "layer_norm_eps": 1e-5}
    if smoke:
        size |= {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
        size |= {"num_attention_heads": 2}
    sides = [
        AutoConfig.for_model(
            "roberta", type_vocab_size=1, pad_token_id=1, attn_implementation=attention, **size, **more
        )
        for more in ({}, {"is_decoder": True, "add_cross_attention": True})
    ]
    config = EncoderDecoderConfig.from_encoder_decoder_configs(*sides)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 0, 1, 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = EncoderDecoderModel(config=config).eval()
        # Tied to the embeddings it would give one token again and again; with larger weights, which mend that, float32
        # errs by as much as logits differ, and equal tokens would be luck.
        decoder = model.decoder.lm_head.decoder
        decoder.weight = torch.nn.Parameter(torch.empty_like(decoder.weight).normal_(std=0.02))
    for side in (model.encoder, model.decoder):
        side.set_attn_implementation(attention)
    return model


def contenders(*, smoke: bool) -> dict[str, Any]:
    stock = summariser(smoke=smoke)
    ours, switched = copy.deepcopy(stock), copy.deepcopy(stock)
    for side in (switched.encoder, switched.decoder):
        side.set_attn_implementation("roberta_kernels")
    for model in (ours, switched):
        patch(model)
    return {STOCK: stock, OURS: ours, SWITCHED: switched}


def generate(model: Any, ids: Tensor, new: int, encoded: Any = None) -> Tensor:
    given = {"attention_mask": torch.ones_like(ids)}
    given |= {"input_ids": ids} if encoded is None else {"encoder_outputs": encoded}
    return model.generate(**given, do_sample=False, max_new_tokens=new, min_new_tokens=new)


def _calls(models: dict[str, Any], ids: Tensor, new: int) -> dict[str, dict[str, Callable[[], Any]]]:
    with torch.no_grad():
        encoded = models[STOCK].encoder(input_ids=ids)
    parts: dict[str, dict[str, Callable[[], Any]]] = {"summary": {}, "encoder": {}, "decoding": {}}
    for name, model in models.items():
        parts["summary"][name] = functools.partial(generate, model, ids, new)
        parts["encoder"][name] = functools.partial(model.encoder, input_ids=ids)
        parts["decoding"][name] = functools.partial(generate, model, ids, new, copy.copy(encoded))
    return parts


def measure(console: Console, *, smoke: bool) -> dict[str, Any]:
    """The result file's content."""
    batch, source, new = SMOKE if smoke else (BATCH, SOURCE, NEW)
    models = contenders(smoke=smoke)
    ids = torch.randint(5, models[STOCK].config.encoder.vocab_size, (batch, source))
    results: dict[str, Any] = {
        "generation": True,
        "quick": smoke,
        **machine.conditions("cpu"),
        "batch": batch,
        "source_tokens": source,
        "new_tokens": new,
        "failures": [],
        "parts": {},
    }
    console.print("checking tokens", markup=False, highlight=False)
    want = generate(models[STOCK], ids, new)
    for name in (OURS, SWITCHED):
        same = torch.equal(generate(models[name], ids, new), want)
        if not same:
            results["failures"].append({"contender": name, "reason": "other tokens", "broken": True})
            del models[name]
    for part, runs in _calls(models, ids, new).items():
        console.print(f"measuring {part}", markup=False, highlight=False)
        calls = {name: Call(torch.no_grad()(run), contextlib.nullcontext, slow=True) for name, run in runs.items()}
        samples = timing.measure(calls, Clock("cpu"), timing.QUICK if smoke else _EFFORT)
        stock = samples[STOCK].turn_medians
        results["parts"][part] = {
            name: {
                "median_s": statistics.median(found.calls),
                "calls": len(found.calls),
                # How many times as fast as stock, turn by turn.
                "times_stock": [
                    percentile([a / b for a, b in zip(stock, found.turn_medians, strict=True)], percent)
                    for percent in (50, 20, 80)
                ],
            }
            for name, found in samples.items()
        }
    return results


def lines(results: dict[str, Any]) -> Iterator[str]:
    """The results in words."""
    info = results["machine_info"]
    yield (
        f"RoBERTa2RoBERTa, batch {results['batch']}, {results['source_tokens']} source tokens, "
        f"{results['new_tokens']} new ones, {info['cpu']}, {info['threads']} threads"
    )
    for part, rows in results["parts"].items():
        for name, row in rows.items():
            ratio = "{:.2f} times as fast ({:.2f} to {:.2f})".format(*row["times_stock"])
            yield f"{part:<9} {name:<32} {row['median_s']:8.3f} s  {ratio}"
    for row in results["failures"]:
        yield f"{row['contender']}: {row['reason']}"


def run(arguments: argparse.Namespace, console: Console, folder: Path) -> int:
    """Writes generation.json into folder. Exit status: 1 where ours gave other tokens."""
    if arguments.smoke:
        torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    results = measure(console, smoke=arguments.smoke)
    finish(folder / "generation.json", results, lines(results), console)
    return 1 if results["failures"] else 0
