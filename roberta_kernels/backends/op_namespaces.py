"""The op namespaces: which there are, what is in them, whether they can run here, and how they are loaded.

A backend is a namespace (`roberta_kernels_cpu`, ...) that holds every op of schemas.def under one schema: compiled, and
loaded as a library, or defined here from a package of Python kernels. A library has ops of its own beside those
(library_ops.py), and more than one implementation: an instruction set of the CPU's, a variant of the CUDA kernels.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from roberta_kernels import reference, triton
from roberta_kernels.backends import choosing, library_ops
from roberta_kernels.schemas import schemas

_PACKAGE = Path(__file__).parents[1]  # where setup.py puts libraries and its report
CPU_ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
ISA_VARIABLE = "ROBERTA_KERNELS_CPU_ISA"
# A library of the CUDA kernels compiled for the CPU (tests/cuda_emulation): the cuda backend then runs on CPU tensors,
# as Triton does under TRITON_INTERPRET=1. It finds mistakes in kernels, some ten thousand times slower than a GPU.
EMULATION_VARIABLE = "ROBERTA_KERNELS_CUDA_EMULATION"


class BackendError(RuntimeError):
    """A backend was asked for that does not exist, is not available, or does not support these tensors."""


@dataclass(frozen=True)
class BackendStatus:
    """available: it can be used; detail: what runs, or why it cannot."""

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


def build_report() -> dict[str, Any]:
    """What the build compiled and what it left out (written by setup.py); empty when the package was never built."""
    path = _PACKAGE / "build_report.json"
    return json.loads(path.read_text()) if path.is_file() else {}


_libraries: list[torch.library.Library] = []  # a Library that is collected takes its ops with it
_kernels: dict[str, Kernels] = {}
_status: dict[str, BackendStatus] = {}


def _define(name: str, dispatch_keys: tuple[str, ...], kernel: Callable[[str], Callable[..., Any]]) -> None:
    """Defines a namespace whose kernels are Python functions: kernel(op) gives the one for an op."""

    def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
        # Inside an op torch's own products would still follow autocast, and leave the dtypes of the contract.
        def run(*args: Any) -> Any:
            with torch._C._DisableAutocast():
                return function(*args)

        return run

    library = torch.library.Library(f"roberta_kernels_{name}", "DEF")
    for op, schema in schemas().items():
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in dispatch_keys:
            library.impl(op, without_autocast(kernel(op)), key)
    _libraries.append(library)
    _kernels[name] = Kernels(name)


def _made(name: str) -> None:
    """A library was loaded."""
    kernels = Kernels(name)
    library_ops.register(kernels.namespace)
    _kernels[name] = kernels


def emulating() -> bool:
    """Whether the cuda backend is the emulated library."""
    return bool(os.environ.get(EMULATION_VARIABLE))


def _load_compiled(name: str) -> BackendStatus:
    path = _PACKAGE / f"_{name}.so"
    report = build_report()
    if name == "cuda" and emulating():
        torch.ops.load_library(os.environ[EMULATION_VARIABLE])
        _made(name)
        return BackendStatus(True, f"emulated on the CPU ({EMULATION_VARIABLE})")
    if not path.is_file():
        return BackendStatus(False, report.get(name) or "not compiled (pip install --no-build-isolation . compiles it)")
    if name == "cuda" and torch.version.cuda is None:
        return BackendStatus(False, f"torch {torch.__version__} is a CPU build")
    try:
        torch.ops.load_library(str(path))
        _made(name)
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
    _status["triton"] = BackendStatus(*triton.available())
    if triton.installed():
        # The namespace exists wherever triton does, so that traced graphs load; whether it can run is another
        # question.
        _define("triton", ("CUDA", "CPU"), _triton_kernel)


def available_backends() -> dict[str, BackendStatus]:
    """Every backend, with whether it is available and what runs or why not; compiled ones first."""
    status = {name: _status[name] for name in ("cuda", "triton", "cpu", "reference")}
    if status["cpu"]:
        status["cpu"] = BackendStatus(True, f"compiled; instruction set {cpu_isa()} of {', '.join(cpu_isas())}")
    if status["cuda"] and not emulating():
        # Like Triton it can also run where no GPU is: fake tensors, when a graph is traced for another machine.
        built = ", ".join(build_report().get("cuda_architectures", ["unknown architectures"]))
        here = "" if torch.cuda.device_count() else "; no GPU here"
        status["cuda"] = BackendStatus(True, f"compiled for {built}{here}")
    return status


def status_of(name: str) -> BackendStatus | None:
    """As available_backends has it, less what runs within a library; None for an unknown name."""
    return _status.get(name)


def namespaces() -> dict[str, Kernels]:
    """The namespaces that exist in this process, by backend name."""
    return dict(_kernels)


@functools.cache
def missing_op(name: str, op: str) -> str | None:
    """Why the library of a backend has no such op beside those of schemas.def in this process, or None."""
    if not _status[name]:
        return available_backends()[name].detail
    there = hasattr(getattr(torch.ops, f"roberta_kernels_{name}"), op)
    return None if there else "the compiled kernels are of an old build"


def cpu_isas() -> tuple[str, ...]:
    """Instruction sets that both the build and this processor have, plainest first; empty without compiled kernels."""
    if not _status["cpu"]:
        return ()
    built = build_report().get("isas", CPU_ISAS)
    isa_available = torch.ops.roberta_kernels_cpu.isa_available
    return tuple(isa for i, isa in enumerate(CPU_ISAS) if isa in built and isa_available(i))


def cpu_isa() -> str:
    """The instruction set in use."""
    return CPU_ISAS[torch.ops.roberta_kernels_cpu.get_isa()]


def wrong_isa() -> str | None:
    """Why no CPU kernel may run: the environment variable asks for an instruction set that is not there."""
    asked = os.environ.get(ISA_VARIABLE)
    if asked is None or not _status["cpu"] or asked in cpu_isas():
        return None
    return f"{ISA_VARIABLE} must be one of {', '.join(cpu_isas())} (what this processor and build have), got {asked!r}"


@contextlib.contextmanager
def use_cpu_isa(isa: str) -> Iterator[None]:
    """Uses another instruction set inside the block (for tests and benchmarks; process-wide)."""
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
    """Runs an op of the "cuda" backend with another of its variants inside the block (for tests and benchmarks;
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
    """The variant that the "cuda" backend runs an op with; None where the op has but one, or no library is there."""
    if op not in choosing.VARIANTS or not _status["cuda"] or not hasattr(torch.ops.roberta_kernels_cuda, "get_variant"):
        return None
    return torch.ops.roberta_kernels_cuda.get_variant(op)


def cuda_served(op: str) -> dict[tuple[str, str], int]:
    """How many calls of an op each variant of the "cuda" backend has run in this process, by (variant, "forward" or
    "backward"). A call that a variant does not take goes to one below it, and nothing else tells; empty for an op
    without variants.
    """
    if cuda_variant(op) is None:
        return {}
    served = torch.ops.roberta_kernels_cuda.served
    directions = {"forward": False, "backward": True}
    return {(v, name): served(op, v, backward) for v in choosing.VARIANTS[op] for name, backward in directions.items()}


_load()
