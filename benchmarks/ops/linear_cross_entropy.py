"""cross_entropy(x @ weight^T + bias, labels): the head of a masked language model. Bound by its products.

15% of the rows have a label, as in BERT's pretraining (Devlin et al. 2019, section 3.1). The useful work is theirs
alone; torch's own way computes every row.
"""

from __future__ import annotations

import dataclasses
import importlib.util

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.problem import Contender, Entry, Problem, generator, packed, random_tensor
from benchmarks.workloads import Case, Cost
from roberta_kernels import ops

LABELLED = 0.15


def _labelled(case: Case) -> int:
    return max(1, round(LABELLED * case.batch.tokens))


def problem(case: Case) -> Problem:
    draw, rows, size = generator(case), case.batch.tokens, case.size
    labels = torch.full((rows,), -100, device=case.device)
    chosen = torch.randperm(rows, generator=draw, device=case.device)[: _labelled(case)]
    labels[chosen] = torch.randint(0, size.vocabulary, chosen.shape, generator=draw, device=case.device)
    return Problem(
        case,
        tensors=(
            random_tensor(case, draw, rows, size.hidden),  # x
            random_tensor(case, draw, size.vocabulary, size.hidden, scale=size.hidden**-0.5),  # weight
            random_tensor(case, draw, size.vocabulary, scale=0.1),  # bias
        ),
        grad_out=torch.ones((), dtype=case.dtype, device=case.device),
        others=(labels,),
    )


def cost(case: Case) -> Cost:
    rows, size = _labelled(case), case.size
    product = 2 * rows * size.hidden * size.vocabulary
    weight, narrow = size.vocabulary * (size.hidden + 1), rows * size.hidden
    elements = weight + narrow  # forward reads weight, bias and the rows
    if case.backward:  # reads them again; writes the gradients, x's for every row
        elements += 2 * weight + narrow + case.batch.tokens * size.hidden
    return Cost(flops=product * (3 if case.backward else 1), bytes=elements * case.dtype.itemsize, products=True)


def _ours(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return ops.linear_cross_entropy(x, weight, labels, bias).to(x.dtype)  # as the others give it


def _eager(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight, bias), labels)


def _selected(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    rows = (labels != -100).nonzero().squeeze(1)
    return F.cross_entropy(F.linear(x[rows], weight, bias), labels[rows])


def _liger(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    given = LigerFusedLinearCrossEntropyFunction.apply(x, weight, labels, bias)
    return given[0] if isinstance(given, tuple) else given


def ours(problem: Problem) -> Contender:
    return packed(_ours, problem)


def eager(problem: Problem) -> Contender:
    return dataclasses.replace(packed(_eager, problem), dynamic=((problem.tensors[0], (0,)), (problem.others[0], (0,))))


def selected(problem: Problem) -> Contender:
    return packed(_selected, problem)


def liger(problem: Problem) -> Contender:
    return packed(_liger, problem)


PEERS = {
    "selected rows": Entry(selected, "plain torch on the rows with a label alone, all their logits at once"),
    "Liger": Entry(
        liger,
        "liger_kernel's fused linear cross-entropy: all rows, gradients made in forward",
        applies=lambda case: case.device == "cuda" and importlib.util.find_spec("liger_kernel") is not None,
    ),
}
