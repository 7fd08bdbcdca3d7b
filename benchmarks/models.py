"""Whole models: RoBERTa as Hugging Face has it, eager and compiled, or exported to another engine, against the same
model patched. What the GPU suite and the CPU suite (cpu_suite.py) have in common.

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
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.roofs import compute_roof, memory_roof
from benchmarks.runner import Poisoned, check_gpu, first_line, percentile, ratio, relative_error
from benchmarks.served import Served
from benchmarks.timing import Call, Clock, Effort, Samples, measure
from benchmarks.workloads import DIRECTIONS, DTYPES, Batch
from roberta_kernels import backends, patch, tolerance
from roberta_kernels.backends import BackendError, choosing

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
SLOW = 2.0  # seconds of a first call, beyond which nobody has to be asked how often it fits into a turn
_NONSENSE = 0.1  # relative to the largest value; below it, a model that breaks the promise is timed, and said to
_LOSSLESS = 1e-5  # a float32 model whose weights are kept with less cannot be as exact as this
# Rounding floors of a whole model, as in tests/models: in bfloat16 four of them are 3% already.
_FLOOR_ULPS = {torch.bfloat16: 4.0, torch.float32: 16.0}
_PROBED = ("embeddings.word_embeddings.weight", "encoder.layer.0.attention.self.query.weight", "LayerNorm.bias")


@dataclass(frozen=True)
class Runner:
    """One way to run the model.

    prepare: what is done to a copy of the original; returns what is called.
    variant: of the CUDA kernels, that may run: of an op that has it not, the best below.
    engine: an engine's, which has no need of that copy: prepare gets None. Forward only.
    weights: how they are kept, where that is with less than the run's dtype.
    arithmetic: what products take, where that is less than the run's dtype: as in roofs.compute_roof. A model with
        either does not keep the promise of the run's dtype; its error is shown.
    instead_of: the contender that somebody who patches had before, in the same precision.
    trains: whether gradients of its parameters can be had.
    missing: why it cannot run here.
    """

    prepare: Callable[[Any], Callable[..., Any]]
    note: str
    ours: bool = False
    compiled: bool = False
    attention: str = "sdpa"
    backend: str | None = None
    variant: str | None = None
    engine: bool = False
    weights: str | None = None
    arithmetic: str | None = None
    instead_of: str | None = None
    trains: bool = True
    missing: str = ""

    @property
    def rounded(self) -> bool:
        return bool(self.weights or self.arithmetic)


def patched(model: nn.Module, **options: Any) -> nn.Module:
    """The model, patched with these options of patch()."""
    if not patch(model, **options):
        raise RuntimeError("patch replaced nothing")
    return model


def compiled(mode: str | None) -> Callable[[Any], Any]:
    return lambda model: torch.compile(model, mode=mode, dynamic=True)


def runners(device: str, *, smoke: bool = False, quick: bool = False) -> dict[str, Runner]:
    """By name, those under test first. quick: without those that tell least for the time that they take."""
    found = {}
    available = {name for name, status in backends.available_backends().items() if status}
    if smoke:
        found["ours, reference"] = Runner(_patched_for("reference"), "patched", ours=True, backend="reference")
    elif "cuda" in available:
        variants = _variants_here()
        for v in variants:
            note = f"patched, backend cuda, variant {v}"
            found[f"ours, cuda {v}"] = Runner(_patched_for("cuda"), note, ours=True, backend="cuda", variant=v)
        found["ours, reduce-overhead"] = Runner(
            lambda model: compiled("reduce-overhead")(patched(model, backend="cuda")),
            f"the one of variant {variants[-1]} under torch.compile with CUDA graphs (mode reduce-overhead)",
            ours=True,
            compiled=True,
            backend="cuda",
            variant=variants[-1],
        )
        found["ours, graphs"] = Runner(
            replayed,
            f"the one of variant {variants[-1]} with cuda_graphs=True; every timed call is a replay",
            ours=True,
            backend="cuda",
            variant=variants[-1],
            trains=False,
        )
    if "triton" in available and not smoke:
        found["ours, triton"] = Runner(_patched_for("triton"), "patched, backend triton", ours=True, backend="triton")
    found["ours, zeros"] = Runner(
        lambda model: patched(model, padded_rows="zeros"),
        "patched, padded rows left out, the backend of choice",
        ours=True,
    )
    if not smoke and not quick:
        found["ours, compile"] = Runner(
            lambda model: compiled(None)(patched(model)), "patched, under torch.compile", ours=True, compiled=True
        )
    if smoke or not quick:
        found["HF eager"] = Runner(lambda model: model, "transformers, attention in plain torch", attention="eager")
    found["HF sdpa"] = Runner(lambda model: model, "transformers as it comes")
    if not smoke:
        found["HF sdpa compile"] = Runner(compiled(None), "the same under torch.compile, shapes dynamic", compiled=True)
        found["HF sdpa reduce-overhead"] = Runner(
            compiled("reduce-overhead"), "the same with CUDA graphs (mode reduce-overhead)", compiled=True
        )
    return found


def replayed(model: Any) -> Callable[..., Any]:
    """The model with cuda_graphs=True, called until the answer is a replay's. RuntimeError where none comes."""
    report = patch(model, backend="cuda", cuda_graphs=True)

    def call(**inputs: Any) -> Any:
        for _ in range(3):  # the first call of a bucket runs as ever
            before = report.graphs().get("replayed", 0)
            output = model(**inputs)
            if report.graphs().get("replayed", 0) > before:
                return output
        raise RuntimeError(f"no CUDA graph was replayed: {report.graphs()}")

    return call


def _patched_for(backend: str) -> Callable[[Any], Any]:
    return lambda model: patched(model, backend=backend)


def _variants_here() -> list[str]:
    """Names of what the GPU here can run, plainest first."""
    known = sorted({name for names in choosing.VARIANTS.values() for name in names})
    return [name for name in known if name != "sm90" or torch.cuda.get_device_capability() == (9, 0)]


@contextlib.contextmanager
def in_variant(runner: Runner) -> Iterator[None]:
    """Inside, its variant of the CUDA kernels may run. Raises BackendError where this build lacks it."""
    with contextlib.ExitStack() as stack:
        if runner.variant is not None:
            for op, known in choosing.VARIANTS.items():
                may = [name for name in known if name <= runner.variant]  # their names rise with what they need
                stack.enter_context(backends.use_cuda_variant(op, may[-1]))
        yield


def model_config(*, smoke: bool, attention: str) -> Any:
    """Of the run's model. attention: a name that transformers knows."""
    from transformers import RobertaConfig

    options = {key: value for key, value in (SMOKE_MODEL if smoke else MODEL).items() if key != "name"}
    config = RobertaConfig(
        **options, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, type_vocab_size=1, pad_token_id=1
    )
    config._attn_implementation = attention
    return config


def original(device: str, weights: torch.dtype, *, smoke: bool, attention: str) -> nn.Module:
    """The model of the run: the same whatever the arguments, its weights rounded to a dtype."""
    from transformers import RobertaModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = RobertaModel(model_config(smoke=smoke, attention=attention), add_pooling_layer=False)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms that are not 0 and 1
                parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    return model.to(device, weights).eval()


# What is called, and the model whose gradients backward takes (an engine has none).
Prepared = tuple[Callable[..., Any], nn.Module | None]


def make(runner: Runner, device: str, dtype: torch.dtype, *, smoke: bool) -> Prepared:
    """A contender, ready to be called."""
    if runner.engine:
        return runner.prepare(None), None
    model = original(device, dtype, smoke=smoke, attention=runner.attention)
    return runner.prepare(model), model


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


def _call(run: Callable[..., Any], model: nn.Module | None, inputs: Inputs, direction: str) -> Callable[[], Any]:
    parameters = [] if model is None else list(model.parameters())

    def forward() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            return run(**inputs.arguments).last_hidden_state

    def forward_backward() -> tuple[Tensor | None, ...]:
        torch.compiler.cudagraph_mark_step_begin()
        hidden = run(**inputs.arguments).last_hidden_state
        return torch.autograd.grad(hidden, parameters, inputs.grad.to(hidden.dtype), allow_unused=True)

    return forward if direction == "forward" else forward_backward


def _answers(call: Callable[[], Any], model: nn.Module | None, inputs: Inputs, direction: str) -> dict[str, Tensor]:
    """Hidden states at real positions, or the gradients of some parameters."""
    if direction == "forward":
        return {"hidden states": call()[inputs.real].clone()}
    names = [] if model is None else [name for name, _ in model.named_parameters()]
    found = dict(zip(names, call(), strict=True))
    return {name: g.clone() for name, g in found.items() if name.endswith(_PROBED) and g is not None}


def flops(batch: Batch, config: Any, direction: str) -> int:
    """Of the matrix products over real tokens; backward has twice the forward's."""
    hidden, inner = config.hidden_size, config.intermediate_size
    products = batch.tokens * (8 * hidden * hidden + 4 * hidden * inner)
    attention = 4 * hidden * sum(length * length for length in batch.lengths)
    return (3 if direction == "forward_backward" else 1) * config.num_hidden_layers * (products + attention)


def least_bytes(batch: Batch, config: Any, itemsize: float) -> float:
    """What a forward has to read and write at least: the encoder's weights once, at so many bytes each, and for each
    token a row of three tables and the hidden state, in float32.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    weights = config.num_hidden_layers * (4 * hidden * hidden + 2 * hidden * inner)
    return weights * itemsize + batch.tokens * 4 * hidden * 4


def figures(
    runner: Runner,
    samples: Samples,
    batch: Batch,
    config: Any,
    roofs: dict[str, Any] | None,
    direction: str,
    dtype: str,
) -> dict[str, Any]:
    """Of one contender in one case: times, useful work, and how near they come to the roofs."""
    seconds = statistics.median(samples.calls)
    work = flops(batch, config, direction)
    found = {
        "ours": runner.ours,
        "backend": runner.backend,
        "variant": runner.variant,
        "note": runner.note,
        "weights": runner.weights,
        "arithmetic": runner.arithmetic,
        "instead_of": runner.instead_of,
        "median_s": seconds,
        "p20_s": percentile(samples.calls, 20),
        "p80_s": percentile(samples.calls, 80),
        "turn_medians_s": samples.turn_medians,
        "calls": len(samples.calls),
        "flops": work,
        "flops_per_s": work / seconds,
        "useful_tokens": batch.tokens,
        "useful_tokens_per_s": batch.tokens / seconds,
    }
    roof = 0.0 if roofs is None else compute_roof(roofs, runner.arithmetic or dtype)
    if roof:
        found["roof_fraction"] = work / roof / seconds
    if direction == "forward":
        found["bytes"] = least_bytes(batch, config, DTYPES.get(runner.weights or dtype, torch.int8).itemsize)
        if roofs is not None:
            found["memory_fraction"] = found["bytes"] / memory_roof(roofs) / seconds
    return found


def run_models(
    batches: Iterable[Batch],
    *,
    device: str,
    roofs: dict[str, Any] | None,
    effort: Effort | None,
    deadline: float = math.inf,
    smoke: bool = False,
    known: dict[str, Runner] | None = None,
    directions: Iterable[str] = DIRECTIONS,
    dtype_name: str | None = None,
    check: bool = True,
    prepared: dict[str, Prepared] | None = None,
    done: Iterable[str] = (),
    excluded: Callable[[str, str], bool] = lambda case, name: False,
    begin: Callable[[str, str], None] = lambda case, name: None,
) -> Iterator[dict[str, Any]]:
    """Yields {"model": row}, {"failure": ...} and {"done": case}.

    effort None: only calls everything once, for what it compiles.
    known: the contenders; None: those of the GPU suite.
    check: compare answers with float64.
    prepared: models that are kept from call to call; None: they go when their direction is done.
    deadline: of time.time().

    Raises Poisoned.
    """
    torch._dynamo.config.recompile_limit = 64
    dtype_name = dtype_name or ("float32" if smoke else "bfloat16")
    dtype = DTYPES[dtype_name]
    check = check and effort is not None
    clock = Clock(device, queued=False)
    batches = list(batches)
    # Not eager attention, whose softmax is in float32 whatever comes in.
    exact_model = original(device, dtype, smoke=smoke, attention="sdpa").double() if check else None
    config = model_config(smoke=smoke, attention="sdpa")
    known = runners(device, smoke=smoke) if known is None else known
    for direction in directions:
        models = {} if prepared is None else prepared
        broken: dict[str, str] = {}
        for batch in batches:
            case = f"model-{dtype_name}-{direction}-{batch.name}"
            if case in done:
                continue
            case_row = described(case, dtype_name, direction, batch, smoke=smoke)
            inputs = make_inputs(batch, config, device, dtype)
            exact: dict[str, Tensor] = {}
            if exact_model is not None:
                exact_call = _call(exact_model, exact_model, inputs.in_float64(), direction)
                exact = _answers(exact_call, exact_model, inputs, direction)
                if device == "cuda":
                    torch.cuda.empty_cache()  # float64 took most of the card
            plain: dict[str, Tensor] | None = None
            whole = True
            calls: dict[str, Call] = {}
            checked: dict[str, dict[str, Any]] = {}
            # Hugging Face's sdpa first: the others' answers are compared with its own.
            for name in sorted(known, key=lambda name: name != "HF sdpa"):
                runner = known[name]
                failed = functools.partial(failure, case_row, name)
                if excluded(case, name) or runner.missing or (runner.engine and direction != "forward"):
                    continue
                if name in broken:
                    yield failed(broken[name])
                    continue
                if time.time() > deadline - (_COMPILE_SECONDS if runner.compiled else 0.0):
                    yield failed("no time left")
                    whole = False
                    continue
                begin(case, name)
                try:
                    if name not in models:
                        models[name] = make(runner, device, dtype, smoke=smoke)
                    run, model = models[name]
                    call = _call(run, model, inputs, direction)
                    began = time.perf_counter()
                    with in_variant(runner), Served() as served:
                        answers = _answers(call, model, inputs, direction)
                    clock.synchronize()
                    slow = time.perf_counter() - began > SLOW and not runner.compiled
                except Exception as error:
                    check_gpu(device)
                    gap = isinstance(error, (NotImplementedError, BackendError))
                    if runner.compiled or name not in models:  # it would fail again, after as long a time
                        broken[name] = first_line(error)
                    yield failed(first_line(error), gap=not runner.ours or runner.compiled or gap)
                    continue
                if effort is None:
                    continue
                if name == "HF sdpa":
                    plain = answers
                if check:
                    # What is kept with less is held to no promise, only to make sense.
                    wrong, error = _wrong(answers, None if runner.rounded else plain, exact)
                    if wrong:
                        yield failed(f"wrong answers: {wrong}", gap=not runner.ours)
                        if not error < _NONSENSE:
                            continue
                    if runner.ours and runner.weights and error < _LOSSLESS:
                        yield failed(
                            f"its answers are float32's: the weights are not kept in {runner.weights}", gap=False
                        )
                        continue
                    within = None if runner.rounded or plain is None else not wrong
                    with in_variant(runner):
                        peak = _peak(call, device)
                    checked[name] = {"error": error, "within_promise": within, "served": served.by_op, **peak}
                calls[name] = Call(call, functools.partial(_in_turn, begin, case, name, runner), slow)
            if effort is None:
                continue
            measured = {}
            for name, samples in measure(calls, clock, effort).items():
                row = {**case_row, "contender": name, **checked.get(name, {})}
                row |= figures(known[name], samples, batch, config, roofs, direction, dtype_name)
                measured[name] = row
            yield from finish(measured)
            if whole:
                yield {"done": case}
        if prepared is None:
            models.clear()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def described(case: str, dtype: str, direction: str, batch: Batch, *, smoke: bool) -> dict[str, Any]:
    """A case as the JSON names it."""
    return {
        "case": case,
        "model": (SMOKE_MODEL if smoke else MODEL)["name"],
        "dtype": dtype,
        "direction": direction,
        "batch": {"name": batch.name, "lengths": list(batch.lengths)},
    }


def finish(measured: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows of a case, by contender, with their ratios to the peers, as events."""
    for row in measured.values():
        if row["ours"]:
            row["ratios"] = {name: ratio(row, peer) for name, peer in measured.items() if not peer["ours"]}
        yield {"model": row}


@contextlib.contextmanager
def announced(begin: Callable[[str, str], None], case: str, name: str) -> Iterator[None]:
    begin(case, name)
    yield


@contextlib.contextmanager
def _in_turn(begin: Callable[[str, str], None], case: str, name: str, runner: Runner) -> Iterator[None]:
    with announced(begin, case, name), in_variant(runner):
        yield


def failure(described: dict[str, Any], name: str, reason: str, *, gap: bool = True) -> dict[str, Any]:
    """An event: a contender that has no figures, or wrong answers. gap: the fault is not ours."""
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
