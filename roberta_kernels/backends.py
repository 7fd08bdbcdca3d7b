"""Which kernel serves which op, device, dtype and size.

A backend is an op namespace (`roberta_kernels_cpu`, ...) that holds every op of schemas.def. `select` names the one
that serves a call; `backend` and `set_backend` override it; `available_backends` says what is there, and why not.

On a GPU the choosing table (choosing.py) decides between the CUDA C++ and the Triton kernels where they were measured.
Elsewhere Triton serves, and the compiled kernels where Triton is missing: neither was timed there, and of the two
Triton's code is made for the card at hand by a compiler that checks it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roberta_kernels import choosing, reference, triton

_HERE = Path(__file__).parent
CPU_ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
ENVIRONMENT_VARIABLE = "ROBERTA_KERNELS_BACKEND"
# A library of the CUDA kernels compiled for the CPU (tests/cuda_emulation): the cuda backend then serves CPU tensors,
# as Triton does under TRITON_INTERPRET=1. It finds mistakes in kernels, some ten thousand times slower than a GPU.
EMULATION_VARIABLE = "ROBERTA_KERNELS_CUDA_EMULATION"

# What serves where nothing was measured, first choice first, per device type. A device type that is not here is served
# by the reference.
_PREFERENCE = {"cuda": ("triton", "cuda", "reference"), "cpu": ("cpu", "reference")}
_DTYPES = {
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16),
    "reference": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
}


class BackendError(RuntimeError):
    """A backend was asked for that does not exist, is not available, or cannot serve these tensors."""


@dataclass(frozen=True)
class BackendStatus:
    """available: it can serve; detail: what serves, or why it cannot."""

    available: bool
    detail: str

    def __bool__(self) -> bool:
        return self.available


class Kernels:
    """The ops of one namespace as attributes, e.g. `kernels.attention_forward`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.namespace = f"roberta_kernels_{name}"
        for op in schemas():
            setattr(self, op, getattr(getattr(torch.ops, self.namespace), op).default)

    def __getattr__(self, op: str) -> Callable[..., Any]:
        raise AttributeError(f"backend {self.name!r} has no op {op!r}")

    def __repr__(self) -> str:
        return f"Kernels({self.name!r})"


@functools.cache
def schemas() -> dict[str, str]:
    """Op name -> schema, from schemas.def."""
    text = (_HERE / "schemas.def").read_text()
    found = re.findall(r'^RK_SCHEMA\("((\w+)\(.*)"\)$', text, re.MULTILINE)
    return {name: schema for schema, name in found}


def build_report() -> dict[str, Any]:
    """What the build compiled and what it left out (written by setup.py); empty when the package was never built."""
    path = _HERE / "build_report.json"
    return json.loads(path.read_text()) if path.is_file() else {}


_libraries: list[torch.library.Library] = []  # a Library that is collected takes its ops with it
_kernels: dict[str, Kernels] = {}
_status: dict[str, BackendStatus] = {}


def _define(name: str, dispatch_keys: tuple[str, ...], kernel: Callable[[str], Callable[..., Any]]) -> None:
    """Defines a namespace whose kernels are Python functions: kernel(op) gives the one for an op."""
    library = torch.library.Library(f"roberta_kernels_{name}", "DEF")
    for op, schema in schemas().items():
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in dispatch_keys:
            library.impl(op, kernel(op), key)
    _libraries.append(library)
    _kernels[name] = Kernels(name)


def emulating() -> bool:
    """Whether the cuda backend is the emulated library."""
    return bool(os.environ.get(EMULATION_VARIABLE))


def _load_compiled(name: str) -> BackendStatus:
    path = _HERE / f"_{name}.so"
    report = build_report()
    if name == "cuda" and emulating():
        torch.ops.load_library(os.environ[EMULATION_VARIABLE])
        _kernels[name] = Kernels(name)
        return BackendStatus(True, f"emulated on the CPU ({EMULATION_VARIABLE})")
    if not path.is_file():
        return BackendStatus(False, report.get(name) or "not compiled (pip install --no-build-isolation . compiles it)")
    if name == "cuda" and torch.version.cuda is None:
        return BackendStatus(False, f"torch {torch.__version__} is a CPU build")
    try:
        torch.ops.load_library(str(path))
        _kernels[name] = Kernels(name)
    except (OSError, RuntimeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        built = report.get("torch", "unknown")
        return BackendStatus(
            False,
            f"{path.name}, built with torch {built}, does not load into torch {torch.__version__}: {reason} "
            "(pip install --no-build-isolation . builds it for this torch)",
        )
    return BackendStatus(True, "compiled")


def _triton_kernel(op: str) -> Callable[..., Any]:
    # Triton is imported, and the kernels with it, when the first of them is called.
    return lambda *args: triton.KERNELS[op](*args)


def _load() -> None:
    _define("reference", ("CompositeExplicitAutograd",), reference.KERNELS.__getitem__)
    _status["reference"] = BackendStatus(*reference.available())
    for name in ("cpu", "cuda"):
        _status[name] = _load_compiled(name)
    if _status["cpu"]:
        wish = os.environ.get("ROBERTA_KERNELS_CPU_ISA")
        if wish is not None and wish not in cpu_isas():
            raise BackendError(
                f"ROBERTA_KERNELS_CPU_ISA={wish!r}: this processor and build have {', '.join(cpu_isas())}"
            )
    _status["triton"] = BackendStatus(*triton.available())
    if triton.installed():
        # The namespace exists wherever triton does, so that traced graphs load; whether it can serve is another
        # question.
        _define("triton", ("CUDA", "CPU"), _triton_kernel)


def available_backends() -> dict[str, BackendStatus]:
    """Every backend, with whether it is available and what serves or why not; compiled ones first."""
    status = {name: _status[name] for name in ("cuda", "triton", "cpu", "reference")}
    if status["cpu"]:
        status["cpu"] = BackendStatus(True, f"compiled; instruction set {cpu_isa()} of {', '.join(cpu_isas())}")
    if status["cuda"] and not emulating():
        # Like Triton it can also serve where no GPU is: fake tensors, when a graph is traced for another machine.
        built = ", ".join(build_report().get("cuda_architectures", ["unknown architectures"]))
        here = "" if torch.cuda.device_count() else "; no GPU here"
        status["cuda"] = BackendStatus(True, f"compiled for {built}{here}")
    return status


def namespaces() -> dict[str, Kernels]:
    """The namespaces that exist in this process, by backend name."""
    return dict(_kernels)


def cpu_isas() -> tuple[str, ...]:
    """Instruction sets that both the build and this processor have, plainest first; empty without compiled kernels."""
    if not _status["cpu"]:
        return ()
    built = build_report().get("isas", CPU_ISAS)
    isa_available = torch.ops.roberta_kernels_cpu.isa_available
    return tuple(isa for i, isa in enumerate(CPU_ISAS) if isa in built and isa_available(i))


def cpu_isa() -> str:
    """The instruction set that serves."""
    return CPU_ISAS[torch.ops.roberta_kernels_cpu.get_isa()]


@contextlib.contextmanager
def use_cpu_isa(isa: str) -> Iterator[None]:
    """Serves with another instruction set inside the block (for tests and benchmarks; process-wide)."""
    if isa not in cpu_isas():
        raise BackendError(
            f"instruction set {isa!r} is not available: {', '.join(cpu_isas()) or 'no compiled kernels'}"
        )
    before = torch.ops.roberta_kernels_cpu.set_isa(CPU_ISAS.index(isa))
    try:
        yield
    finally:
        torch.ops.roberta_kernels_cpu.set_isa(before)


@contextlib.contextmanager
def use_cuda_variant(op: str, variant: str) -> Iterator[None]:
    """Serves an op of the "cuda" backend with another of its variants inside the block (for tests and benchmarks;
    process-wide). choosing.VARIANTS names them; a build may have fewer.
    """
    before = cuda_variant(op)
    if before is None:
        reason = f"{op!r} has no variants" if _status["cuda"] else _status["cuda"].detail
        raise BackendError(f"variant {variant!r} of {op} is not available: {reason}")
    library = torch.ops.roberta_kernels_cuda
    try:
        library.set_variant(op, variant)
    except (ValueError, RuntimeError) as error:
        raise BackendError(str(error).splitlines()[0]) from None
    try:
        yield
    finally:
        library.set_variant(op, before)


def cuda_variant(op: str) -> str | None:
    """The variant that the "cuda" backend serves an op with; None where the op has but one, or no library is there."""
    if op not in choosing.VARIANTS or not _status["cuda"] or not hasattr(torch.ops.roberta_kernels_cuda, "get_variant"):
        return None
    return torch.ops.roberta_kernels_cuda.get_variant(op)


_override: str = "auto"
_table: tuple[choosing.Entry, ...] = choosing.load()
# What serves an op on a device type in a dtype, whatever the size. Complete before the first call (_fill_chosen).
_chosen: dict[tuple[str, str, torch.dtype], Kernels] = {}
# Where that depends on the size, or on which GPU: (first size that this no longer holds for, kernels), rising.
_by_size: dict[tuple[str, torch.device, torch.dtype], tuple[tuple[float, Kernels], ...]] = {}


def _serves(name: str, device_type: str, dtype: torch.dtype) -> str | None:
    """None when the backend serves such tensors, else why not."""
    status = _status[name]
    if not status:
        return status.detail
    if dtype not in _DTYPES[name]:
        return f"it has no {dtype} kernels"
    if name == "triton" and device_type == "cpu" and not triton.interpreting():
        return "Triton runs on GPUs (on CPU tensors only under TRITON_INTERPRET=1)"
    serves = "cpu" if name == "cuda" and emulating() else name
    if name in ("cpu", "cuda") and serves != device_type:
        return f"it serves {serves} tensors, and these are on {device_type}"
    return None


def _choose(device_type: str, dtype: torch.dtype) -> Kernels:
    """What serves unmeasured, or by override."""
    if _override != "auto":
        reason = _serves(_override, device_type, dtype)
        if reason is not None:
            raise BackendError(f"backend {_override!r} cannot serve {dtype} on {device_type}: {reason}")
        return _kernels[_override]
    for name in _PREFERENCE.get(device_type, ("reference",)):
        if _serves(name, device_type, dtype) is None:
            return _kernels[name]
    raise BackendError(f"no backend serves {dtype} on {device_type}")


def select(tensor: Tensor, op: str, size: int) -> Kernels:
    """The kernels that serve `op` on tensors of this one's device and dtype.

    size: of the call, as choosing.py means it. It is looked at only where the choosing table tells sizes apart, so that
    a traced graph is tied to it nowhere else.

    Raises BackendError when the backend that was asked for cannot, or when none can.
    """
    kernels = _chosen.get((op, tensor.device.type, tensor.dtype))
    return _select_by_size(tensor, op, size) if kernels is None else kernels


def _select_by_size(tensor: Tensor, op: str, size: int) -> Kernels:
    for end, kernels in _by_size.get((op, tensor.device, tensor.dtype), ()):
        if size < end:
            return kernels
    return _choose(tensor.device.type, tensor.dtype)


def cpu_serves(tensor: Tensor) -> bool:
    """Whether the compiled CPU kernels serve every op on such tensors."""
    return all(select(tensor, op, 0).name == "cpu" for op in choosing.OPS)


@dataclass(frozen=True)
class Serving:
    """Which backends serve some tensors: str() is for a reader, "triton", or "attention: cuda; others: triton"."""

    by_op: dict[str, tuple[str, ...]]

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
        return "; ".join(available_backends()[name].detail for name in names)


def serving(tensor: Tensor) -> Serving:
    """Which backends serve tensors like this one. Raises BackendError when none can."""
    by_op = {}
    for op in choosing.OPS:
        found = None
        if (op, tensor.device.type, tensor.dtype) not in _chosen:
            found = _by_size.get((op, tensor.device, tensor.dtype))
        kernels = [select(tensor, op, 0)] if found is None else [one for _, one in found]
        by_op[op] = tuple(dict.fromkeys(one.name for one in kernels))
    return Serving(by_op)


_tables: dict[str, tuple[dict[Any, Any], dict[Any, Any]]] = {}  # override -> _chosen and _by_size under it


def _fill_chosen() -> None:
    """Not as calls come in: torch.compile would guard on the table as the first call found it, and compile twice."""
    _chosen.clear()
    _by_size.clear()
    if _override in _tables:  # a patched model with a backend of its own sets it in every call
        _chosen.update(_tables[_override][0])
        _by_size.update(_tables[_override][1])
        return
    for device_type in _PREFERENCE:
        for dtype in _DTYPES["reference"]:
            with contextlib.suppress(BackendError):
                serves = _choose(device_type, dtype)
                for op in choosing.OPS:
                    _chosen[op, device_type, dtype] = serves
    if _override == "auto":
        for op in choosing.OPS:
            for dtype in _DTYPES["cuda"]:
                _follow_table(op, dtype)
    _tables[_override] = dict(_chosen), dict(_by_size)


def _follow_table(op: str, dtype: torch.dtype) -> None:
    """Enters what the choosing table says of the GPUs here in place of what serves unmeasured."""
    unmeasured = _choose("cuda", dtype)

    def kernels(name: str | None) -> Kernels:
        return unmeasured if name is None or _serves(name, "cuda", dtype) is not None else _kernels[name]

    found: dict[int, list[tuple[float, Kernels]]] = {}
    for index, arch in _gpus.items():
        found[index] = []
        for end, name in choosing.ranges(_table, op, str(dtype).removeprefix("torch."), arch) or ((None, None),):
            if found[index] and found[index][-1][1] is kernels(name):
                found[index].pop()
            found[index].append((float("inf") if end is None else end, kernels(name)))
    everywhere = {one.name for steps in found.values() for _, one in steps}
    if len(everywhere) == 1:
        _chosen[op, "cuda", dtype] = _kernels[everywhere.pop()]
    elif everywhere:
        del _chosen[op, "cuda", dtype]
        for index, steps in found.items():
            _by_size[op, torch.device("cuda", index), dtype] = tuple(steps)


_gpus: dict[int, int] = {}  # device index -> compute capability (9.0 as 90); empty until CUDA is initialised


def _on_cuda() -> None:
    """Runs once, when CUDA is initialised: before any tensor can be on a GPU, and not earlier, as asking a GPU what it
    is would initialise it.
    """
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        _gpus[index] = 10 * major + minor
    _follow_gpus()


def _follow_gpus() -> None:
    """What the table says of the GPUs here: who serves, and the variants. The library starts with the portable ones."""
    _tables.clear()
    _fill_chosen()
    for op in choosing.VARIANTS:
        named = {choosing.variant(_table, op, arch) for arch in _gpus.values()}
        # One setting serves the whole process: GPUs of which the table says different things get the portable kernels.
        if len(named) == 1 and (variant := named.pop()) is not None and cuda_variant(op) is not None:
            with contextlib.suppress(ValueError, RuntimeError):  # a build without this variant
                torch.ops.roberta_kernels_cuda.set_variant(op, variant)


def choices() -> list[dict[str, Any]]:
    """The choosing table for a reader, with where each entry comes from (choosing.rows)."""
    return choosing.rows(_table, next(iter(_gpus.values()), None))


def set_backend(name: str) -> str:
    """Makes `name` ("auto", "cuda", "triton", "cpu" or "reference") serve from now on, process-wide; returns what did.

    Raises BackendError for an unknown or unavailable backend.
    """
    global _override
    if name != "auto":
        if name not in _status:
            raise BackendError(f"unknown backend {name!r}: one of auto, {', '.join(available_backends())}")
        if not _status[name]:
            raise BackendError(f"backend {name!r} is not available: {_status[name].detail}")
    before, _override = _override, name
    _fill_chosen()
    return before


def current_backend() -> str:
    """What set_backend or the environment variable last asked for; "auto" by default."""
    return _override


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """`with backend("reference"): ...` serves with that backend inside the block (process-wide)."""
    before = set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


_load()
set_backend(os.environ.get(ENVIRONMENT_VARIABLE, "auto"))
torch.cuda._lazy_call(_on_cuda)
