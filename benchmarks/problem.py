"""The data of a case, and what a contender is: an implementation with its own arguments laid out."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.workloads import Case


@dataclass(frozen=True)
class Problem:
    """The data of one case, packed."""

    case: Case
    tensors: tuple[Tensor, ...]  # what the op is differentiated in
    grad_out: Tensor
    others: tuple[Any, ...] = ()  # ids, cu_seqlens

    def in_float64(self) -> Problem:
        return dataclasses.replace(
            self, tensors=tuple(t.double() for t in self.tensors), grad_out=self.grad_out.double()
        )


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Contender:
    """One implementation with its own arguments laid out: what is timed is `call`, and nothing else."""

    function: Callable[..., Tensor]  # (*tensors, *others) -> output
    tensors: tuple[Tensor, ...]
    others: tuple[Any, ...]
    grad_out: Tensor
    tokens: int  # rows that it computes: more than the useful ones where it pads
    pack: Callable[[Tensor], Tensor] = _same  # from its layout to packed rows, for the comparison of answers
    dynamic: tuple[tuple[Tensor, tuple[int, ...]], ...] = ()  # (argument, dims that vary from batch to batch)
    active: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext  # around each turn

    def forward(self) -> Tensor:
        return self.function(*self.tensors, *self.others)

    def forward_backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.function(*self.tensors, *self.others), self.tensors, self.grad_out)

    def in_turn(self, backward: bool, sets: int) -> Callable[[], Any]:
        """A call that goes through so many sets of its tensors, so that a cache does not hold the next one's."""
        if sets <= 1:
            return self.call(backward)
        calls = itertools.cycle([self.call(backward), *(self._copy().call(backward) for _ in range(sets - 1))])
        return lambda: next(calls)()

    def _copy(self) -> Contender:
        tensors = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in self.tensors)
        others = tuple(t.clone() if isinstance(t, Tensor) else t for t in self.others)
        for tensor, dims in self.dynamic:
            for mine, copied in zip((*self.tensors, *self.others), (*tensors, *others), strict=True):
                if mine is tensor:
                    for dim in dims:
                        torch._dynamo.maybe_mark_dynamic(copied, dim)
        return dataclasses.replace(self, tensors=tensors, others=others, grad_out=self.grad_out.clone())

    def bytes(self, backward: bool) -> int:
        """Of one set of its arguments."""
        arguments = (*self.tensors, *self.others, *((self.grad_out,) if backward else ()))
        return sum(t.nbytes for t in arguments if isinstance(t, Tensor))

    def call(self, backward: bool) -> Callable[[], Any]:
        return self.forward_backward if backward else self.forward

    def answers(self, backward: bool) -> list[Tensor]:
        """Output, or gradients, in the packed layout."""
        found = self.forward_backward() if backward else (self.forward(),)
        return [self.pack(t.detach()) for t in found]


@dataclass(frozen=True)
class Entry:
    """A contender before its tensors exist.

    note: what a reader of its figures must know.
    ours: under test, as opposed to a peer.
    same_work: computes the case's function; False for a peer that does less, and only marks a bound.
    backend, variant: of the package, for those under test.
    """

    build: Callable[[Problem], Contender]
    note: str = ""
    ours: bool = False
    same_work: bool = True
    applies: Callable[[Case], bool] = lambda case: True
    backend: str | None = None
    variant: str | None = None


def packed(function: Callable[..., Tensor], problem: Problem) -> Contender:
    """A contender that takes the problem as it is."""
    return Contender(function, problem.tensors, problem.others, problem.grad_out, problem.case.batch.tokens)


def generator(case: Case) -> torch.Generator:
    """Random data of a case: the same in every run on one kind of device."""
    return torch.Generator(case.device).manual_seed(
        zlib.crc32(f"{case.op}-{case.size.name}-{case.batch.name}".encode())
    )


def random_tensor(case: Case, draw: torch.Generator, *shape: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
    """Normal numbers, a leaf that requires its gradient where the case goes backward."""
    values = torch.randn(shape, generator=draw, device=case.device) * scale + offset
    return values.to(case.dtype).requires_grad_(case.backward)
