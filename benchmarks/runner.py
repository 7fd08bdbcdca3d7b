"""One case from data to figures: builds the contenders, checks their answers, times them, relates them to the roof."""

from __future__ import annotations

import contextlib
import gc
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops import OPS
from benchmarks.problem import Contender, Entry
from benchmarks.roofs import roof_seconds
from benchmarks.served import Served
from benchmarks.timing import Call, Clock, Effort, Samples, measure
from benchmarks.workloads import Case
from roberta_kernels import tolerance
from roberta_kernels.backends import BackendError

# Answers are compared with float64 where that is cheap; the other cases run the same code on more rows.
_CHECKED_FLOPS, _CHECKED_BYTES = 4e9, 1e8
_CHECKED_BATCHES = ("1x16",)


@dataclass(frozen=True)
class Result:
    """What became of one contender: its samples and figures, or why it has none.

    broken: the fault is ours (a backend under test raised, or its answers are wrong), and not a gap or a peer's fault.
    """

    samples: Samples | None
    figures: dict[str, Any]
    reason: str = ""
    broken: bool = False


def checked(case: Case) -> bool:
    cost = OPS[case.op].cost(case)
    return case.batch.name in _CHECKED_BATCHES or (cost.flops < _CHECKED_FLOPS and cost.bytes < _CHECKED_BYTES)


@contextlib.contextmanager
def _turn(contender: Contender, case: Case) -> Iterator[None]:
    with contender.active(), contextlib.nullcontext() if case.backward else torch.no_grad():
        yield


class Poisoned(RuntimeError):
    """The GPU refuses every further call of this process."""


def check_gpu(device: str) -> None:
    """Raises Poisoned where a kernel has failed in a way that ends the process's use of the GPU."""
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise Poisoned(first_line(error)) from error


def run_case(
    case: Case,
    entries: dict[str, Entry],
    roofs: dict[str, Any],
    clock: Clock,
    effort: Effort,
    *,
    rotate: bool = True,
    check_all: bool = False,
    begin: Callable[[str], None] = lambda name: None,
) -> dict[str, Result]:
    """Times all contenders of one case together.

    rotate: on a GPU, each contender goes through sets of inputs that its L2 cache does not hold. check_all: answers are
    compared with float64 in every case, however large. begin: called with the contender that runs next.

    Raises Poisoned, which names the error; begin knows the contender.
    """
    problem = OPS[case.op].problem(case)
    exact = eager_answers = None
    if check_all or checked(case):
        exact = OPS[case.op].eager(problem.in_float64()).answers(case.backward)
        eager_answers = OPS[case.op].eager(problem).answers(case.backward)
    results: dict[str, Result] = {}
    contenders: dict[str, Contender] = {}
    errors: dict[str, float] = {}
    variants: dict[str, list[str]] = {}
    for name, entry in entries.items():
        begin(name)
        try:
            contender = entry.build(problem)
            with _turn(contender, case), Served() as served:
                answers = contender.answers(case.backward)
                clock.synchronize()
        except Exception as error:
            check_gpu(clock.device)
            # A peer that cannot be had (no compiler, no kernel for this dtype) is a row that says so.
            gap = isinstance(error, (NotImplementedError, BackendError))
            results[name] = Result(None, {}, first_line(error), broken=entry.ours and not gap)
            continue
        if exact is not None and eager_answers is not None and entry.same_work:
            errors[name] = max(relative_error(a, e) for a, e in zip(answers, exact, strict=True))
            wrong = _broken_promise(answers, eager_answers, exact) if entry.ours else _nonsense(errors[name])
            if wrong:
                # A speed of wrong answers is no speed.
                results[name] = Result(None, {}, f"wrong answers: {wrong}", broken=entry.ours)
                continue
        contenders[name] = contender
        variants[name] = served.by_op.get(case.op, [])
        del answers
    del exact, eager_answers
    calls = {}
    for name, contender in contenders.items():
        sets = input_sets(contender.bytes(case.backward)) if rotate and clock.device == "cuda" else 1
        calls[name] = Call(contender.in_turn(case.backward, sets), _active(contender, case, name, begin))
    for name, samples in measure(calls, clock, effort).items():
        figures = _figures(case, samples, roofs, contenders[name], entries[name], errors.get(name))
        figures["served"] = variants[name]
        results[name] = Result(samples, figures)
    contenders.clear()
    calls.clear()
    gc.collect()
    return {name: results[name] for name in entries}


def input_sets(size: int) -> int:
    """How many sets of `size` bytes it takes until the L2 cache has lost the first one."""
    return min(256, 2 + 2 * torch.cuda.get_device_properties(0).L2_cache_size // max(1, size))


def call_once(case: Case, entry: Entry) -> None:
    """Runs a contender without timing it (pytest --benchmark-disable)."""
    contender = entry.build(OPS[case.op].problem(case))
    with _turn(contender, case):
        contender.call(case.backward)()


def _active(
    contender: Contender, case: Case, name: str, begin: Callable[[str], None]
) -> Callable[[], contextlib.AbstractContextManager[None]]:
    def active() -> contextlib.AbstractContextManager[None]:
        begin(name)
        return _turn(contender, case)

    return active


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]


def relative_error(answer: Tensor, exact: Tensor) -> float:
    """The largest absolute error over the largest absolute value."""
    scale = float(exact.abs().max()) if exact.numel() else 0.0
    return float((answer.double() - exact).abs().max()) / scale if scale > 0 else 0.0


def _nonsense(error: float) -> str:
    """Of a peer, whose precision is its own affair."""
    return "" if error < 0.1 else f"relative error {error:.1e}"


def _broken_promise(answers: list[Tensor], eager: list[Tensor], exact: list[Tensor]) -> str:
    for index, tensors in enumerate(zip(answers, eager, exact, strict=True)):
        comparison = tolerance.compare(*tensors, name="output" if len(answers) == 1 else f"gradient {index}")
        if not comparison.holds:
            return str(comparison)
    return ""


def percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def _figures(
    case: Case, samples: Samples, roofs: dict[str, Any], contender: Contender, entry: Entry, error: float | None
) -> dict[str, Any]:
    cost = OPS[case.op].cost(case)
    seconds = statistics.median(samples.calls)
    floor, bound = roof_seconds(roofs, cost, case.dtype_name)
    return {
        "ours": entry.ours,
        "backend": entry.backend,
        "variant": entry.variant,
        "same_work": entry.same_work,
        "note": entry.note,
        "median_s": seconds,
        "p20_s": percentile(samples.calls, 20),
        "p80_s": percentile(samples.calls, 80),
        "turn_medians_s": samples.turn_medians,
        "calls": len(samples.calls),
        "flops": cost.flops,
        "bytes": cost.bytes,
        "useful_tokens": case.batch.tokens,
        "computed_tokens": contender.tokens,
        "flops_per_s": cost.flops / seconds,
        "bytes_per_s": cost.bytes / seconds,
        "useful_tokens_per_s": case.batch.tokens / seconds,
        "bound": bound,
        "roof_s": floor,
        "roof_fraction": floor / seconds,
        "error": error,
    }


def ratio(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, float]:
    """How many times as long the peer took, turn by turn: contenders of one turn met the same machine."""
    turns = [p / o for o, p in zip(ours["turn_medians_s"], peer["turn_medians_s"], strict=True)]
    return {"median": statistics.median(turns), "p20": percentile(turns, 20), "p80": percentile(turns, 80)}
