"""Op calls for a decoder's step, in which a sequence has a row or a few: inference on the compiled CPU kernels, on the
parameters and caches where they lie (docs/design.md, section 9)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from roberta_kernels import backends
from roberta_kernels.ops import matmul_precision

MOST_QUERIES = 8  # of a sequence (few_queries.h)
# Where the product took less time than torch's (docs/performance.md, Generation): in float32 from 8
# rows on, in bfloat16 on tiles.
FEWEST_ROWS, MOST_ROWS = 8, 32


def reads_cache(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether `cached_attention` takes a call that ops.attention takes.

    query: `[B, heads, Q, head_dim]`. key, value: `[B, heads, K, head_dim]`.
    """
    return (
        query.is_cpu
        and query.shape[2] <= MOST_QUERIES
        and dropout == 0
        and not torch.compiler.is_compiling()
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
        and _cpu_serves(query, "attention")
        and not _needs_gradient(query, key, value)
        and backends.missing_op("cpu", "cached_attention") is None
    )


def cached_attention(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """Attention of few queries, with keys and values read in place. As ops.attention, of equal lengths.

    key_mask: bool `[B, K]`, True: the key may be seen. causal: the last query is at the last key.

    Returns:
        `[B, Q, heads, head_dim]`.
    """
    return torch.ops.roberta_kernels_cpu.cached_attention.default(query, key, value, key_mask, scale, causal)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: of few rows on a CPU, by the products of the encoder. x `[..., K]`, weight `[N, K]`, bias `[N]`."""
    rows = x.numel() // max(1, x.shape[-1])
    if (
        type(x) is not Tensor
        or not x.is_cpu
        or not (FEWEST_ROWS if x.dtype == torch.float32 else 1) <= rows <= MOST_ROWS
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or (x.dtype != torch.float32 and backends.cpu_isa() != "amx")
        or not x.dtype == weight.dtype == (weight if bias is None else bias).dtype
        or weight.stride(1) != 1
        or weight.stride(0) < weight.shape[1]
        or _needs_gradient(x, weight, bias)
        or not _cpu_serves(x, "gelu_ffn")
        or backends.missing_op("cpu", "linear") is not None
    ):
        return F.linear(x, weight, bias)
    op = torch.ops.roberta_kernels_cpu.linear.default
    return matmul_precision.call(op, x.reshape(rows, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _cpu_serves(like: Tensor, op: str) -> bool:
    return backends.serves_alone(like, (op,)) == "cpu"
