"""Masked language models whose logits nobody wants: `patch(return_logits=False)`.

With labels, their loss is wanted: the rows with a label (15%, as a rule) are taken from the base model's output; the
head's modules before the decoder run on them alone, and the decoder is ops.linear_cross_entropy, which never has all
logits at once. In a SparseEncoder, of each sequence the largest: real rows, and what follows makes them (sparse.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from roberta_kernels import backends, ops
from roberta_kernels.hf.arguments import by_name
from roberta_kernels.hf.choice import any_skipped, autocast_dtype
from roberta_kernels.hf.fusable import data_hidden, plain_linear, transform, unserved
from roberta_kernels.hf.heads import FastTokenHead
from roberta_kernels.hf.masks import RealRows
from roberta_kernels.hf.sparse import LargestLogits, real_rows
from roberta_kernels.hf.state import in_force, state_of
from roberta_kernels.hf.structure import vocabulary_parts
from roberta_kernels.hf.tied_table import shared
from roberta_kernels.ops.linear_cross_entropy import labelled_rows

_OUTPUTS = {"output_attentions", "output_hidden_states", "return_dict"}  # asked of the base model
_IGNORED = -100  # nn.CrossEntropyLoss' default, which these heads have


class FastMaskedLMHead(FastTokenHead):
    """A head with logits over the vocabulary and their loss."""

    _rk_head: Any  # known_code.HeadFacts of the Hugging Face class

    def _rk_forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = by_name(self, args, kwargs)
        state = state_of(self)
        pooled = kwargs.get("labels") is None
        if state.options.return_logits or (pooled and not state.pools_logits):
            return super()._rk_forward(**kwargs)
        with in_force(state):
            reason = self._rk_needs_logits(kwargs, "linear_log1p_max" if pooled else "linear_cross_entropy")
            reason = reason or (self._rk_not_pooled(kwargs) if pooled else self._rk_no_loss(kwargs))
            if reason is None:
                return self._rk_largest(kwargs) if pooled else self._rk_loss(kwargs)
        runs = "all logits are made" if pooled else "the loss is that of the original, with logits"
        state.fell_back(self, f"return_logits=False: {reason}", runs)
        return super()._rk_forward(**kwargs)

    def _rk_needs_logits(self, kwargs: dict[str, Any], op: str) -> str | None:
        """Why this op cannot stand in for the decoder and what follows, whatever is wanted, or None."""
        facts = self._rk_head
        if facts.vocabulary is not None:
            return facts.vocabulary
        known = self._rk_base_arguments | facts.unread | _OUTPUTS | {"labels"}
        strange = [name for name, value in kwargs.items() if value is not None and name not in known]
        if strange:
            return f"unknown argument {strange[0]}"
        parts = vocabulary_parts(self)
        if parts is None or not self._rk_own_parts():
            return "the head has parts, code or hooks of its own"
        decoder = parts.decoder
        if not plain_linear(decoder):
            return "the decoder is not a plain nn.Linear"
        weight = decoder.weight
        cast = autocast_dtype(weight.device.type) or weight.dtype
        reason = any_skipped(*parts.around, decoder) or transform() or unserved(cast, weight.device)
        if reason is not None:
            return reason
        try:
            backends.select(torch.empty(0, dtype=cast, device=weight.device), op, 0)
        except backends.BackendError as error:
            return str(error)
        return None

    def _rk_no_loss(self, kwargs: dict[str, Any]) -> str | None:
        """Why the loss of this call is not the mean over the rows with a label, or None."""
        if hasattr(self, "_loss_function"):
            return "a loss function of the user's own"
        given, labels = _given(kwargs), kwargs["labels"]
        if not isinstance(given, Tensor) or not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            return "labels or inputs of another kind"
        words = vocabulary_parts(self).decoder.weight.shape[0]  # type: ignore[union-attr]
        if labels.numel() != given.shape[:2].numel() or words != self.config.vocab_size:
            return "labels or a vocabulary of another size"
        return None

    def _rk_not_pooled(self, kwargs: dict[str, Any]) -> str | None:
        """Why the real rows of this call are not those that its mask names, or None. Looks at the mask."""
        given, mask = _given(kwargs), kwargs.get("attention_mask")
        if not isinstance(given, Tensor) or not isinstance(mask, Tensor) or mask.shape != given.shape[:2]:
            return "no mask [batch, length]"
        if data_hidden(mask):
            return "a graph is being traced"
        if mask.numel() == 0 or not ((mask == 0) | (mask == 1)).all():  # logits are multiplied by it
            return "an attention mask of other numbers than 0 and 1"
        return None

    def _rk_unread(self, mask: Tensor, kwargs: dict[str, Any]) -> RealRows | None:
        marked = super()._rk_unread(mask, kwargs)
        # Without logits nothing of padded rows goes back to the caller.
        return marked if marked is None or state_of(self).options.return_logits else replace(marked, returned=False)

    def _rk_base(self, kwargs: dict[str, Any]) -> Any:
        to_base = {name: value for name, value in kwargs.items() if name != "labels"}
        return getattr(self, self.base_model_prefix)(**to_base | {"return_dict": True})

    def _rk_loss(self, kwargs: dict[str, Any]) -> Any:
        parts: Any = vocabulary_parts(self)
        decoder, labels = parts.decoder, kwargs["labels"]
        with shared(decoder.weight, labels) as table:
            outputs = self._rk_base(self._rk_marked(kwargs))
        rows = outputs[0].flatten(0, 1)
        labels = labels.to(rows.device).view(-1)
        if not data_hidden(labels):
            found = labelled_rows(labels, _IGNORED)
            if found is not None:
                rows, labels = rows.index_select(0, found), labels.index_select(0, found)
        for step in parts.steps:
            rows = step(rows)
        cast = autocast_dtype(rows.device.type)
        dtype = rows.dtype if cast is None else cast
        bias = None if decoder.bias is None else decoder.bias.to(dtype)
        loss = ops.linear_cross_entropy(
            rows.to(dtype), table.decoder.to(dtype), labels, bias, ignore_index=_IGNORED, reduction="mean"
        )
        return self._rk_answer(kwargs, outputs, loss=loss.to(_loss_dtype(dtype, rows.device)), logits=None)

    def _rk_largest(self, kwargs: dict[str, Any]) -> Any:
        parts: Any = vocabulary_parts(self)
        mask = kwargs["attention_mask"]
        outputs = self._rk_base(kwargs | {"attention_mask": RealRows(mask)})
        indices, rows = real_rows(mask), outputs[0].flatten(0, 1)
        rows = rows if indices is None else rows.index_select(0, indices)
        for step in parts.steps:
            rows = step(rows)
        cast = autocast_dtype(rows.device.type)
        logits = LargestLogits(rows, indices, mask, parts.decoder, rows.dtype if cast is None else cast)
        return self._rk_answer(kwargs, outputs, loss=None, logits=logits)

    def _rk_answer(self, kwargs: dict[str, Any], outputs: Any, *, loss: Tensor | None, logits: Any) -> Any:
        states, attentions = outputs.get("hidden_states"), outputs.get("attentions")
        output = self._rk_head.output(loss=loss, logits=logits, hidden_states=states, attentions=attentions)
        return_dict = kwargs.get("return_dict")
        return_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()


def _given(kwargs: dict[str, Any]) -> Any:
    return kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]


def _loss_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """That of the original's loss, of logits of this dtype, under the autocast that is in force: torch is asked."""
    logits = torch.zeros((1, 1), dtype=dtype, device=device)
    return F.cross_entropy(logits, torch.zeros(1, dtype=torch.int64, device=device)).dtype
