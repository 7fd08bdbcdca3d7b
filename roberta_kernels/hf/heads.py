"""Models with a head. Where it reads padded rows, which the unpadded layout leaves zero, it asks its base model for all
rows; for the rest it runs as it is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from roberta_kernels.hf.arguments import by_name
from roberta_kernels.hf.choice import replaced
from roberta_kernels.hf.embeddings import HuggingFaceModule
from roberta_kernels.hf.fusable import tracing
from roberta_kernels.hf.masks import AllRows
from roberta_kernels.hf.model import FastModel
from roberta_kernels.hf.state import state_of

# Arguments of a head that are no labels; what its base model takes is passed on to it.
_NO_LABELS = frozenset(
    {
        *("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "labels", "shift_labels"),
        *("encoder_hidden_states", "encoder_attention_mask", "logits_to_keep", "num_items_in_batch", "ignore_index"),
        "next_sentence_label",  # one for each sequence
        *("cu_seq_lens_q", "cu_seq_lens_k"),
    }
)


class FastHead(HuggingFaceModule):
    """A head that reads position 0 only: nothing to add to what its base model does, unless the release has it read
    more."""

    _rk_parameters: tuple[str, ...]
    _rk_base_arguments: frozenset[str]  # what the base model's forward takes
    _rk_always_reads: bool  # known_code.HeadFacts.reads_padding

    def _rk_forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = by_name(self, args, kwargs)
        mask = kwargs.get("attention_mask")
        if (
            isinstance(mask, Tensor)
            and state_of(self).options.packed == "auto"
            and any(isinstance(part, FastModel) for part in self._modules.values())
            and (self._rk_always_reads or self._rk_replaced() or self._rk_reads_padding(mask, kwargs))
        ):
            kwargs = kwargs | {"attention_mask": AllRows(mask)}
        return super().forward(**kwargs)

    def _rk_reads_padding(self, mask: Tensor, kwargs: dict[str, Any]) -> bool:
        return False

    def _rk_replaced(self) -> bool:
        """Whether code of the head is somebody else's, which may read what it likes."""
        return replaced(self) is not None or any(
            replaced(part) is not None for part in self._modules.values() if part is not None
        )


class FastTokenHead(FastHead):
    """A head with a loss over positions: a label may make it read a padded row."""

    _rk_shift = 0  # label i is compared with the logits of position i - shift

    def _rk_reads_padding(self, mask: Tensor, kwargs: dict[str, Any]) -> bool:
        if mask.dim() != 2:
            return False
        if self._rk_unknown_tensor(kwargs):
            return True
        labels = kwargs.get("labels")
        if labels is None:
            return False
        if tracing():
            return True  # for all a graph knows
        if hasattr(self, "_loss_function"):  # the user's own
            return bool((mask == 0).any())
        shift, length = self._rk_shift, mask.shape[1]
        if shift and kwargs.get("shift_labels") is not None:
            labels, shift = kwargs["shift_labels"], 0
        if labels.shape != mask.shape:
            return False
        read = labels[:, shift:].to(mask.device) != kwargs.get("ignore_index", -100)
        return bool((read & (mask[:, : length - shift] == 0)).any())

    def _rk_unknown_tensor(self, kwargs: dict[str, Any]) -> bool:
        """Whether a tensor was given that may be labels under another name."""
        known = self._rk_base_arguments
        return any(
            isinstance(value, Tensor) and name not in _NO_LABELS and name not in known for name, value in kwargs.items()
        )


class FastNextTokenHead(FastTokenHead):
    """Causal language modelling: label i is compared with the logits of position i - 1."""

    _rk_shift = 1


class FastSpanHead(FastTokenHead):
    """Question answering: a softmax over positions reads the logits of every row, padded ones too."""

    def _rk_reads_padding(self, mask: Tensor, kwargs: dict[str, Any]) -> bool:
        return mask.dim() == 2


class FastSummaryHead(FastTokenHead):
    """ELECTRA's multiple choice: takes position 0 of each choice, or what its config says, which may be padding."""

    def _rk_reads_padding(self, mask: Tensor, kwargs: dict[str, Any]) -> bool:
        return mask.dim() == 3 and self.sequence_summary.summary_type != "first"
