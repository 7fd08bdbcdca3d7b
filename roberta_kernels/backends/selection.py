"""Dispatch: which backend runs a call.

Where one was asked for (override.py), that one or none. Else, on a GPU, the choosing table (choosing.py) decides
between the CUDA C++ and the Triton kernels where they were measured; elsewhere Triton runs, and the compiled kernels
where Triton is missing: neither was timed there, and of the two Triton's code is made for the card at hand by a
compiler that checks it. Where neither can run (an older GPU, a library that was not built for it: gpus.py) the
reference runs. On a CPU the compiled kernels run, and the reference where they cannot.

All answers are laid out ahead of the calls, for every backend that can be asked for, so that a call looks one up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from roberta_kernels import triton
from roberta_kernels.backends import choosing, gpus, op_namespaces, override
from roberta_kernels.backends.choosing import OPS
from roberta_kernels.backends.op_namespaces import BackendError, Kernels, available_backends, emulating, namespaces
from roberta_kernels.backends.override import current_backend

# What runs where nothing was measured, first choice first, per device type. A device type that is not here runs
# the reference.
_PREFERENCE = {"cuda": ("triton", "cuda", "reference"), "cpu": ("cpu", "reference")}
_DTYPES = {
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16),
    "reference": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
}


# Attention with a bias on its scores, which not every backend has: to selection an op of its own, in the place of
# "attention". Nothing was measured of it, so the choosing table does not speak of it.
BIASED_ATTENTION = "attention with a bias"
_SELECTED = (*OPS, BIASED_ATTENTION)


@dataclass
class _Answers:
    """Which backend runs while one is asked for, or "auto".

    chosen: an op on a device type in a dtype, whatever the size. by_size: where that depends on the size, or on which
    GPU: (first size that this no longer holds for, kernels), rising. What is in neither is refused, or is a device type
    that has no kernels but the reference's.
    """

    chosen: dict[tuple[str, str, torch.dtype], Kernels] = field(default_factory=dict)
    by_size: dict[tuple[str, torch.device, torch.dtype], tuple[tuple[float, Kernels], ...]] = field(
        default_factory=dict
    )


_table: tuple[choosing.Entry, ...] = choosing.load()
_answers: dict[str, _Answers] = {}  # by what is asked for
_gpus: dict[int, int] = {}  # device index -> compute capability (9.0 as 90); empty until CUDA is initialised
# By compute capability, which with the driver decides it: what cannot run there, and why; and of which GPUs nothing is
# known but the number, as nothing has run on one yet.
_broken: dict[int, dict[str, str]] = {}
_unprobed: set[int] = set()


def _serves(name: str, op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """None when the backend supports such tensors, else why not."""
    status = op_namespaces.status_of(name)
    assert status is not None
    if not status:
        return status.detail
    if dtype not in _DTYPES[name]:
        return f"it has no {dtype} kernels"
    if name == "triton" and device_type == "cpu" and not triton.interpreting():
        return "Triton runs on GPUs (on CPU tensors only under TRITON_INTERPRET=1)"
    needed = "cpu" if name == "cuda" and emulating() else name
    if name in ("cpu", "cuda") and needed != device_type:
        return f"it runs on {needed} tensors, got {device_type}"
    return f"it has no {op}" if name == "cuda" and (op == BIASED_ATTENTION or op in choosing.NOT_IN_CUDA) else None


def _choose(asked: str, op: str, device_type: str, dtype: torch.dtype) -> Kernels:
    """What runs unmeasured, or because it was asked for."""
    if asked == override.FROM_ENVIRONMENT:
        override.check_environment()
    names = _PREFERENCE.get(device_type, ("reference",)) if asked == "auto" else (asked,)
    for name in names:
        reason = _serves(name, op, device_type, dtype)
        if reason is None:
            if name == "cpu" and (wrong := op_namespaces.wrong_isa()) is not None:
                raise BackendError(wrong)
            return namespaces()[name]
    if asked == "auto":
        raise BackendError(f"no backend supports {dtype} on {device_type}")
    raise BackendError(f"backend {asked!r} does not support {dtype} on {device_type}: {reason}")


def select(tensor: Tensor, op: str, size: int) -> Kernels:
    """The kernels that run `op` on tensors of this one's device and dtype.

    size: of the call, as choosing.py means it. It is looked at only where the choosing table tells sizes apart, so that
    a traced graph is tied to it nowhere else.

    Raises BackendError when the backend that was asked for cannot, or when none can.
    """
    if _unprobed and tensor.is_cuda:
        _probe(tensor.device)
    asked = current_backend()
    # tensor.device.type makes a string anew, which takes longer than all the rest.
    device_type = "cuda" if tensor.is_cuda else "cpu" if tensor.is_cpu else tensor.device.type
    kernels = _answers[asked].chosen.get((op, device_type, tensor.dtype))
    return _select_by_size(asked, tensor, op, size) if kernels is None else kernels


def _select_by_size(asked: str, tensor: Tensor, op: str, size: int) -> Kernels:
    for end, kernels in _answers[asked].by_size.get((op, tensor.device, tensor.dtype), ()):
        if size < end:
            return kernels
    if (why := _broken_on(tensor.device).get(asked)) is not None:
        raise BackendError(f"backend {asked!r} does not run on {tensor.device}: {why}")
    return _choose(asked, op, tensor.device.type, tensor.dtype)


def serves_alone(tensor: Tensor, ops: Iterable[str]) -> str | None:
    """The name of the backend that runs all of these ops on such tensors, whatever the size, or None."""
    _probe(tensor.device)
    chosen, device_type, dtype = _answers[current_backend()].chosen, tensor.device.type, tensor.dtype
    found = {chosen.get((op, device_type, dtype)) for op in ops}
    kernels = found.pop() if len(found) == 1 else None
    return None if kernels is None else kernels.name


def check_environment() -> None:
    """Raises BackendError, in one line, where an environment variable asks for what is not there; every call that it
    concerns would.
    """
    override.check_environment()
    wrong = op_namespaces.wrong_isa()
    if wrong is not None:
        raise BackendError(wrong)


@dataclass(frozen=True)
class Serving:
    """Which backends run on some tensors: str() is for a reader, "triton", or "attention: cuda; others: triton".

    broken: those that cannot run on the tensors' GPU, and why.
    """

    by_op: dict[str, tuple[str, ...]]
    broken: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        told = {
            op: names[0] if len(names) == 1 else f"{' or '.join(names)} by size" for op, names in self.by_op.items()
        }
        usual = max(told.values(), key=list(told.values()).count)
        exceptions = [f"{op}: {names}" for op, names in told.items() if names != usual]
        return "; ".join([*exceptions, f"others: {usual}"]) if exceptions else usual

    @property
    def detail(self) -> str:
        """What available_backends says of them."""
        names = dict.fromkeys(name for names in self.by_op.values() for name in names)
        told = [available_backends()[name].detail for name in names]
        return "; ".join([*told, *(f"{name} cannot run on this GPU: {why}" for name, why in self.broken.items())])


def serving(tensor: Tensor) -> Serving:
    """Which backends run on tensors like this one. Raises BackendError when none can."""
    _probe(tensor.device)
    answers = _answers[current_backend()]
    by_op = {}
    for op in OPS:
        if current_backend() == "cuda" and op in choosing.NOT_IN_CUDA:
            continue
        found = None
        if (op, tensor.device.type, tensor.dtype) not in answers.chosen:
            found = answers.by_size.get((op, tensor.device, tensor.dtype))
        kernels = [select(tensor, op, 0)] if found is None else [one for _, one in found]
        by_op[op] = tuple(dict.fromkeys(one.name for one in kernels))
    return Serving(by_op, _broken_on(tensor.device))


def _arch(device: torch.device) -> int:
    """Of a GPU here, else 0."""
    return _gpus.get(device.index if device.type == "cuda" else -1, 0)


def _broken_on(device: torch.device) -> dict[str, str]:
    return _broken.get(_arch(device), {})


def unserved(device: torch.device) -> str | None:
    """Why no kernels but the reference's can run on this GPU, or None. Only where no backend was asked for: who asks
    for the reference gets it.
    """
    _probe(device)
    if not _broken or current_backend() != "auto":
        return None
    broken = _broken_on(device)
    if not broken or any(name not in broken and op_namespaces.status_of(name) for name in ("cuda", "triton")):
        return None
    return next(iter(broken.values()))


def _probe(device: torch.device) -> None:
    """Runs each kind of kernel once on GPUs of this one's compute capability, before the first call on one."""
    if not _unprobed or (arch := _arch(device)) not in _unprobed or not gpus.can_probe():
        return
    _unprobed.discard(arch)
    there = [name for name in ("cuda", "triton") if _serves(name, "attention", "cuda", torch.float32) is None]
    found = gpus.probe([namespaces()[name] for name in there], device)
    if found:
        _broken[arch] = found
        _lay_out()


def _lay_out() -> None:
    """Not as calls come in: torch.compile would guard on the answers as the first call found them."""
    global _answers
    # The environment variable may hold what is no backend's name: a call that it concerns finds nothing, and is
    # refused.
    _answers = {asked: _answers_to(asked) for asked in ("auto", *available_backends(), override.FROM_ENVIRONMENT)}


def _answers_to(asked: str) -> _Answers:
    answers = _Answers()
    for device_type in _PREFERENCE:
        for dtype in _DTYPES["reference"]:
            for op in _SELECTED:
                with contextlib.suppress(BackendError):
                    answers.chosen[op, device_type, dtype] = _choose(asked, op, device_type, dtype)
    if asked == "auto" or any(asked in broken for broken in _broken.values()):
        for op in _SELECTED:
            for dtype in _DTYPES["cuda"]:
                _follow_gpus_here(answers, asked, op, dtype)
    return answers


def _follow_gpus_here(answers: _Answers, asked: str, op: str, dtype: torch.dtype) -> None:
    """Enters what the choosing table says of the GPUs here, and what cannot run on them, in place of what runs
    unmeasured. Of a backend that was asked for and cannot run on a GPU, there is no answer there.
    """

    def kernels(name: str | None, arch: int) -> Kernels | None:
        for one in (name, *_PREFERENCE["cuda"]) if asked == "auto" else (asked,):
            if one is not None and _serves(one, op, "cuda", dtype) is None and one not in _broken.get(arch, {}):
                return namespaces()[one]
        return None

    found: dict[int, list[tuple[float, Kernels | None]]] = {}
    for index, arch in _gpus.items():
        found[index] = []
        ranges = choosing.ranges(_table, op, str(dtype).removeprefix("torch."), arch) if asked == "auto" else ()
        for end, name in ranges or ((None, None),):
            if found[index] and found[index][-1][1] is kernels(name, arch):
                found[index].pop()
            found[index].append((float("inf") if end is None else end, kernels(name, arch)))
    everywhere = {one.name if one else None: one for steps in found.values() for _, one in steps}
    if len(everywhere) == 1 and (one := next(iter(everywhere.values()))) is not None:
        answers.chosen[op, "cuda", dtype] = one
    elif everywhere:
        answers.chosen.pop((op, "cuda", dtype), None)
        for index, steps in found.items():
            known = tuple((end, one) for end, one in steps if one is not None)
            if known:
                answers.by_size[op, torch.device("cuda", index), dtype] = known


def _on_cuda() -> None:
    """Runs once, when CUDA is initialised: before any tensor can be on a GPU, and not earlier, as asking a GPU what it
    is would initialise it.
    """
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        arch = _gpus[index] = 10 * major + minor
        if broken := gpus.too_old(arch):
            _broken[arch] = broken
        else:
            _unprobed.add(arch)
    _follow_gpus()


def _follow_gpus() -> None:
    """What the table says of the GPUs here: the backends, and the variants. The library starts with portable ones."""
    _lay_out()
    for op in choosing.VARIANTS:
        named = {choosing.variant(_table, op, arch) for arch in _gpus.values()}
        # One setting is for the whole process: GPUs of which the table says different things get the portable kernels.
        if len(named) == 1 and (variant := named.pop()) is not None and op_namespaces.cuda_variant(op) is not None:
            with contextlib.suppress(ValueError, RuntimeError):  # a build without this variant
                torch.ops.roberta_kernels_cuda.set_variant(op, variant)


def choices() -> list[dict[str, Any]]:
    """The choosing table for a reader, with where each entry comes from (choosing.rows)."""
    return choosing.rows(_table, next(iter(_gpus.values()), None))


_lay_out()
torch.cuda._lazy_call(_on_cuda)
