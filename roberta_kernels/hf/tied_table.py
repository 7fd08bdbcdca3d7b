"""One table that is both word embeddings and decoder (tied weights), in a call that makes a loss without logits: its
gradient is made once.

Left to autograd, the embeddings make a gradient `[V, H]` of the table, zeros but for the rows of the batch's words, and
the decoder's is another: two of them at the moment in which they are added, 0.77 GB each for 250,002 words of 768. Here
the embeddings get the rows of the batch's words alone, a table of their own; its gradient is as small, and is added
into the decoder's in place.

The head says by `shared` that both will be used; the embeddings, far below it in Hugging Face's own code, ask for it by
`looked_up`; the decoder by `TiedTable.decoder`. Whoever of them runs code that does not ask uses the parameter itself,
which is as right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from roberta_kernels.hf.fusable import data_hidden, tracing
from roberta_kernels.ops.contract import readable


class TiedTable:
    """A table `[V, H]` that a call uses twice. decoder: what is to be used as the decoder's weight."""

    __slots__ = ("decoder", "parameter")

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = self.decoder = parameter


# Of the call that this thread, or task, is in. Dynamo cannot read it, and needs not.
_of_call: ContextVar[TiedTable | None] = ContextVar("roberta_kernels_tied_table", default=None)


@contextlib.contextmanager
def shared(weight: Tensor, labels: Tensor) -> Iterator[TiedTable]:
    """In the block, weight `[V, H]` of a decoder is used as word embeddings too, if it is theirs.

    Whoever may not depend on data (`labels` is some of it), or has no gradient to make, gets the parameter itself. So
    does a GPU, where to find out which words a batch has would be a synchronisation.
    """
    table = TiedTable(weight)
    plain = type(weight) is nn.Parameter and weight.is_leaf and weight.is_cpu and weight.requires_grad
    if not plain or not torch.is_grad_enabled() or data_hidden(labels) or not readable(labels):
        yield table
        return
    token = _of_call.set(table)
    try:
        yield table
    finally:
        _of_call.reset(token)


def looked_up(word: nn.Embedding, ids: Tensor) -> tuple[Tensor, Tensor, int | None]:
    """What an op takes for word embeddings and ids `[T]`: (table, ids into it, its row that gets no gradient)."""
    table = None if tracing() else _of_call.get()
    if table is None or table.parameter is not word.weight or table.decoder is not word.weight or not ids.numel():
        return word.weight, ids, word.padding_idx
    words, places = torch.unique(ids, return_inverse=True)  # ascending
    first, last = int(words[0]), int(words[-1])
    if first < 0 or last >= word.weight.shape[0]:
        return word.weight, ids, word.padding_idx  # which the op refuses in its own words
    table.decoder, rows = _Uses.apply(word.weight, words)
    padding = None if word.padding_idx is None else (words == word.padding_idx).nonzero()
    return rows, places, int(padding) if padding is not None and len(padding) else None


class _Uses(torch.autograd.Function):
    """The two uses of a table `[V, H]`: itself, and its rows `[U, H]` at words `[U]`, each of which is there once."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(words)
        ctx.shape = table.shape
        return table.view_as(table), table.index_select(0, words)

    @staticmethod
    def backward(ctx: Any, grad_table: Tensor | None, grad_rows: Tensor | None) -> tuple[Tensor | None, None]:
        (words,) = ctx.saved_tensors
        if grad_rows is None:
            return grad_table, None
        if grad_table is None:  # of hidden states alone, say
            grad_table = grad_rows.new_zeros(ctx.shape)
        if torch.is_grad_enabled():  # create_graph
            return grad_table.index_add(0, words, grad_rows), None
        # The decoder's op has just made it, for the one use that it knows of: nobody else has it.
        return grad_table.index_add_(0, words, grad_rows), None
