"""softmax(q k^T / sqrt(head_dim)) v within each sequence.

The kernels take packed rows. Eager torch, torch.compile and scaled_dot_product_attention take the padded layout that a
model hands them, `[batch, longest, heads, head_dim]` seen as `[batch, heads, longest, head_dim]`, and compute the
padding too.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.problem import Contender, Entry, Problem, generator, packed, random_tensor
from benchmarks.workloads import Case, Cost
from roberta_kernels import ops


def problem(case: Case) -> Problem:
    draw, rows, heads, head_dim = generator(case), case.batch.tokens, case.size.heads, case.size.head_dim
    q, k, v, grad_out = (random_tensor(case, draw, rows, heads, head_dim) for _ in range(4))
    ends = torch.tensor([0, *itertools.accumulate(case.batch.lengths)], dtype=torch.int32, device=case.device)
    return Problem(case, tensors=(q, k, v), grad_out=grad_out.detach(), others=(ends, max(case.batch.lengths)))


def cost(case: Case) -> Cost:
    hidden = case.size.hidden
    # Two products forward, four backward; computing the scores a second time is not useful work.
    products = 6 if case.backward else 2
    # forward: q, k, v, out; backward: those and grad_out read, three gradients written
    passes = 12 if case.backward else 4
    return Cost(
        flops=products * 2 * hidden * sum(length * length for length in case.batch.lengths),
        bytes=passes * case.batch.tokens * hidden * case.dtype.itemsize,
        products=True,
    )


def _ours(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    return ops.attention(q, k, v, cu_seqlens, max_seqlen_q=longest)


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask
    return torch.matmul(F.softmax(scores, dim=-1), v).transpose(1, 2).contiguous()


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2).contiguous()


def _sdpa_each(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    return torch.cat(
        [
            F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in qkv))[0].transpose(0, 1)
            for qkv in zip(*(t.split(lengths) for t in (q, k, v)), strict=True)
        ]
    )


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest)


def _sdpa_with(backend: str) -> Callable[..., Tensor]:
    def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, backend)):
            return _sdpa(q, k, v, mask)

    return sdpa


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    attend = _compiled_flex() if q.is_cuda else flex_attention
    return attend(*(t.transpose(0, 1)[None] for t in (q, k, v)), block_mask=mask)[0].transpose(0, 1).contiguous()


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


def _has_varlen() -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return False
    return True


def ours(problem: Problem) -> Contender:
    return packed(_ours, problem)


def _padded(function: Callable[..., Tensor], problem: Problem, *, additive_mask: bool) -> Contender:
    case, batch = problem.case, problem.case.batch
    longest = max(batch.lengths)
    lengths = torch.tensor(batch.lengths)
    real = (torch.arange(longest) < lengths[:, None]).to(case.device)  # [B, S]

    def pad(rows: Tensor) -> Tensor:
        padded = rows.new_zeros(*real.shape, *rows.shape[1:])
        padded[real] = rows.detach()
        return padded.requires_grad_(rows.requires_grad)

    tensors = tuple(pad(t) for t in problem.tensors)
    mask = None
    if not batch.even:  # a model drops the mask of a batch without padding
        mask = real[:, None, None, :].expand(-1, 1, longest, -1)
        if additive_mask:
            dtype = tensors[0].dtype
            mask = torch.zeros(mask.shape, dtype=dtype, device=case.device).masked_fill_(~mask, torch.finfo(dtype).min)
    dynamic = tuple((t, (0, 1)) for t in tensors if t.shape[0] > 1)
    if mask is not None:
        dynamic = (*dynamic, (mask, (0, 2, 3)))
    return Contender(
        function,
        tensors,
        (mask,),
        pad(problem.grad_out),
        tokens=batch.padded_tokens,
        pack=lambda padded: padded[real],
        dynamic=dynamic,
    )


def eager(problem: Problem) -> Contender:
    return _padded(_eager, problem, additive_mask=True)


def sdpa(problem: Problem) -> Contender:
    return _padded(_sdpa, problem, additive_mask=False)


def sdpa_each(problem: Problem) -> Contender:
    return dataclasses.replace(packed(_sdpa_each, problem), others=(problem.case.batch.lengths,))


def varlen(problem: Problem) -> Contender:
    return packed(_varlen, problem)


def flex(problem: Problem) -> Contender:
    """The mask that keeps sequences apart is made beforehand, as a model would for all its layers."""
    case = problem.case
    lengths = torch.tensor(case.batch.lengths, device=case.device)
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=case.device), lengths)
    rows = case.batch.tokens

    def same(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sequence[query] == sequence[key]

    mask = create_block_mask(same, None, None, rows, rows, device=case.device)
    return dataclasses.replace(packed(_flex, problem), others=(mask,))


def _sdpa_entry(backend: str, what: str) -> Entry:
    return Entry(
        lambda problem: _padded(_sdpa_with(backend), problem, additive_mask=False),
        f"the same, {what}",
        applies=lambda case: case.device == "cuda",
    )


PEERS = {
    "sdpa": Entry(sdpa, "F.scaled_dot_product_attention on the padded batch"),
    "sdpa flash": _sdpa_entry("FLASH_ATTENTION", "FlashAttention only (it takes no mask)"),
    "sdpa cuDNN": _sdpa_entry("CUDNN_ATTENTION", "cuDNN only"),
    "sdpa efficient": _sdpa_entry("EFFICIENT_ATTENTION", "memory-efficient attention only"),
    "sdpa math": _sdpa_entry("MATH", "plain products and softmax"),
    "flex": Entry(
        flex,
        "FlexAttention on packed rows, compiled, with a document mask made beforehand",
        applies=lambda case: case.device == "cuda",
    ),
    "sdpa each": Entry(
        sdpa_each,
        "F.scaled_dot_product_attention, one sequence at a time: no padding, a call each",
        applies=lambda case: not case.batch.even,
    ),
    "varlen": Entry(
        varlen,
        "torch.nn.attention.varlen: FlashAttention on packed rows",
        applies=lambda case: case.device == "cuda" and case.dtype_name != "float32" and _has_varlen(),
    ),
}
