"""Which backends, instruction sets, devices and dtypes the tests run on, and how one op is compared in all of them.

`served_by` is the one place that knows what there is; a test asks for its combinations with `@on_every_backend()` or,
together with a table of cases, `@cases_on_every_backend(CASES)`, and gets a `served` fixture inside which that backend
runs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from roberta_kernels import backends
from roberta_kernels.backends import choosing
from roberta_kernels.tolerance import compare

FLOAT32, BFLOAT16, FLOAT16, FLOAT64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
HAS_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if HAS_CUDA else "cpu"


@dataclass(frozen=True)
class Served:
    """One way in which an op can run."""

    backend: str
    device: str
    dtype: torch.dtype
    isa: str | None = None

    @property
    def id(self) -> str:
        return "-".join(part for part in (self.backend, self.isa, str(self.dtype).removeprefix("torch.")) if part)

    @property
    def factors(self) -> dict[str, str | torch.dtype]:
        """What tests/covering.py pairs."""
        return {"kernels": f"{self.backend}-{self.isa}", "dtype": self.dtype}

    @property
    def interpreted(self) -> bool:
        """Runs in Triton's interpreter or the CUDA emulation: a thousand times slower than anything else."""
        return self.backend in ("triton", "cuda") and self.device == "cpu"

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.isa is not None:
                stack.enter_context(backends.use_cpu_isa(self.isa))
            stack.enter_context(backends.backend(self.backend))
            yield

    def kernels(self) -> backends.Kernels:
        return backends.namespaces()[self.backend]


def served_by(dtypes: Iterable[torch.dtype] | None = None, *, every_isa: bool = True) -> list[Any]:
    """pytest parameters: every backend x instruction set x dtype of this machine.

    dtypes: only these, where the backend has them; None: float32, bfloat16 and float16 wherever the backend has them. A
    backend that is not there appears once, skipped, with what it needs. every_isa: all instruction sets, or the best.
    """
    wanted = (FLOAT32, BFLOAT16, FLOAT16) if dtypes is None else tuple(dtypes)
    combinations: list[Any] = []
    for name, status in backends.available_backends().items():
        device = "cpu" if name == "cpu" else DEVICE
        if name == "cpu":
            served = (FLOAT32, BFLOAT16)
            isas: tuple[str | None, ...] = backends.cpu_isas()[slice(None) if every_isa else slice(-1, None)]
        else:
            served = (FLOAT32, BFLOAT16, FLOAT16, FLOAT64) if name == "reference" else (FLOAT32, BFLOAT16, FLOAT16)
            isas = (None,)
        no_gpu = name == "cuda" and not HAS_CUDA and not backends.emulating()
        if not status or no_gpu:
            missing = Served(name, device, FLOAT32)
            skip = pytest.mark.skip(reason=f"backend {name!r} is not available: {status.detail}")
            combinations.append(pytest.param(missing, id=name, marks=skip))
            continue
        for isa in isas:
            for dtype in served:
                if dtype in wanted:
                    one = Served(name, device, dtype, isa)
                    marks = [pytest.mark.gpu] if device == "cuda" else []
                    if isa not in (None, backends.cpu_isas()[0], backends.cpu_isas()[-1]):
                        marks.append(pytest.mark.full)  # tests/cpu has every kernel on every instruction set
                    combinations.append(pytest.param(one, id=one.id, marks=marks))
    return combinations


def on_every_backend(dtypes: Iterable[torch.dtype] | None = None, *, every_isa: bool = True) -> pytest.MarkDecorator:
    """Runs the test once for each combination; its `served` argument says which."""
    return pytest.mark.parametrize("served", served_by(dtypes, every_isa=every_isa), indirect=True)


def cases_on_every_backend(
    cases: Iterable[Any], dtypes: Iterable[torch.dtype] | None = None, *, thin: bool = True
) -> pytest.MarkDecorator:
    """Runs the test for combinations x cases: arguments `served` and `case`.

    A case has `id`, `heavy`, and `only`: the one dtype in which it means something, or None.

    thin: each case runs in one of the dtypes of a backend or instruction set, which take turns from case to case; in
    all of them on the best instruction set and on a GPU. Interpreters leave the heavy cases out.
    """
    parameters = []
    turn: dict[tuple[str, str | None], int] = {}
    combinations = served_by(dtypes)
    dtypes_of: dict[tuple[str, str | None], list[torch.dtype]] = {}
    for combination in combinations:
        served = combination.values[0]
        dtypes_of.setdefault((served.backend, served.isa), []).append(served.dtype)
    for i, case in enumerate(cases):
        for combination in combinations:
            served = combination.values[0]
            if any(mark.name == "skip" for mark in combination.marks):
                if i == 0:
                    parameters.append(pytest.param(served, case, id=combination.id, marks=combination.marks))
                continue
            key = (served.backend, served.isa)
            if thin and served.interpreted and case.heavy:
                continue
            if case.only is not None:
                if served.dtype != case.only:
                    continue
            elif thin and served.device == "cpu":
                mine = dtypes_of[key]
                position = mine.index(served.dtype)
                if position == 0:
                    turn[key] = turn.get(key, -1) + 1
                best = served.isa is not None and served.isa == backends.cpu_isas()[-1]
                if not best and position != turn[key] % len(mine):
                    continue
            parameters.append(pytest.param(served, case, id=f"{combination.id}-{case.id}", marks=combination.marks))
    return pytest.mark.parametrize(("served", "case"), parameters, indirect=["served"])


@dataclass(frozen=True)
class Variant:
    """One of the CUDA library's implementations of an op."""

    op: str
    name: str
    backend: str = "cuda"

    @contextlib.contextmanager
    def setting(self) -> Iterator[None]:
        """Inside it may run, and so may the portable one where it does not take a call."""
        with backends.backend("cuda"), backends.use_cuda_variant(self.op, self.name):
            yield

    def why_not(self) -> str | None:
        """Why it cannot run here, or None."""
        try:
            with self.setting():
                pass
        except backends.BackendError as error:
            return str(error)
        if self.name != "sm90":
            return None
        if backends.emulating():  # tests/cuda_emulation/hopper.py emulates a Hopper GPU, and sets the variant
            return None if backends.cuda_variant(self.op) == "sm90" else "needs an emulated Hopper GPU"
        return None if HAS_CUDA and torch.cuda.get_device_capability() == (9, 0) else "needs a Hopper GPU"


def cuda_variants(op: str, *, portable: bool = True) -> list[Any]:
    """pytest parameters: an op's variants in the CUDA library, "cuda-sm90" and so on. What this build or this GPU has
    not is skipped, with the reason. portable: with the portable one.
    """
    found = []
    for name in choosing.VARIANTS[op][0 if portable else 1 :]:
        variant = Variant(op, name)
        marks = [pytest.mark.gpu] if HAS_CUDA else []
        if (reason := variant.why_not()) is not None:
            marks.append(pytest.mark.skip(reason=f"variant {name} of {op}: {reason}"))
        found.append(pytest.param(variant, id=f"cuda-{name}", marks=marks))
    return found


@contextlib.contextmanager
def calls_go_to(op: str, forward: str, backward: str) -> Iterator[None]:
    """All calls of an op inside, at least one in each direction, must have been run by these variants."""
    before = backends.cuda_served(op)
    yield
    went = {key for key, count in backends.cuda_served(op).items() if count != before[key]}
    assert went == {(forward, "forward"), (backward, "backward")}, f"{op} was run by {sorted(went)}"


# ------------------------------------------------------------------------------------------------ inputs


class Draw:
    """Random inputs of one test, from one seed."""

    def __init__(self, seed: int, device: str) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device

    def normal(self, *shape: int, dtype: torch.dtype, std: float = 1.0, mean: float = 0.0) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, dtype=FLOAT64) * std + mean
        return drawn.to(dtype).to(self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)

    def bools(self, *shape: int, p: float = 0.5) -> Tensor:
        return (torch.rand(shape, generator=self.generator) < p).to(self.device)

    def seed(self) -> Tensor:
        """A dropout seed: all 64 bits in use."""
        return torch.randint(-(2**63), 2**63 - 1, (1,), generator=self.generator).to(self.device)


def poisoned(t: Tensor, layout: str) -> Tensor:
    """t's values as a view with NaN on all sides.

    layout: "rows": every other row of a taller matrix; "columns": the middle of a wider one; "transposed": stored by
    columns; "contiguous": t.
    """
    if layout == "contiguous":
        return t
    nan = float("nan")
    if layout == "rows":
        room = t.new_full((2 * t.shape[0] + 1, *t.shape[1:]), nan)
        view = room[1::2]
    elif layout == "columns":
        room = t.new_full((t.shape[0] + 2, *t.shape[1:-1], t.shape[-1] + 13), nan)
        view = room[1:-1, ..., 5:-8]
    elif layout == "transposed":
        room = t.new_full((*t.shape[1:], t.shape[0] + 3), nan)
        view = room.movedim(-1, 0)[: t.shape[0]]
    else:
        raise ValueError(layout)
    view.copy_(t)
    assert view.shape == t.shape
    return view


@contextlib.contextmanager
def uninitialised_is_nan(*like: Tensor) -> Iterator[None]:
    """Inside, memory that torch hands out uninitialised holds NaN, and so does what the allocator had freed before.

    A kernel that reads what it has not written, or leaves a part of its output unwritten, then shows.
    """
    for t in like:
        for _ in range(3):
            garbage = torch.full((max(1, t.numel()),), float("nan"), dtype=t.dtype, device=t.device)
        del garbage
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # this is what fills uninitialised memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


# ------------------------------------------------------------------------------------------------ comparison


def leaf(t: Tensor) -> Tensor:
    """The same memory and strides as an autograd leaf."""
    return t.detach().requires_grad_(t.is_floating_point())


def output_and_gradients(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], grad_out: Tensor, *, unused_is_zero: bool = False
) -> dict[str, Tensor]:
    """{"output": ..., "gradient of x": ...} of `function(**inputs)`, one gradient for each input.

    unused_is_zero: an input that the graph does not reach has a zero gradient (else: an error).
    """
    leaves = {name: leaf(t) for name, t in inputs.items()}
    out = function(**leaves)
    gradients = torch.autograd.grad(out, list(leaves.values()), grad_out, materialize_grads=unused_is_zero)
    named = {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {"output": out.detach(), **named}


def score_floor(q: Tensor, k: Tensor, scale: float, bias: Tensor | None = None) -> float:
    """Attention's rounding floor, in ulps of the inputs' dtype: the usual two, and those of the exponent.

    An error of a score s, or of the log-sum-exp that backward starts from, is a relative error of the softmax weight.
    Rounding the latter, and scaling, is up to |s| ulps of float32. A product of d terms is rounded d times at up to
    |s|, by half an ulp and either way: sqrt(d) / 2 ulps of |s|, and forward and backward may sum in different orders.
    Eager torch takes its scores once: where one weight is nearly all of a row, the error leaves with the row's sum.
    """
    if q.numel() == 0 or k.numel() == 0:
        return 2.0
    largest = abs(scale) * float(torch.einsum("qhd,khd->hqk", q.double(), k.double()).abs().max())
    if bias is not None and bias.numel() > 0:
        largest += float(bias.double().abs().max())
    exponent = largest * (1.0 + math.sqrt(q.shape[-1]) / 2.0) + math.log(k.shape[0])
    return 2.0 + exponent * torch.finfo(FLOAT32).eps / torch.finfo(q.dtype).eps


def assert_repeats(again: Tensor, first: Tensor, backend: str) -> None:
    """The same to the bit; of plain torch, whose products may round otherwise in another thread or with operands that
    lie elsewhere in memory, within torch's own tolerance."""
    if backend == "reference":
        torch.testing.assert_close(again, first)
    else:
        assert torch.equal(again, first)


def check_three_way(
    ours: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    grad_out: Tensor,
    *,
    cancelling: dict[str, float] | None = None,
    within: dict[str, Tensor] | None = None,
    floor_ulps: float = 2.0,
) -> dict[str, Tensor]:
    """The promise for the output and for the gradient of every input; returns ours.

    A tensor that breaks it, for an original that was exact by luck (one element, one survivor of dropout), gets a floor
    that knows how much of the result cancelled (`sensitivity`), and is held to the error that the original has without
    that luck (`redrawn`).

    ours, eager: called with the inputs by name. eager runs at the inputs' dtype and in float64.
    cancelling: for a gradient that cancels to nothing in exact arithmetic (a softmax over one key), the size of what
        cancelled; where the exact gradient is all zero, ours is held to float32 roundings of that, not to zero.
    within: by name, how far a result may be off besides, element by element: what a number within that any algorithm
        rounds, and that is far larger than what is left of it, does to the result.
    """
    with uninitialised_is_nan(*inputs.values(), grad_out):
        got = output_and_gradients(ours, inputs, grad_out)
    plain = {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in inputs.items()}
    plain_grad = grad_out.clone(memory_format=torch.contiguous_format)
    double = {name: t.double() for name, t in plain.items()}
    original = output_and_gradients(eager, plain, plain_grad, unused_is_zero=True)
    exact = output_and_gradients(eager, double, plain_grad.double(), unused_is_zero=True)
    for name, ours_tensor in got.items():
        assert ours_tensor.dtype == grad_out.dtype, f"{name} is {ours_tensor.dtype}"
        size = (cancelling or {}).get(name)
        if size is not None and exact[name].numel() > 0 and float(exact[name].abs().max()) <= 1e-12 * size:
            largest = float(ours_tensor.abs().max())
            assert largest <= 32 * max(torch.finfo(FLOAT32).eps, torch.finfo(ours_tensor.dtype).eps) * size, (
                f"{name}: {largest:.3e}, and should cancel to nothing"
            )
            continue
        comparison = compare(ours_tensor, original[name], exact[name], name=name, floor_ulps=floor_ulps)
        if within is not None:
            comparison = replace(
                comparison,
                max_allowed=comparison.max_allowed + float(within[name].max()),
                rms_allowed=comparison.rms_allowed + float(within[name].square().mean().sqrt()),
            )
        if not comparison.holds:
            floor = sensitivity(eager, plain, plain_grad, exact)[name]
            again = redrawn(eager, plain, plain_grad)[name]
            largest = comparison.max_allowed + floor[0] + 2.0 * max(0.0, again[0] - comparison.max_error_original)
            rms = comparison.rms_allowed + floor[1] + 2.0 * max(0.0, again[1] - comparison.rms_error_original)
            more = f"{comparison}; floor {floor}, the original's error redrawn {again}"
            assert comparison.max_error <= largest, more
            assert comparison.rms_error <= rms, more
    return got


def sensitivity(
    eager: Callable[..., Tensor], inputs: dict[str, Tensor], grad_out: Tensor, exact: dict[str, Tensor]
) -> dict[str, tuple[float, float]]:
    """Twice what one rounding of every input does to each exact result: (the largest change, its root mean square).

    No algorithm in that dtype can be expected to do better, and where terms cancel it is much more than an ulp of the
    result. Of eight random roundings it takes the largest, since one may cancel too.
    """
    generator = torch.Generator().manual_seed(0)

    def rounded(t: Tensor) -> Tensor:
        noise = torch.rand(t.shape, generator=generator, dtype=FLOAT64).to(t.device) - 0.5
        return t.double() * (1.0 + torch.finfo(t.dtype).eps * noise)

    largest = dict.fromkeys(exact, (0.0, 0.0))
    for _ in range(8):
        moved = output_and_gradients(
            eager, {name: rounded(t) for name, t in inputs.items()}, rounded(grad_out), unused_is_zero=True
        )
        for name, t in moved.items():
            change = (t - exact[name]).nan_to_num(0.0, 0.0, 0.0)
            largest[name] = (
                max(largest[name][0], 2.0 * float(change.abs().max())),
                max(largest[name][1], 2.0 * float(change.square().mean().sqrt())),
            )
    return largest


def redrawn(
    eager: Callable[..., Tensor], inputs: dict[str, Tensor], grad_out: Tensor
) -> dict[str, tuple[float, float]]:
    """The original's error in each result, (largest, root mean square): the most in 32 more draws of its roundings.

    A result of one number has one draw of the rounding error, and that of the original may happen to be nothing. With
    its inputs moved to their neighbours in that dtype, or left, it draws again.
    """
    generator = torch.Generator().manual_seed(1)

    def moved(t: Tensor) -> Tensor:
        noise = 2.0 * torch.rand(t.shape, generator=generator, dtype=FLOAT64).to(t.device) - 1.0
        return (t.double() * (1.0 + torch.finfo(t.dtype).eps * noise)).to(t.dtype)

    most: dict[str, tuple[float, float]] = {}
    for _ in range(32):
        near, near_grad = {name: moved(t) for name, t in inputs.items()}, moved(grad_out)
        original = output_and_gradients(eager, near, near_grad, unused_is_zero=True)
        exact = output_and_gradients(
            eager, {name: t.double() for name, t in near.items()}, near_grad.double(), unused_is_zero=True
        )
        for name, t in original.items():
            error = (t.double() - exact[name]).nan_to_num(0.0, 0.0, 0.0)
            before = most.get(name, (0.0, 0.0))
            drawn = float(error.abs().max()), float(error.square().mean().sqrt())
            most[name] = max(before[0], drawn[0]), max(before[1], drawn[1])
    return most


def cumulative(lengths: list[int], device: str) -> Tensor:
    """cu_seqlens of sequences of these lengths."""
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return torch.tensor(ends, dtype=torch.int32, device=device)
