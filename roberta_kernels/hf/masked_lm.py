"""Masked language models whose loss is wanted and whose logits are not: `patch(return_logits=False)`.

The rows with a label (15%, as a rule) are taken from the base model's output; the head's modules before the decoder run
on them alone, and the decoder is ops.linear_cross_entropy, which never has all logits at once.
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
from roberta_kernels.hf.state import in_force, state_of
from roberta_kernels.hf.structure import vocabulary_parts
from roberta_kernels.ops.linear_cross_entropy import labelled_rows

_OUTPUTS = {"output_attentions", "output_hidden_states", "return_dict"}  # asked of the base model
_IGNORED = -100  # nn.CrossEntropyLoss' default, which these heads have


class FastMaskedLMHead(FastTokenHead):
    """A head with logits over the vocabulary and their loss."""

    _rk_head: Any  # known_code.HeadFacts of the Hugging Face class

    def _rk_forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = by_name(self, args, kwargs)
        state = state_of(self)
        if kwargs.get("labels") is None or state.options.return_logits:
            return super()._rk_forward(**kwargs)
        with in_force(state):
            reason = self._rk_needs_logits(kwargs)
            if reason is None:
                return self._rk_loss(kwargs)
        state.fell_back(self, f"return_logits=False: {reason}", "the loss is that of the original, with logits")
        return super()._rk_forward(**kwargs)

    def _rk_needs_logits(self, kwargs: dict[str, Any]) -> str | None:
        """Why the loss cannot be had without the logits, or None."""
        facts = self._rk_head
        if facts.vocabulary is not None:
            return facts.vocabulary
        known = self._rk_base_arguments | facts.unread | _OUTPUTS | {"labels"}
        strange = [name for name, value in kwargs.items() if value is not None and name not in known]
        if strange:
            return f"unknown argument {strange[0]}"
        if hasattr(self, "_loss_function"):
            return "a loss function of the user's own"
        parts = vocabulary_parts(self)
        if parts is None or not self._rk_own_parts():
            return "the head has parts, code or hooks of its own"
        decoder = parts.decoder
        if not plain_linear(decoder):
            return "the decoder is not a plain nn.Linear"
        weight, labels = decoder.weight, kwargs["labels"]
        cast = autocast_dtype(weight.device.type) or weight.dtype
        reason = any_skipped(*parts.around, decoder) or transform() or unserved(cast, weight.device)
        if reason is not None:
            return reason
        given = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        if not isinstance(given, Tensor) or not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            return "labels or inputs of another kind"
        if labels.numel() != given.shape[:2].numel() or weight.shape[0] != self.config.vocab_size:
            return "labels or a vocabulary of another size"
        try:
            backends.select(torch.empty(0, dtype=cast, device=weight.device), "linear_cross_entropy", 0)
        except backends.BackendError as error:
            return str(error)
        return None

    def _rk_unread(self, mask: Tensor, kwargs: dict[str, Any]) -> RealRows | None:
        marked = super()._rk_unread(mask, kwargs)
        # Without logits nothing of padded rows goes back to the caller.
        return marked if marked is None or state_of(self).options.return_logits else replace(marked, returned=False)

    def _rk_loss(self, kwargs: dict[str, Any]) -> Any:
        parts: Any = vocabulary_parts(self)
        decoder, labels = parts.decoder, kwargs["labels"]
        to_base = {name: value for name, value in self._rk_marked(kwargs).items() if name != "labels"}
        outputs = getattr(self, self.base_model_prefix)(**to_base | {"return_dict": True})
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
            rows.to(dtype), decoder.weight.to(dtype), labels, bias, ignore_index=_IGNORED, reduction="mean"
        )
        output = self._rk_head.output(
            loss=loss.to(_loss_dtype(dtype, rows.device)),
            logits=None,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )
        return_dict = kwargs.get("return_dict")
        return_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()


def _loss_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """That of the original's loss, of logits of this dtype, under the autocast that is in force: torch is asked."""
    logits = torch.zeros((1, 1), dtype=dtype, device=device)
    return F.cross_entropy(logits, torch.zeros(1, dtype=torch.int64, device=device)).dtype
