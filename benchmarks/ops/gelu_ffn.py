"""gelu(x @ w_in^T + b_in) @ w_out^T + b_out, the feed-forward half of a layer. Bound by the matrix products."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.problem import Contender, Entry, Problem, generator, packed, random_tensor
from benchmarks.workloads import Case, Cost
from roberta_kernels import ops


def problem(case: Case) -> Problem:
    draw, rows, hidden, inner = generator(case), case.batch.tokens, case.size.hidden, case.size.inner
    return Problem(
        case,
        tensors=(
            random_tensor(case, draw, rows, hidden),  # x
            random_tensor(case, draw, inner, hidden, scale=hidden**-0.5),  # w_in
            random_tensor(case, draw, inner, scale=0.1),  # b_in
            random_tensor(case, draw, hidden, inner, scale=inner**-0.5),  # w_out
            random_tensor(case, draw, hidden, scale=0.1),  # b_out
        ),
        grad_out=random_tensor(case, draw, rows, hidden).detach(),
    )


def cost(case: Case) -> Cost:
    rows, hidden, inner = case.batch.tokens, case.size.hidden, case.size.inner
    product = 2 * rows * hidden * inner
    weights, narrow, wide = 2 * hidden * inner, rows * hidden, rows * inner
    elements = weights + 2 * narrow  # forward reads the weights and x, and writes out
    if case.backward:
        # forward writes the pre-activation; backward reads it, grad_out, x and the weights, and writes the gradients
        elements += 2 * wide + 2 * weights + 3 * narrow
    return Cost(flops=product * (6 if case.backward else 2), bytes=elements * case.dtype.itemsize, products=True)


def _ours(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor) -> Tensor:
    return ops.gelu_ffn(x, w_in, b_in, w_out, b_out)


def _eager(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w_in, b_in)), w_out, b_out)


def _onednn(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor) -> Tensor:
    linear = torch.ops.mkldnn._linear_pointwise
    return linear(linear(x, w_in, b_in, "gelu", [], "none"), w_out, b_out, "none", [], "")


def _cublaslt(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor) -> Tensor:
    return F.linear(torch._addmm_activation(b_in, x, w_in.t(), use_gelu=True), w_out, b_out)


def ours(problem: Problem) -> Contender:
    return packed(_ours, problem)


def eager(problem: Problem) -> Contender:
    return dataclasses.replace(packed(_eager, problem), dynamic=((problem.tensors[0], (0,)),))


def onednn(problem: Problem) -> Contender:
    x, w_in, b_in, w_out, b_out = problem.tensors
    reorder = torch.ops.mkldnn._reorder_linear_weight
    w_in, w_out = (reorder(w, x.shape[0]) for w in (w_in, w_out))
    return dataclasses.replace(packed(_onednn, problem), tensors=(x, w_in, b_in, w_out, b_out))


def cublaslt(problem: Problem) -> Contender:
    return packed(_cublaslt, problem)


PEERS = {
    "oneDNN": Entry(
        onednn,
        "torch's oneDNN linear with the GELU in its epilogue, weights reordered beforehand; inference only",
        applies=lambda case: case.device == "cpu" and not case.backward,
    ),
    "cuBLASLt": Entry(
        cublaslt,
        "torch._addmm_activation: bias and GELU in the epilogue, but the tanh GELU; inference only",
        same_work=False,
        applies=lambda case: case.device == "cuda" and not case.backward,
    ),
}
