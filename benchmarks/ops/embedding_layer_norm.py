"""layer_norm(word + token_type + position), the first layer. Memory-bound.

Backward writes a dense gradient of the whole vocabulary, as nn.Embedding's does: in float32 154 MB for RoBERTa-base,
which is most of its time.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.problem import Contender, Entry, Problem, generator, packed, random_tensor
from benchmarks.workloads import Case, Cost
from roberta_kernels import ops

EPS = 1e-5
PADDING = 1


def problem(case: Case) -> Problem:
    draw, size, rows = generator(case), case.size, case.batch.tokens
    input_ids = torch.randint(PADDING + 1, size.vocabulary, (rows,), generator=draw, device=case.device)
    position_ids = torch.cat([torch.arange(length) + PADDING + 1 for length in case.batch.lengths])
    ids = (input_ids, position_ids, torch.zeros_like(input_ids))
    return Problem(
        case,
        tensors=(
            random_tensor(case, draw, size.vocabulary, size.hidden),
            random_tensor(case, draw, size.positions, size.hidden),
            random_tensor(case, draw, 1, size.hidden),
            random_tensor(case, draw, size.hidden, scale=0.1, offset=1.0),  # weight
            random_tensor(case, draw, size.hidden, scale=0.1),  # bias
        ),
        grad_out=random_tensor(case, draw, rows, size.hidden).detach(),
        others=tuple(i.to(case.device) for i in ids),
    )


def cost(case: Case) -> Cost:
    size, rows = case.size, case.batch.tokens
    # Rows of the tables that are touched. Ids are drawn evenly from a large vocabulary: nearly all differ.
    gathered = rows + max(case.batch.lengths) + 1
    elements = (gathered + rows) * size.hidden  # forward reads the rows and writes out
    if case.backward:  # reads grad_out and the rows again, writes the dense gradients of the tables
        elements += (rows + gathered + size.vocabulary + size.positions + 1) * size.hidden
    ids = 3 * 8 * rows * (1 + case.backward)
    return Cost(
        flops=rows * size.hidden * (9 + 16 * case.backward),
        bytes=elements * case.dtype.itemsize + ids,
        products=False,
    )


def _ours(
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
) -> Tensor:
    return ops.embedding_layer_norm(
        input_ids,
        position_ids,
        token_type_ids,
        word,
        position,
        token_type,
        weight,
        bias,
        eps=EPS,
        word_padding_idx=PADDING,
        position_padding_idx=PADDING,
    )


def _eager(
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
) -> Tensor:
    embedded = F.embedding(input_ids, word, PADDING) + F.embedding(token_type_ids, token_type)
    embedded = embedded + F.embedding(position_ids, position, PADDING)
    return F.layer_norm(embedded, (embedded.shape[-1],), weight, bias, EPS)


def ours(problem: Problem) -> Contender:
    return packed(_ours, problem)


def eager(problem: Problem) -> Contender:
    return dataclasses.replace(packed(_eager, problem), dynamic=tuple((ids, (0,)) for ids in problem.others))


PEERS: dict[str, Entry] = {}
