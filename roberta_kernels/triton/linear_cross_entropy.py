"""cross_entropy(x @ weight^T + bias, labels), without the logits `[T, V]`.

The products are cuBLAS's, over a chunk of the vocabulary at a time (2^25 logits: 64 MB in bfloat16); what lies between
them is here. Forward: a program owns a row of the chunk, walks it once, and keeps for each of BLOCK lanes the largest
logit and the sum of exponentials above it (Milakov and Gimelshein 2018), which it then puts together with those of the
chunks before. So a logit is written once and read once. Backward: the chunk is multiplied again, and a program turns
BLOCK logits of a row into their gradient, (softmax - onehot) * grad_loss, in place. From that come, by cuBLAS, the
chunk's rows of weight's gradient, written once, and its share of x's gradient, added in float32 in the order of chunks:
no atomics.

8 T H V flops in all for 2 + 4 passes over the logits; with H = 768 the products take longer than the passes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from roberta_kernels.triton import device as device_facts
from roberta_kernels.triton.vocabulary import chunks

_BLOCK = 1024


@triton.jit(do_not_specialize=["rows", "first", "words", "stride16"])
def linear_cross_entropy_forward_kernel(
    logits_ptr,  # [T, stride]: those of the words from `first` on, and what is not read
    bias_ptr,  # [V], or None
    labels_ptr,  # [T]
    statistics_ptr,  # [2, T] float32: largest logit, sum of exp(logit - largest)
    at_label_ptr,  # [T] float32: the label's logit
    rows,
    first,
    words,
    stride16,  # the stride over 16: so that loads are known to be aligned
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    stride = stride16 * 16
    logits_row = logits_ptr + row * stride
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, words, BLOCK):
        word = start + tl.arange(0, BLOCK)
        inside = word < words
        x = tl.load(logits_row + word, mask=word < stride, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            x += tl.load(bias_ptr + first + word, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x, float("-inf"))
        larger = tl.maximum(largest, x)
        shift = tl.where(larger > float("-inf"), larger, 0.0)
        total = total * tl.exp(largest - shift) + tl.exp(x - shift)
        largest = larger
    largest_ptr = statistics_ptr + row
    sum_ptr = largest_ptr + rows
    before = tl.load(largest_ptr)
    most = tl.maximum(tl.max(largest, 0), before)
    shift = tl.where(most > float("-inf"), most, 0.0)
    tl.store(sum_ptr, tl.sum(total * tl.exp(largest - shift), 0) + tl.load(sum_ptr) * tl.exp(before - shift))
    tl.store(largest_ptr, most)
    label = tl.load(labels_ptr + row) - first
    here = (label >= 0) & (label < words)
    at_label = tl.load(logits_row + label, mask=here, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        at_label += tl.load(bias_ptr + first + label, mask=here, other=0.0).to(tl.float32)
    tl.store(at_label_ptr + row, at_label, mask=here)


@triton.jit(do_not_specialize=["rows", "first", "words", "stride16", "ignore_index"])
def linear_cross_entropy_backward_kernel(
    logits_ptr,  # [T, stride]: those of the words from `first` on; their gradient afterwards
    bias_ptr,  # [V], or None
    labels_ptr,  # [T]
    statistics_ptr,  # [2, T] float32: largest logit, log(sum(exp(logit - largest)))
    grad_loss_ptr,  # [T] float32
    rows,
    first,
    words,
    stride16,
    ignore_index,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    stride = stride16 * 16
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = word < words
    here = logits_ptr + row * stride + word
    x = tl.load(here, mask=word < stride, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + first + word, mask=inside, other=0.0).to(tl.float32)
    label = tl.load(labels_ptr + row)
    p = tl.exp((x - tl.load(statistics_ptr + row)) - tl.load(statistics_ptr + rows + row))
    p = tl.where(word == label - first, p - 1.0, p)
    # Beside the words too there is a number: products of odd widths on a CPU read it, and multiply it with zero.
    grad = tl.where(inside & (label != ignore_index), p * tl.load(grad_loss_ptr + row), 0.0)
    tl.store(here, grad.to(logits_ptr.dtype.element_ty), mask=word < stride)


def linear_cross_entropy_forward(
    x: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [T] int64
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """(loss `[T]`, statistics `[2, T]`: of each row the largest logit, and log(sum(exp(z - largest))))."""
    rows = x.shape[0]
    x, weight, labels = x.contiguous(), weight.contiguous(), labels.contiguous()
    statistics = torch.empty((2, rows), dtype=torch.float32, device=x.device)
    largest, total = statistics.unbind(0)
    largest.fill_(float("-inf"))
    total.zero_()
    # A label outside of the vocabulary is in no chunk: its loss stays nan.
    at_label = torch.full((rows,), float("nan"), dtype=torch.float32, device=x.device)
    if rows > 0:
        with device_facts.on_device(x):
            for first, some, room in chunks(x, weight):
                logits = room[:, : some.shape[0]]
                torch.mm(x, some.t(), out=logits)
                linear_cross_entropy_forward_kernel[(rows,)](
                    logits, bias, labels, statistics, at_label, rows, first, some.shape[0], logits.stride(0) // 16,
                    BLOCK=_BLOCK, num_warps=4,
                )  # fmt: skip
    total.log_()
    return torch.where(labels == ignore_index, 0.0, (largest - at_label) + total), statistics


def linear_cross_entropy_backward(
    grad_loss: Tensor,  # [T]
    x: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [T] int64
    statistics: Tensor,  # [2, T]
    ignore_index: int,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight (empty unless asked for) and bias (empty without one)."""
    rows = x.shape[0]
    grad_weight = torch.empty_like(weight) if weight_gradient else weight.new_empty(0)
    grad_bias = x.new_empty(0) if bias is None else torch.empty_like(bias)
    if rows == 0:
        return torch.empty_like(x), grad_weight.zero_(), grad_bias.zero_()
    x, weight, labels, grad_loss = x.contiguous(), weight.contiguous(), labels.contiguous(), grad_loss.contiguous()
    statistics = statistics.contiguous()
    grad_x = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    with device_facts.on_device(x):
        for first, some, room in chunks(x, weight):
            words = some.shape[0]
            logits = room[:, :words]
            torch.mm(x, some.t(), out=logits)
            linear_cross_entropy_backward_kernel[(rows, triton.cdiv(words, _BLOCK))](
                logits, bias, labels, statistics, grad_loss, rows, first, words, logits.stride(0) // 16, ignore_index,
                BLOCK=_BLOCK, num_warps=4,
            )  # fmt: skip
            grad_x += torch.mm(logits, some)
            if weight_gradient:
                torch.mm(logits.t(), x, out=grad_weight[first : first + words])
            if bias is not None:
                grad_bias[first : first + words] = logits.sum(0, dtype=torch.float32)
    return grad_x.to(x.dtype), grad_weight, grad_bias
