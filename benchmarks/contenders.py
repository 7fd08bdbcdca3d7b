"""Who is measured in a case: this package's backends, and the peers that they are compared with."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops import OPS
from benchmarks.problem import Contender, Entry, Problem
from benchmarks.workloads import Case
from roberta_kernels import backends
from roberta_kernels.backends import choosing

# Backends to measure, per device type. The reference is the definition of the ops, not a competitor: it stands in only
# where no kernels are there, or when it is asked for by name.
_KERNELS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


def backends_to_measure(device: str, wanted: Sequence[str]) -> list[str]:
    if wanted:
        return list(wanted)
    available = backends.available_backends()
    return [name for name in _KERNELS[device] if available[name]] or ["reference"]


def entries(
    case: Case, *, wanted_backends: Sequence[str], compiled: bool, everywhere: bool = False
) -> dict[str, Entry]:
    """Every contender of a case by name, those under test first. everywhere: also the peers that this device, dtype or
    direction has not, which then fail and say so.
    """
    op = OPS[case.op]
    found = {}
    for name in backends_to_measure(case.device, wanted_backends):
        if name == "cuda" and case.op in choosing.NOT_IN_CUDA:
            continue
        if name == "cuda" and backends.cuda_variant(case.op) is not None:
            for variant in choosing.VARIANTS[case.op]:
                found[f"cuda {variant}"] = _ours(op, name, variant)
        else:
            found[name] = _ours(op, name)
    found["eager"] = Entry(op.eager, "the op as Hugging Face writes it, in plain torch")
    if compiled:
        found["compile"] = Entry(lambda problem: _compile(op.eager(problem), problem.case), "the same, torch.compile")
    found.update({name: entry for name, entry in op.PEERS.items() if everywhere or entry.applies(case)})
    return found


def _ours(op: Any, backend: str, variant: str | None = None) -> Entry:
    name = op.__name__.rpartition(".")[2]

    @contextlib.contextmanager
    def active() -> Iterator[None]:
        with backends.backend(backend):
            if variant is None:
                yield
            else:
                with backends.use_cuda_variant(name, variant):
                    yield

    def build(problem: Problem) -> Contender:
        return dataclasses.replace(op.ours(problem), active=active)

    note = f"roberta_kernels, backend {backend}" + (f", variant {variant}" if variant else "")
    return Entry(build, note, ours=True, backend=backend, variant=variant)


_compiled: dict[tuple[str, ...], Callable[..., Tensor]] = {}


def _compile(eager: Contender, case: Case) -> Contender:
    """eager under torch.compile: widths fixed, batch and lengths dynamic, as a server has to compile it.

    Batches of one size, dtype and direction share the compiled function; the next one drops it and dynamo's state.
    """
    key = (case.op, case.size.name, case.dtype_name, case.direction)
    if key not in _compiled:
        _compiled.clear()
        torch._dynamo.reset()
        _compiled[key] = torch.compile(eager.function, fullgraph=True)
    for tensor, dims in eager.dynamic:
        for dim in dims:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return dataclasses.replace(eager, function=_compiled[key])
