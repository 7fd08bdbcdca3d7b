"""max over a sequence's rows of log1p(relu(x @ weight^T + bias)): SPLADE's head. Bound by its product.

The useful work of backward is what the largest logits need: one row of each sequence for each word. Plain torch
multiplies all rows again.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.problem import Contender, Entry, Problem, generator, packed, random_tensor
from benchmarks.workloads import Case, Cost
from roberta_kernels import ops


def problem(case: Case) -> Problem:
    draw, size, batch = generator(case), case.size, case.batch
    x = random_tensor(case, draw, batch.tokens, size.hidden)
    weight = random_tensor(case, draw, size.vocabulary, size.hidden, scale=size.hidden**-0.5)
    bias = random_tensor(case, draw, size.vocabulary, scale=0.1)
    # No gradient where rounding may decide which row is the largest: answers are compared.
    near = 256 * torch.finfo(case.dtype).eps
    sure = []
    with torch.no_grad():
        for rows in x.split(batch.lengths):
            top = F.linear(rows, weight, bias).float().topk(min(2, len(rows)), dim=0)[0]
            sure.append((top[0] - top[-1] > near) | torch.tensor(len(rows) == 1, device=top.device))
    return Problem(
        case,
        tensors=(x, weight, bias),
        grad_out=torch.stack(sure).to(case.dtype),
        others=(
            torch.tensor([0, *itertools.accumulate(batch.lengths)], dtype=torch.int32, device=case.device),
            batch.lengths,
        ),
    )


def cost(case: Case) -> Cost:
    rows, size, sequences = case.batch.tokens, case.size, len(case.batch.lengths)
    flops = 2 * rows * size.hidden * size.vocabulary
    weight, narrow, pooled = size.vocabulary * (size.hidden + 1), rows * size.hidden, sequences * size.vocabulary
    elements = weight + narrow + pooled  # forward reads weight, bias and x, and writes a row for each sequence
    if case.backward:  # reads them again, and writes the gradients
        flops += 4 * sequences * size.hidden * size.vocabulary
        elements += 2 * (weight + narrow) + pooled
    return Cost(flops=flops, bytes=elements * case.dtype.itemsize, products=True)


def _ours(x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor, lengths: tuple[int, ...]) -> Tensor:
    return ops.linear_log1p_max(x, weight, cu_seqlens, bias).to(x.dtype)  # as the others give it


def _eager(x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor, lengths: tuple[int, ...]) -> Tensor:
    activations = F.linear(x, weight, bias).relu().log1p()
    return torch.stack([rows.max(0)[0] for rows in activations.split(lengths)])


def _largest_first(x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor, lengths: tuple[int, ...]) -> Tensor:
    logits = [F.linear(rows, weight, bias).max(0)[0] for rows in x.split(lengths)]
    return torch.stack(logits).relu().log1p()


def ours(problem: Problem) -> Contender:
    return packed(_ours, problem)


def eager(problem: Problem) -> Contender:
    return dataclasses.replace(packed(_eager, problem), dynamic=((problem.tensors[0], (0,)),))


def largest_first(problem: Problem) -> Contender:
    return packed(_largest_first, problem)


PEERS = {
    "largest first": Entry(largest_first, "plain torch, a sequence at a time: the largest logits, then log1p(relu)"),
}
