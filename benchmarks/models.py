"""Whole models: RoBERTa as Hugging Face has it, eager and compiled, against the same model patched.

Weights are random, of one seed for all. Even batches carry no attention mask, as transformers drops one that masks
nothing; mixed lengths are padded on the right. Forward runs under no_grad; forward + backward takes the gradient of
every parameter for a random gradient at the real positions. Dropout is off, so that what is timed is what was checked.

Times are as a caller sees them: launches, and the synchronisation of the packed layout, are in them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.runner import Poisoned, check_gpu, first_line, percentile, ratio, relative_error
from benchmarks.timing import Call, Clock, Effort, measure
from benchmarks.workloads import DIRECTIONS, DTYPES, Batch
from roberta_kernels import backends, patch, tolerance
from roberta_kernels.backends import BackendError

MODEL = {"name": "roberta-base", "vocab_size": 50265, "max_position_embeddings": 514}
SMOKE_MODEL = {
    "name": "tiny",
    "vocab_size": 300,
    "max_position_embeddings": 40,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}
# Compiling a model may take most of a minute; with less left it is not begun.
_COMPILE_SECONDS = 30.0
_NONSENSE = 0.1  # relative to the largest value; below it, a model that breaks the promise is timed, and said to
# Rounding floors of a whole model, as in tests/models: in bfloat16 four of them are 3% already.
_FLOOR_ULPS = {torch.bfloat16: 4.0, torch.float32: 16.0}
_PROBED = ("embeddings.word_embeddings.weight", "encoder.layer.0.attention.self.query.weight", "LayerNorm.bias")


@dataclass(frozen=True)
class Runner:
    """One way to run the model. prepare: what is done to a copy of the original; returns what is called."""

    prepare: Callable[[nn.Module], Callable[..., Any]]
    note: str
    ours: bool = False
    compiled: bool = False
    attention: str = "sdpa"
    backend: str | None = None


def _patched(model: nn.Module, *, packed: bool | str = "auto", backend: str = "auto") -> nn.Module:
    if not patch(model, packed=packed, backend=backend):
        raise RuntimeError("patch replaced nothing")
    return model


def _compiled(mode: str | None) -> Callable[[Any], Any]:
    return lambda model: torch.compile(model, mode=mode, dynamic=True)


def runners(device: str, *, smoke: bool = False) -> dict[str, Runner]:
    """By name, those under test first."""
    found = {}
    names = ("reference",) if smoke else tuple(n for n in ("cuda", "triton") if backends.available_backends()[n])
    for name in names:
        found[f"ours, {name}"] = Runner(
            lambda model, name=name: _patched(model, backend=name), f"patched, backend {name}", ours=True, backend=name
        )
    found["ours, padded"] = Runner(
        lambda model: _patched(model, packed=False), "patched, padding computed, the backend of choice", ours=True
    )
    if not smoke:
        found["ours, compile"] = Runner(
            lambda model: _compiled(None)(_patched(model)), "patched, under torch.compile", ours=True, compiled=True
        )
    found["HF eager"] = Runner(lambda model: model, "transformers, attention in plain torch", attention="eager")
    found["HF sdpa"] = Runner(lambda model: model, "transformers as it comes")
    if not smoke:
        found["HF sdpa compile"] = Runner(
            _compiled(None), "the same under torch.compile, shapes dynamic", compiled=True
        )
        found["HF sdpa reduce-overhead"] = Runner(
            _compiled("reduce-overhead"), "the same with CUDA graphs (mode reduce-overhead)", compiled=True
        )
    return found


def original(device: str, weights: torch.dtype, *, smoke: bool, attention: str) -> nn.Module:
    """The model of the run: the same whatever the arguments, its weights rounded to a dtype."""
    from transformers import RobertaConfig, RobertaModel

    options = {key: value for key, value in (SMOKE_MODEL if smoke else MODEL).items() if key != "name"}
    config = RobertaConfig(
        **options, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, type_vocab_size=1, pad_token_id=1
    )
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = RobertaModel(config, add_pooling_layer=False)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms that are not 0 and 1
                parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    return model.to(device, weights).eval()


@dataclass(frozen=True)
class Inputs:
    """A batch, and the gradient that its hidden states get, zero at padding."""

    arguments: dict[str, Tensor]
    real: Tensor  # [B, S]
    grad: Tensor  # [B, S, H]

    def in_float64(self) -> Inputs:
        return dataclasses.replace(self, grad=self.grad.double())


def make_inputs(batch: Batch, config: Any, device: str, dtype: torch.dtype) -> Inputs:
    draw = torch.Generator().manual_seed(1)
    longest = max(batch.lengths)
    real = torch.arange(longest) < torch.tensor(batch.lengths)[:, None]
    ids = torch.randint(2, config.vocab_size, real.shape, generator=draw).masked_fill(~real, config.pad_token_id)
    grad = torch.randn(*real.shape, config.hidden_size, generator=draw) * real[..., None]
    arguments = {"input_ids": ids.to(device)}
    if not batch.even:
        arguments["attention_mask"] = real.long().to(device)
    return Inputs(arguments, real.to(device), grad.to(device, dtype))


def _call(run: Callable[..., Any], model: nn.Module, inputs: Inputs, direction: str) -> Callable[[], Any]:
    parameters = list(model.parameters())

    def forward() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            return run(**inputs.arguments).last_hidden_state

    def forward_backward() -> tuple[Tensor | None, ...]:
        torch.compiler.cudagraph_mark_step_begin()
        hidden = run(**inputs.arguments).last_hidden_state
        return torch.autograd.grad(hidden, parameters, inputs.grad, allow_unused=True)

    return forward if direction == "forward" else forward_backward


def _answers(call: Callable[[], Any], model: nn.Module, inputs: Inputs, direction: str) -> dict[str, Tensor]:
    """Hidden states at real positions, or the gradients of some parameters."""
    if direction == "forward":
        return {"hidden states": call()[inputs.real].clone()}
    names = [name for name, _ in model.named_parameters()]
    found = dict(zip(names, call(), strict=True))
    return {name: g.clone() for name, g in found.items() if name.endswith(_PROBED) and g is not None}


def flops(batch: Batch, config: Any, direction: str) -> int:
    """Of the matrix products over real tokens; backward has twice the forward's."""
    hidden, inner = config.hidden_size, config.intermediate_size
    products = batch.tokens * (8 * hidden * hidden + 4 * hidden * inner)
    attention = 4 * hidden * sum(length * length for length in batch.lengths)
    return (3 if direction == "forward_backward" else 1) * config.num_hidden_layers * (products + attention)


def run_models(
    batches: Iterable[Batch],
    *,
    device: str,
    roofs: dict[str, Any] | None,
    effort: Effort | None,
    deadline: float,
    smoke: bool = False,
    done: Iterable[str] = (),
    excluded: Callable[[str, str], bool] = lambda case, name: False,
    begin: Callable[[str, str], None] = lambda case, name: None,
) -> Iterator[dict[str, Any]]:
    """Yields {"model": row}, {"failure": ...} and {"done": case}.

    effort None: only calls everything once, for what it compiles.

    deadline: of time.time(). Raises Poisoned.
    """
    torch._dynamo.config.recompile_limit = 64
    dtype_name = "float32" if smoke else "bfloat16"
    dtype = DTYPES[dtype_name]
    clock = Clock(device, queued=False)
    batches = list(batches)
    # Not eager attention, whose softmax is in float32 whatever comes in.
    exact_model = original(device, dtype, smoke=smoke, attention="sdpa").double()
    for direction in DIRECTIONS:
        models: dict[str, tuple[Callable[..., Any], nn.Module]] = {}
        broken: dict[str, str] = {}
        known = runners(device, smoke=smoke)
        for batch in batches:
            case = f"model-{dtype_name}-{direction}-{batch.name}"
            if case in done:
                continue
            described = {
                "case": case,
                "model": (SMOKE_MODEL if smoke else MODEL)["name"],
                "dtype": dtype_name,
                "direction": direction,
                "batch": {"name": batch.name, "lengths": list(batch.lengths)},
            }
            inputs = make_inputs(batch, exact_model.config, device, dtype)
            exact: dict[str, Tensor] = {}
            if effort is not None:
                exact_call = _call(exact_model, exact_model, inputs.in_float64(), direction)
                exact = _answers(exact_call, exact_model, inputs, direction)
                if device == "cuda":
                    torch.cuda.empty_cache()  # float64 took most of the card
            plain: dict[str, Tensor] | None = None
            calls: dict[str, Call] = {}
            figures: dict[str, dict[str, Any]] = {}
            # Hugging Face's sdpa first: the others' answers are compared with its own.
            for name in sorted(known, key=lambda name: name != "HF sdpa"):
                runner = known[name]

                failure = functools.partial(_failure, described, name)
                if excluded(case, name):
                    continue
                if name in broken:
                    yield failure(broken[name])
                    continue
                if time.time() > deadline - (_COMPILE_SECONDS if runner.compiled else 0.0):
                    yield failure("no time left")
                    continue
                begin(case, name)
                try:
                    if name not in models:
                        model = original(device, dtype, smoke=smoke, attention=runner.attention)
                        models[name] = runner.prepare(model), model
                    run, model = models[name]
                    call = _call(run, model, inputs, direction)
                    answers = _answers(call, model, inputs, direction)
                    clock.synchronize()
                except Exception as error:
                    check_gpu(device)
                    gap = isinstance(error, (NotImplementedError, BackendError))
                    if runner.compiled:  # it would fail again, after as long a time
                        broken[name] = first_line(error)
                    yield failure(first_line(error), gap=not runner.ours or runner.compiled or gap)
                    continue
                if effort is None:
                    continue
                if name == "HF sdpa":
                    plain = answers
                wrong, error = _wrong(answers, plain, exact)
                if wrong:
                    yield failure(f"wrong answers: {wrong}", gap=not runner.ours)
                    if not error < _NONSENSE:
                        continue
                figures[name] = {
                    "ours": runner.ours,
                    "backend": runner.backend,
                    "note": runner.note,
                    "error": error,
                    "within_promise": not wrong,
                    **_peak(call, device),
                }
                calls[name] = Call(call, functools.partial(_announced, begin, case, name))
            if effort is None:
                continue
            measured = {}
            for name, samples in measure(calls, clock, effort).items():
                seconds = statistics.median(samples.calls)
                work = flops(batch, exact_model.config, direction)
                row = {
                    **described,
                    "contender": name,
                    **figures[name],
                    "median_s": seconds,
                    "p20_s": percentile(samples.calls, 20),
                    "p80_s": percentile(samples.calls, 80),
                    "turn_medians_s": samples.turn_medians,
                    "flops": work,
                    "flops_per_s": work / seconds,
                    "useful_tokens": batch.tokens,
                    "useful_tokens_per_s": batch.tokens / seconds,
                }
                if roofs is not None:
                    row["roof_fraction"] = work / roofs["matmul"][dtype_name] / seconds
                measured[name] = row
            for row in measured.values():
                if row["ours"]:
                    row["ratios"] = {n: ratio(row, peer) for n, peer in measured.items() if not peer["ours"]}
                yield {"model": row}
            yield {"done": case}
        models.clear()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


@contextlib.contextmanager
def _announced(begin: Callable[[str, str], None], case: str, name: str) -> Iterator[None]:
    begin(case, name)
    yield


def _failure(described: dict[str, Any], name: str, reason: str, *, gap: bool = True) -> dict[str, Any]:
    return {"failure": {**described, "contender": name, "reason": reason, "broken": not gap}}


def _wrong(answers: dict[str, Tensor], plain: dict[str, Tensor] | None, exact: dict[str, Tensor]) -> tuple[str, float]:
    """(where the promise is broken or "", the largest relative error)."""
    if answers.keys() != exact.keys():
        return f"gradients of {sorted(exact.keys() ^ answers.keys())} are missing", float("nan")
    error = max(relative_error(answers[name], exact[name]) for name in exact)
    if plain is None or answers is plain:
        return ("" if error < _NONSENSE else f"relative error {error:.1e}"), error
    for name in exact:
        ours, original = answers[name], plain[name]
        ulps = _FLOOR_ULPS[ours.dtype]
        comparison = tolerance.compare(ours, original, exact[name], name=name, floor_ulps=ulps)
        if not comparison.holds:
            return str(comparison), error
    return "", error


def _peak(call: Callable[[], Any], device: str) -> dict[str, int]:
    """Bytes that a call takes beyond what was there before it."""
    if device != "cuda":
        return {}
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = call()
    torch.cuda.synchronize()
    del kept
    return {"peak_bytes": torch.cuda.max_memory_allocated() - before}


__all__ = ["Poisoned", "run_models"]
