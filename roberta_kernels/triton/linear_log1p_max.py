"""max over the rows of a sequence of log1p(relu(x @ weight^T + bias)), without the logits `[T, V]`.

The products are cuBLAS's, over a chunk of the vocabulary at a time, as in linear_cross_entropy.py. Forward: a program
owns BLOCK words of a sequence, walks its rows down the chunk, each of which is read once and contiguously, and writes
the largest value and its row. Backward: a program writes the gradients of those logits into a chunk of zeros (a logit
that is nobody's largest has none), from which come, by cuBLAS, the chunk's rows of weight's gradient, written once, and
its share of x's gradient, added in float32 in the order of chunks: no atomics.

6 T H V flops in all for 2 + 3 passes over the logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from roberta_kernels.triton import device as device_facts
from roberta_kernels.triton.vocabulary import chunks

_BLOCK = 256


@triton.jit(do_not_specialize=["first", "words", "stride16", "vocabulary"])
def linear_log1p_max_forward_kernel(
    logits_ptr,  # [T, stride]: those of the words from `first` on, and what is not read
    bias_ptr,  # [V], or None
    cu_seqlens_ptr,  # [B + 1]
    out_ptr,  # [B, V] float32
    rows_ptr,  # [B, V] int32
    first,
    words,
    vocabulary,
    stride16,  # the stride over 16: so that loads are known to be aligned
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    stride = stride16 * 16
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = word < words
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + first + word, mask=inside, other=0.0).to(tl.float32)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    top_row = tl.full([BLOCK], -1, tl.int32)
    start = tl.load(cu_seqlens_ptr + sequence)
    end = tl.load(cu_seqlens_ptr + sequence + 1)
    logits = logits_ptr + start.to(tl.int64) * stride + word
    for row in range(start, end):
        x = tl.load(logits, mask=word < stride, other=0.0).to(tl.float32)
        logits += stride
        if bias_ptr is not None:
            x += bias
        # As torch's max: of equal ones the first, and a NaN is larger than any number.
        larger = (x > top) | ((x != x) & (top == top))
        top = tl.where(larger, x, top)
        top_row = tl.where(larger, row, top_row)
    # log(1 + z), exact where 1 + z rounds (Goldberg 1991, theorem 4)
    near = 1.0 + top
    log1p = tl.where(near == 1.0, top, tl.log(near) * (top / (near - 1.0)))
    log1p = tl.where(top == float("inf"), top, log1p)
    here = sequence * vocabulary + first + word
    tl.store(out_ptr + here, tl.where(top <= 0.0, 0.0, log1p), mask=inside)
    tl.store(rows_ptr + here, top_row, mask=inside)


@triton.jit(do_not_specialize=["first", "words", "stride16", "vocabulary"])
def linear_log1p_max_backward_kernel(
    grad_logits_ptr,  # [T, stride]: zeros before; of the words from `first` on
    slopes_ptr,  # [B, V] float32
    rows_ptr,  # [B, V] int32
    first,
    words,
    vocabulary,
    stride16,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    stride = stride16 * 16
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = sequence * vocabulary + first + word
    row = tl.load(rows_ptr + here, mask=word < words, other=-1).to(tl.int64)
    slope = tl.load(slopes_ptr + here, mask=word < words, other=0.0)
    tl.store(grad_logits_ptr + row * stride + word, slope.to(grad_logits_ptr.dtype.element_ty), mask=row >= 0)


def linear_log1p_max_forward(
    x: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    cu_seqlens: Tensor,  # [B + 1] int32
) -> tuple[Tensor, Tensor]:
    """(out `[B, V]`, rows `[B, V]` int32: of x, the row that has the largest logit; -1 where there is none)."""
    x, weight, cu_seqlens = x.contiguous(), weight.contiguous(), cu_seqlens.contiguous()
    sequences, vocabulary = cu_seqlens.shape[0] - 1, weight.shape[0]
    out = torch.zeros((sequences, vocabulary), dtype=torch.float32, device=x.device)
    rows = torch.full((sequences, vocabulary), -1, dtype=torch.int32, device=x.device)
    if x.shape[0] == 0 or sequences == 0:
        return out, rows
    with device_facts.on_device(x):
        for first, some, room in chunks(x, weight):
            words = some.shape[0]
            logits = room[:, :words]
            torch.mm(x, some.t(), out=logits)
            linear_log1p_max_forward_kernel[(sequences, triton.cdiv(words, _BLOCK))](
                logits, bias, cu_seqlens, out, rows, first, words, vocabulary, logits.stride(0) // 16,
                BLOCK=_BLOCK, num_warps=2,  # four words a thread: 8 bytes a load
            )  # fmt: skip
    return out, rows


def linear_log1p_max_backward(
    grad_out: Tensor,  # [B, V]
    x: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    out: Tensor,  # [B, V]
    rows: Tensor,  # [B, V]
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight (empty unless asked for) and bias (empty without one)."""
    sequences, vocabulary = out.shape
    x, weight, rows = x.contiguous(), weight.contiguous(), rows.contiguous()
    slopes = torch.where((rows < 0) | (out == 0), 0.0, grad_out * (-out).exp()).contiguous()
    grad_weight = torch.zeros_like(weight) if weight_gradient else weight.new_empty(0)
    grad_bias = x.new_empty(0) if bias is None else slopes.sum(0).to(x.dtype)
    grad_x = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    if x.shape[0] > 0 and sequences > 0:
        with device_facts.on_device(x):
            for first, some, room in chunks(x, weight):
                words = some.shape[0]
                grad = room.zero_()[:, :words]
                linear_log1p_max_backward_kernel[(sequences, triton.cdiv(words, _BLOCK))](
                    grad, slopes, rows, first, words, vocabulary, grad.stride(0) // 16, BLOCK=_BLOCK, num_warps=4,
                )  # fmt: skip
                grad_x += torch.mm(grad, some)
                if weight_gradient:
                    torch.mm(grad.t(), x, out=grad_weight[first : first + words])
    return grad_x.to(x.dtype), grad_weight, grad_bias
