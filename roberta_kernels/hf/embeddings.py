"""Word, position and token-type embeddings, LayerNorm and dropout in one op."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from roberta_kernels import ops
from roberta_kernels.hf.arguments import by_name
from roberta_kernels.hf.choice import any_skipped, dtype_reason, replaced
from roberta_kernels.hf.formulas import padded_positions
from roberta_kernels.hf.fusable import (
    dropout_of,
    fake,
    input_grads_hook,
    plain_dropout,
    plain_embedding,
    plain_layer_norm,
    tracing,
    transform,
)
from roberta_kernels.hf.state import state_of
from roberta_kernels.hf.tied_table import looked_up

if TYPE_CHECKING:
    HuggingFaceModule = Any
else:
    # What a mixin is put before; to a type checker it has whatever attributes the Hugging Face class has.
    HuggingFaceModule = object

_IDS = ("input_ids", "token_type_ids", "position_ids")


class FastEmbeddings(HuggingFaceModule):
    """RoBERTa's: positions are made from the ids, and stay at padding_idx where there is padding."""

    _rk_parameters: tuple[str, ...]  # names of forward's positional parameters, in order
    _rk_defaults: dict[str, Any]  # names of all its parameters -> their defaults

    def fused_reason(self) -> str | None:
        """Why the embeddings cannot be fused, or None."""
        modules = self._modules
        tables = [modules["word_embeddings"], modules["position_embeddings"]]
        if "token_type_embeddings" in modules:
            tables.append(modules["token_type_embeddings"])
        layer_norm, dropout = modules["LayerNorm"], modules["dropout"]
        if not all(plain_embedding(table) for table in tables):
            return "an embedding table is not a plain nn.Embedding"
        if not plain_layer_norm(layer_norm, tables[0].weight.shape[1]):
            return "LayerNorm is not a plain nn.LayerNorm"
        if not plain_dropout(dropout):
            return "dropout is not a plain nn.Dropout with p < 1"
        reason = transform() or replaced(self) or any_skipped(*tables, layer_norm, dropout)
        if reason is None and len({module.weight.dtype for module in (*tables, layer_norm)}) != 1:
            reason = "the tables and LayerNorm have different dtypes"
        return reason or dtype_reason(tables[0].weight.dtype, layer_norm)

    def _rk_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        named = by_name(self, args, kwargs)
        if named.get("input_ids") is None or named.get("inputs_embeds") is not None:
            return super().forward(*args, **kwargs)  # the words are not looked up
        reason = self.fused_reason() or self._unknown_argument(named)
        if reason is not None:
            state_of(self).fell_back(self, reason)
            return super().forward(*args, **kwargs)
        input_ids: Tensor = named["input_ids"]
        position_ids = named.get("position_ids")
        if position_ids is None:
            position_ids = self.positions(input_ids)
        batch, length = input_ids.shape
        if not tracing() and not fake(input_ids):
            self.check_positions(position_ids)
        token_type_ids = self.token_types(named.get("token_type_ids"), position_ids)
        hidden_states = self.embed(
            input_ids.reshape(-1),
            position_ids.expand(batch, length).reshape(-1),
            None if token_type_ids is None else token_type_ids.expand(batch, length).reshape(-1),
        )
        return hidden_states.view(batch, length, -1)

    def _unknown_argument(self, named: dict[str, Any]) -> str | None:
        """Which argument is given and unknown, or None: the number of tokens in a cache, say."""
        for name, value in named.items():
            if name not in (*_IDS, "inputs_embeds") and value is not None and value != self._rk_defaults.get(name):
                return f"{name} was given"
        return None

    def positions(self, input_ids: Tensor) -> Tensor:
        """Position ids `[B, S]` of ids `[B, S]`."""
        return padded_positions(input_ids, self.padding_idx)

    def token_types(self, given: Tensor | None, position_ids: Tensor) -> Tensor | None:
        """Token types `[B, S]` or `[1, S]`; None: all zero. Where none are given, those that a buffer of the embeddings
        has at the positions, as in the original: zeros, unless a user put others there.

        Raises RuntimeError, as the original does, where the buffer is shorter than the positions.
        """
        own = getattr(self, "token_type_ids", None)
        if given is not None or own is None:
            return given
        return own.to(position_ids.device).expand(position_ids.shape[0], -1).gather(1, position_ids)

    positions_stop = True  # at padding: all padded rows have one position

    def first_position(self) -> int:
        """What the position ids of a sequence count from."""
        return self.padding_idx + 1

    def check_positions(self, position_ids: Tensor) -> None:
        """Raises IndexError where a position `[B, S]` lies outside of the table, before any kernel runs.

        A batch of no more columns than the table has room for cannot hold one, and its values are not looked at (on a
        GPU that would be a synchronisation).
        """
        rows = self.position_embeddings.weight.shape[0]
        if position_ids.shape[1] + self.first_position() <= rows:
            return
        highest = int(position_ids.max())
        if highest >= rows:
            raise IndexError(
                f"index out of range in self: position {highest}, and there are {rows} position embeddings "
                "(a sequence has more tokens than the model has positions)"
            )

    def check_padding(self, input_ids: Tensor, token_type_ids: Tensor | None) -> None:
        """Raises IndexError where an id lies outside of its table, in a row too that no kernel will see. On a CPU; on a
        GPU, where the original ends in a device-side assertion, nothing is looked at."""
        types = self._modules.get("token_type_embeddings")
        for ids, table in ((input_ids, self.word_embeddings), (token_type_ids, types)):
            if ids is not None and table is not None and ids.is_cpu:
                lowest, highest = (int(value) for value in ids.aminmax())
                rows = table.weight.shape[0]
                if lowest < 0 or highest >= rows:
                    wrong = lowest if lowest < 0 else highest
                    raise IndexError(f"index out of range in self: id {wrong} at padding, and there are {rows}")

    def embed(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """`[T]` ids -> `[T, H]`."""
        word, position = self.word_embeddings, self.position_embeddings
        layer_norm, dropout_p = self.LayerNorm, dropout_of(self.dropout)
        types = self._modules.get("token_type_embeddings")
        table, ids, padding_idx = looked_up(word, input_ids)
        hidden_states = ops.embedding_layer_norm(
            ids,
            position_ids,
            None if types is None else token_type_ids,
            table,
            position.weight,
            # A family without token types adds nothing.
            word.weight.new_zeros(1, word.weight.shape[1]) if types is None else types.weight,
            layer_norm.weight,
            layer_norm.bias,
            eps=layer_norm.eps,
            dropout_p=dropout_p,
            seed=ops.draw_seeds(1, input_ids.device)[0] if dropout_p > 0 else None,
            word_padding_idx=padding_idx,
            position_padding_idx=position.padding_idx,
        )
        if (
            word._forward_hooks
            and torch.is_grad_enabled()
            and not hidden_states.requires_grad
            and any(input_grads_hook(hook) for hook in word._forward_hooks.values())
        ):
            hidden_states.requires_grad_(True)  # frozen tables: reentrant checkpointing needs an input with a gradient
        return hidden_states


class FastAbsoluteEmbeddings(FastEmbeddings):
    """BERT's: positions count from 0, through padding as well."""

    def positions(self, input_ids: Tensor) -> Tensor:
        """`[1, S]`."""
        return self.position_ids[:, : input_ids.shape[1]]

    positions_stop = False

    def first_position(self) -> int:
        return 0
