"""Attention over packed sequences: contract, fake functions, autograd, public function."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from roberta_kernels import backends
from roberta_kernels.ops import contract, matmul_precision
from roberta_kernels.ops.contract import check_device, check_shape, check_tensor

MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 128


def supported_head_dim(head_dim: int) -> bool:
    """Whether the kernels support this head dim: 16 to 128 in steps of 8."""
    return MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM and head_dim % 8 == 0


def serving_head_dim(head_dim: int) -> int | None:
    """The smallest head dim of at least this one that the kernels support, or None. Zeros in the places between change
    neither a score nor another column of the output.
    """
    return max(MIN_HEAD_DIM, -(-head_dim // 8) * 8) if 0 < head_dim <= MAX_HEAD_DIM else None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q @ k^T + bias) @ v within each sequence (Vaswani et al. 2017, section 3.2.1), differentiable in
    q, k, v and bias.

    Args:
        q: `[Tq, heads, head_dim]`, packed queries. head_dim 16 to 128, a multiple of 8. q, k and v may be views (of
            one fused projection, say): any strides, with unit stride in head_dim; else they are copied.
        k, v: `[Tk, heads, head_dim]`.
        cu_seqlens_q: int32 `[B + 1]`: sequence b holds the rows `cu_seqlens_q[b]` up to `cu_seqlens_q[b + 1]`.
        cu_seqlens_k: the same for keys; None: as the queries.
        max_seqlen_q, max_seqlen_k: an upper bound of the lengths.
        scale: factor on the scores; None: `head_dim ** -0.5`.
        causal: query i of a sequence sees key j when `j <= i + len_k - len_q`.
        key_mask: bool `[Tk]`, True: the key may be seen. None: all.
        dropout_p: probability of dropping a softmax weight, in [0, 1).
        seed: int64 `[1]`, for dropout_p > 0 (see draw_seeds).
        bias: `[heads, max_seqlen_q or more, max_seqlen_k or more]`, of q's dtype: bias[h, i, j] is added to the score
            of query i and key j of a sequence, the same in every sequence; i and j count the sequence's own rows, those
            too that key_mask hides (a relative position bias: Raffel et al. 2020, section 2.1). The CUDA backend takes
            none: another runs in its place.

    float32 on a CPU follows torch.set_float32_matmul_precision where kernels can (ops/matmul_precision.py).

    Returns:
        `[Tq, heads, head_dim]`. A query that sees no key gives zeros.

    Raises:
        TypeError, ValueError: a dtype, shape, device or value outside of the above. The contents of cu_seqlens
            are checked when they are on the CPU; on a GPU that would need a synchronisation.
        backends.BackendError: the backend asked for does not support the call.
    """
    contract.check_dims("q", q, 3, None, "tokens, heads, head_dim")
    heads, head_dim = q.shape[1], q.shape[2]
    contract.check_floating("q", q)
    check_tensor("k", k, (None, heads, head_dim), q)
    check_tensor("v", v, (k.shape[0], heads, head_dim), q)
    if heads == 0:
        raise ValueError("q has no heads")
    if not supported_head_dim(head_dim):
        raise ValueError(f"head_dim must be {MIN_HEAD_DIM} to {MAX_HEAD_DIM} in steps of 8, got {head_dim}")
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
        max_seqlen_k = max_seqlen_q if max_seqlen_k is None else max_seqlen_k
        check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q, max_seqlen_q)
        if k.shape[0] != q.shape[0]:
            raise ValueError(f"q has {q.shape[0]} rows and k {k.shape[0]}: cu_seqlens_k is needed")
    else:
        if max_seqlen_k is None:
            raise ValueError("cu_seqlens_k requires max_seqlen_k")
        check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q, max_seqlen_q)
        check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k, max_seqlen_k)
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            named = (cu_seqlens_q.shape[0] - 1, cu_seqlens_k.shape[0] - 1)
            raise ValueError("cu_seqlens_q names {} sequences and cu_seqlens_k {}".format(*named))
    if key_mask is not None:
        check_shape("key_mask", key_mask, (k.shape[0],))
        check_device("key_mask", key_mask, q)
        if key_mask.dtype != torch.bool:
            raise TypeError(f"key_mask must be bool, got {key_mask.dtype}")
        key_mask = key_mask.contiguous()
    contract.check_dropout(dropout_p, seed, q)
    if bias is not None:
        check_bias(bias, q, max_seqlen_q, max_seqlen_k)
    kernels = backends.select(q, "attention" if bias is None else backends.BIASED_ATTENTION, max_seqlen_q)
    q, k, v = (t if t.stride(2) == 1 else t.contiguous() for t in (q, k, v))
    out, _ = matmul_precision.call(
        contract.call,
        kernels.attention_forward,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        head_dim**-0.5 if scale is None else float(scale),
        causal,
        key_mask,
        dropout_p,
        seed if dropout_p > 0 else None,
        bias,
    )
    return out


def check_bias(bias: Tensor, q: Tensor, max_seqlen_q: int, max_seqlen_k: int | None) -> None:
    check_tensor("bias", bias, (q.shape[1], None, None), q)
    if bias.shape[1] < max_seqlen_q or bias.shape[2] < max_seqlen_k:  # type: ignore[operator]
        raise ValueError(
            f"bias has shape {list(bias.shape)}, too small for {max_seqlen_q} queries, {max_seqlen_k} keys"
        )


def check_cu_seqlens(name: str, cu_seqlens: Tensor, rows: Tensor, max_seqlen: int | None) -> None:
    """max_seqlen: None: a sequence may be as long as it likes."""
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name} must have shape [sequences + 1]")
    check_device(name, cu_seqlens, rows)
    if cu_seqlens.device.type != "cpu" or type(cu_seqlens) is not Tensor or torch.compiler.is_compiling():
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0:
        raise ValueError(f"{name} must start at 0, got {ends[0]}")
    if ends[-1] != rows.shape[0]:
        raise ValueError(f"{name} must end at the number of rows, {rows.shape[0]}, got {ends[-1]}")
    for b, (start, end) in enumerate(pairwise(ends)):
        if start > end:
            raise ValueError(f"{name} falls from {start} to {end} at sequence {b}")
        if max_seqlen is not None and end - start > max_seqlen:
            raise ValueError(f"sequence {b} of {name} has {end - start} rows, more than the max_seqlen of {max_seqlen}")


def _fake_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, key_mask, dropout_p, seed, bias=None
):
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype)


def _fake_backward(
    grad_out, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, key_mask,
    dropout_p, seed, bias=None,
):  # fmt: skip
    of_bias = q.new_empty(0 if bias is None else bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), of_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, key_mask, dropout_p, seed, bias = (
        inputs
    )
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, key_mask, seed, bias)
    ctx.rest = (max_seqlen_q, max_seqlen_k, scale, causal, dropout_p)


def _again(kernels: Any, ctx: Any, saved: tuple[Any, ...]) -> tuple[Any, ...]:
    q, k, v, _, _, cu_seqlens_q, cu_seqlens_k, key_mask, seed, bias = saved
    max_seqlen_q, max_seqlen_k, scale, causal, dropout_p = ctx.rest
    out, lse = kernels.attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, key_mask, dropout_p, seed,
        bias,
    )  # fmt: skip
    return q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, key_mask, seed, bias


def _backward(kernels: backends.Kernels, ctx: Any, saved: tuple[Any, ...], grad_out: Tensor, *_: Any) -> Any:
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, key_mask, seed, bias = saved
    max_seqlen_q, max_seqlen_k, scale, causal, dropout_p = ctx.rest
    *grads, grad_bias = kernels.attention_backward(
        grad_out, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, key_mask,
        dropout_p, seed, bias,
    )  # fmt: skip
    return (*grads, *(None,) * 9, None if bias is None else grad_bias)


contract.register(
    "attention",
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    again=_again,
)
