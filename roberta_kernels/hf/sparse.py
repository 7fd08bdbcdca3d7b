"""SPLADE in sentence-transformers: a masked-language-model head whose logits nobody but SpladePooling reads, which
wants of each sequence and word the largest alone. `patch(return_logits=False)` of a SparseEncoder.

The head gives LargestLogits in the place of its logits; the pooling finds them by their type.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from roberta_kernels import ops
from roberta_kernels.hf.choice import replaced
from roberta_kernels.hf.fusable import transform
from roberta_kernels.hf.state import in_force, state_of

if TYPE_CHECKING:
    Abstract = Any
else:
    # A module of sentence-transformers is an ABC before it is an nn.Module, and a class can be changed only to one that
    # begins alike.
    Abstract = ABC

_LOGITS = "token_embeddings"  # where a SpladePooling looks for them
_MASK = "attention_mask"


@dataclass(frozen=True, eq=False)
class LargestLogits:
    """What the logits `[batch, length, words]` of a call would be made of.

    rows: `[T, H]`, at the real tokens of the mask `[batch, length]`. indices: their places in the flattened batch;
    None: all. decoder: the product with the vocabulary. dtype: of the logits.
    """

    rows: Tensor
    indices: Tensor | None
    mask: Tensor
    decoder: Any
    dtype: torch.dtype

    ndim = 3  # which the module between head and pooling looks at

    def largest(self) -> Tensor:
        """log1p(relu(logits)), the largest of each sequence and word: `[batch, words]`."""
        lengths = self.mask.ne(0).sum(1)
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        decoder, dtype = self.decoder, self.dtype
        bias = None if decoder.bias is None else decoder.bias.to(dtype)
        pooled = ops.linear_log1p_max(self.rows.to(dtype), decoder.weight.to(dtype), cu_seqlens, bias)
        return pooled.to(dtype)

    def logits(self) -> Tensor:
        """All of them; at padding, those of a row of zeros."""
        rows, (batch, length) = self.rows, self.mask.shape
        if self.indices is not None:
            rows = rows.new_zeros(batch * length, rows.shape[1]).index_copy(0, self.indices, rows)
        return self.decoder(rows).view(batch, length, -1)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{name} of logits that were not made: the model was patched with return_logits=False, and only a "
            "SpladePooling that was patched with it can do without; patch it again without that"
        )


def real_rows(mask: Tensor) -> Tensor | None:
    """Which rows of a flattened batch are real by its mask `[batch, length]`; None: all. One read on the host."""
    indices = mask.reshape(-1).nonzero().squeeze(1)
    return None if indices.shape[0] == mask.numel() else indices


class FastSpladePooling(Abstract):
    """log1p(relu(logits)) and the maximum of each sequence, from LargestLogits with the product as one op."""

    embedding_dimension: int | None  # the vocabulary's size, once it is known

    def _rk_forward(self, features: Any, *args: Any, **kwargs: Any) -> Any:
        found = features.get(_LOGITS) if isinstance(features, Mapping) else None
        if type(found) is not LargestLogits:
            return super().forward(features, *args, **kwargs)
        state = state_of(self)
        with in_force(state):
            reason = self._rk_other(found, features) or ("an unknown argument" if args or kwargs else None)
            if reason is not None:
                state.fell_back(self, reason, "all logits are made, and the original code runs")
                features[_LOGITS] = found.logits()
                return super().forward(features, *args, **kwargs)
            features["sentence_embedding"] = pooled = found.largest()
        del features[_LOGITS]  # nobody has them
        if self.embedding_dimension is None:
            self.embedding_dimension = pooled.shape[1]
        return features

    def _rk_other(self, found: LargestLogits, features: Any) -> str | None:
        """Why the maximum of log1p(relu(logits)) over the real tokens is not what is wanted, or None."""
        if (self.pooling_strategy, self.activation_function) != ("max", "relu"):
            return f"pooling_strategy={self.pooling_strategy!r}, activation_function={self.activation_function!r}"
        if features.get(_MASK) is not found.mask or "cu_seq_lens_q" in features:
            return "another mask than the model's"
        return replaced(self) or transform()
