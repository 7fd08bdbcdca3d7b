"""layer_norm(residual + x), the end of both halves of a layer. Memory-bound: three passes forward, four backward.

x carries its bias already, as in the original, where the product before it adds the bias for nothing.
"""

from __future__ import annotations

import dataclasses
import importlib.util

from torch import Tensor
from torch.nn import functional as F

from benchmarks.problem import Contender, Entry, Problem, generator, packed, random_tensor
from benchmarks.workloads import Case, Cost
from roberta_kernels import ops

EPS = 1e-5


def problem(case: Case) -> Problem:
    draw, rows, hidden = generator(case), case.batch.tokens, case.size.hidden
    return Problem(
        case,
        tensors=(
            random_tensor(case, draw, rows, hidden),  # x
            random_tensor(case, draw, rows, hidden),  # residual
            random_tensor(case, draw, hidden, scale=0.1, offset=1.0),  # weight
            random_tensor(case, draw, hidden, scale=0.1),  # bias
        ),
        grad_out=random_tensor(case, draw, rows, hidden).detach(),
    )


def cost(case: Case) -> Cost:
    elements, width = case.batch.tokens * case.size.hidden, case.dtype.itemsize
    # forward: reads x, residual; writes out. backward: reads grad_out, x, residual; writes the one gradient of both.
    passes = 3 + 4 * case.backward
    return Cost(elements * (8 + 14 * case.backward), passes * elements * width, products=False)


def _ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.add_layer_norm(x, residual, weight, bias, eps=EPS)


def _eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x + residual, (x.shape[-1],), weight, bias, EPS)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, EPS)


def ours(problem: Problem) -> Contender:
    return packed(_ours, problem)


def eager(problem: Problem) -> Contender:
    x, residual, _, _ = problem.tensors
    return dataclasses.replace(packed(_eager, problem), dynamic=((x, (0,)), (residual, (0,))))


def layer_norm_alone(problem: Problem) -> Contender:
    x, _, weight, bias = problem.tensors
    return dataclasses.replace(packed(_layer_norm, problem), tensors=(x, weight, bias))


def _liger(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(x + residual, weight, bias, EPS)


def liger(problem: Problem) -> Contender:
    return packed(_liger, problem)


def _has_liger(case: Case) -> bool:
    return case.device == "cuda" and importlib.util.find_spec("liger_kernel") is not None


PEERS = {
    "Liger": Entry(liger, "Liger-Kernel's LayerNorm after an addition", applies=_has_liger),
    "layer_norm only": Entry(layer_norm_alone, "F.layer_norm without the addition: less work", same_work=False),
}
