"""What a forward of a patched model takes of the host where CUDA kernels run, by part, without a GPU.

The CUDA library compiled for the CPU (tests/cuda_emulation) runs, in a dry run: its bindings check, allocate and plan
as on a GPU, and no kernel runs. Tensors are on the CPU and small, as the host's work does not depend on their size.
Torch's own products do run where Python calls them; what theirs takes of the host on a GPU, and what a launch takes
there, is not in these figures: nothing here was measured on a card.

Times are the calling thread's processor time, so that other processes disturb them less.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn import functional as F

from benchmarks.results_file import ROOT, finish

LAYERS = 12  # as roberta-base
_CONFIG = {
    **{"vocab_size": 64, "max_position_embeddings": 66, "hidden_size": 64, "num_attention_heads": 4},
    **{"num_hidden_layers": LAYERS, "intermediate_size": 64, "type_vocab_size": 1, "pad_token_id": 1},
}
BATCHES = {"1 x 8, no mask": (1, 8, None), "4 x 8, padded": (4, 8, (8, 3, 5, 1))}


def run(arguments: argparse.Namespace, console: Console, folder: Path) -> int:
    """Writes host-time.json into folder. Where the emulated library is not loaded yet, in a process where it does."""
    from roberta_kernels import backends

    if not backends.emulating():
        return _again(arguments, console, folder)
    results = measure(smoke=arguments.smoke)
    folder.mkdir(parents=True, exist_ok=True)
    finish(folder / "host-time.json", results, lines(results), console)
    return 0


def _again(arguments: argparse.Namespace, console: Console, folder: Path) -> int:
    sys.path.insert(0, str(ROOT / "tests" / "cuda_emulation"))
    import build

    if (why := build.missing()) is not None:
        raise ValueError(f"the CUDA library is compiled for the CPU, and that cannot be done here: {why}")
    console.print("building the CUDA library for the CPU (minutes, the first time)")
    built = build.library("plain")
    command = [sys.executable, "-m", "benchmarks", "host-time", "--out", str(folder), *["--smoke"] * arguments.smoke]
    environment = {**os.environ, **build.environment(built, sanitize=False), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


class _Silent:
    """In the place of CUDA graphs: a replay that launches nothing."""

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        return (lambda: None), run()

    def alone(self, buffers: list[Any]) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()


def model_of(**options: Any) -> Any:
    """A patched model of as many layers as roberta-base, and small otherwise."""
    from transformers import RobertaConfig, RobertaModel

    import roberta_kernels as rk

    model = RobertaModel(RobertaConfig(**_CONFIG)).eval()
    rk.patch(model, backend="cuda", **options)
    return model


def batch_of(batch: int, length: int, lengths: tuple[int, ...] | None) -> dict[str, Any]:
    ids = torch.randint(5, _CONFIG["vocab_size"], (batch, length))
    if lengths is None:
        return {"input_ids": ids}
    mask = (torch.arange(length)[None] < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.where(mask.bool(), ids, _CONFIG["pad_token_id"]), "attention_mask": mask}


def measure(*, smoke: bool) -> dict[str, Any]:
    """Milliseconds by batch and part."""
    from benchmarks import machine
    from roberta_kernels import backends
    from roberta_kernels.hf import route

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # what no kernel wrote is what was in memory, on which products would be slow
    library = ctypes.CDLL(os.environ[backends.EMULATION_VARIABLE])
    model, recorded = model_of(), model_of(cuda_graphs=True)
    make, route.make_recorder = route.make_recorder, lambda device: _Silent()
    found: dict[str, Any] = {}
    for name, sizes in BATCHES.items():
        inputs = batch_of(*sizes)
        with torch.no_grad(), backends.backend("cuda"):
            for one in (model, recorded, recorded):
                one(**inputs)  # decided and kept; the second call of a bucket is recorded
            library.rk_emulation_set_dry_run(1)
            try:
                calls = parts_of(model, inputs) | {"forward, graphs replayed": partial(recorded, **inputs)}
                found[name] = {what: _milliseconds(call, library, smoke) for what, call in calls.items()}
            finally:
                library.rk_emulation_set_dry_run(0)
    route.make_recorder = make
    return {"host_time": True, "quick": smoke, **machine.conditions("cpu"), "layers": LAYERS, "milliseconds": found}


def _milliseconds(call: Callable[[], Any], library: ctypes.CDLL, smoke: bool) -> float:
    """The median of some turns."""
    turns, calls = (2, 2) if smoke else (15, 20)
    seconds = []
    for turn in range(turns + 1):
        start = time.thread_time()
        for _ in range(calls):
            call()
        if turn > 0:  # the first warms up
            seconds.append((time.thread_time() - start) / calls)
        library.rk_emulation_take_launches(None, ctypes.c_int64(0))  # forgets what was recorded
    return 1e3 * statistics.median(seconds)


def parts_of(model: Any, inputs: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """The whole forward, its parts one after another, and what the layers are made of where Python walks them.

    The lines that begin with "of which" are parts of the line before them.
    """
    from roberta_kernels.hf import padding, route
    from roberta_kernels.hf.arguments import by_name
    from roberta_kernels.hf.survey import survey_of

    kwargs = by_name(model, (), dict(inputs))
    chosen: Any = route.decide(model, kwargs)
    layout: Any = padding.layout(model, chosen, kwargs)
    hidden = model._rk_embed(model._rk_rows(layout, kwargs))
    survey = survey_of(model)
    assert survey.watch is not None
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: model(**inputs),
        "route of the call": lambda: route.decide(model, kwargs),
        "of which: has nothing changed": survey.watch.holds,
        "layout of the batch": lambda: padding.layout(model, chosen, kwargs),
        "embeddings": lambda: model._rk_embed(model._rk_rows(layout, kwargs)),
        "layers": lambda: model._rk_layers(chosen, hidden, layout.sequences),
        "padding, pooler, output": lambda: model._rk_output(layout.pad(hidden), True),
    }
    if not isinstance(chosen, route.Encoder):
        calls["of which: torch's linears"] = lambda: _linears(model, hidden)
        calls["of which: our ops"] = lambda: _ops(model, hidden, layout.sequences)
    return calls


def _linears(model: Any, hidden: Any) -> None:
    for layer in model.encoder.layer:
        own = layer.attention.self
        for module in (own.query, own.key, own.value):
            F.linear(hidden, module.weight, module.bias)
        F.linear(hidden, layer.attention.output.dense.weight)


def _ops(model: Any, hidden: Any, sequences: Any) -> None:
    from roberta_kernels import ops

    heads = hidden.view(hidden.shape[0], 4, -1)
    for layer in model.encoder.layer:
        ops.attention(
            heads,
            heads,
            heads,
            sequences.cu_seqlens,
            max_seqlen_q=sequences.max_seqlen,
            key_mask=sequences.key_mask,
        )
        for output in (layer.attention.output, layer.output):
            norm = output.LayerNorm
            ops.add_layer_norm(hidden, hidden, norm.weight, norm.bias, eps=norm.eps, x_bias=output.dense.bias)
        inner = layer.intermediate.dense
        ops.gelu_ffn(hidden, inner.weight, inner.bias, layer.output.dense.weight)


def lines(results: dict[str, Any]) -> list[str]:
    """The results in words."""
    told = [
        f"{results['layers']} layers, milliseconds of the host, launches left out ({results['machine_info']['cpu']})"
    ]
    for batch, parts in results["milliseconds"].items():
        told += [batch, *(f"  {what:<34} {milliseconds:7.3f}" for what, milliseconds in parts.items())]
    return told
