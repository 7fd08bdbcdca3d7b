"""Models with a head. Where a head is known to leave padded rows alone, it says so to its base model, which need not
compute them then; for the rest it runs as it is."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from roberta_kernels.hf.arguments import by_name
from roberta_kernels.hf.choice import replaced
from roberta_kernels.hf.embeddings import HuggingFaceModule
from roberta_kernels.hf.fusable import foreign_readers, tracing
from roberta_kernels.hf.masks import RealRows
from roberta_kernels.hf.model import FastModel

# Arguments of a head that are no labels; what its base model takes is passed on to it.
_NO_LABELS = frozenset(
    {
        *("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "labels", "shift_labels"),
        *("encoder_hidden_states", "encoder_attention_mask", "logits_to_keep", "num_items_in_batch", "ignore_index"),
        "next_sentence_label",  # one for each sequence
        *("cu_seq_lens_q", "cu_seq_lens_k"),
    }
)
_ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")


class FastHead(HuggingFaceModule):
    """A head that reads position 0 only, unless the release has it read more."""

    _rk_parameters: tuple[str, ...]
    _rk_base_arguments: frozenset[str]  # what the base model's forward takes
    _rk_always_reads: bool  # known_code.HeadFacts.reads_padding
    _rk_parts: dict[str, type] | None  # classes of what stands beside the base model; None: not known

    def _rk_forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(**self._rk_marked(by_name(self, args, kwargs)))

    def _rk_marked(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A call's arguments, in which the mask says so where the head leaves padded rows alone."""
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and not self._rk_always_reads and self._rk_own_parts():
            marked = self._rk_unread(mask, kwargs)
            if marked is not None:
                return kwargs | {"attention_mask": marked}
        return kwargs

    def _rk_unread(self, mask: Tensor, kwargs: dict[str, Any]) -> RealRows | None:
        """Where the head leaves padded rows alone, what says so to the base model."""
        return RealRows(mask)

    def _rk_own_parts(self) -> bool:
        """Whether the head is made of what its class is made of: other code, other parts and hooks on them may read
        what they like."""
        known = self._rk_parts
        if known is None or replaced(self) is not None:
            return False
        based = False
        parts: dict[str, Any] = self._modules
        for name, part in parts.items():
            if isinstance(part, FastModel):
                based = True
                pooler = part._modules.get("pooler")
                if foreign_readers(part) or (pooler is not None and foreign_readers(pooler)):
                    return False
            elif part is not None and not type(part).__module__.startswith("peft."):  # an adapter of a known part
                inside: dict[str, Any] = dict(part.named_modules(prefix=name))
                for inner, own in inside.items():
                    cls: Any = type(own)
                    cls = getattr(cls, "_rk_original", cls)
                    if replaced(own) or foreign_readers(own) or not _same_kind(known.get(inner), cls):
                        return False
        return based


def _same_kind(known: type | None, cls: type) -> bool:
    """Whether a part is what its class has there, but for what a config chooses: its dropout, its activation."""
    if known is None or known is cls:
        return known is cls
    drops = (nn.Dropout, nn.Identity)
    return (known in drops and cls in drops) or (known.__module__ in _ACTIVATIONS and cls.__module__ in _ACTIVATIONS)


class FastTokenHead(FastHead):
    """A head with logits, and a loss over them, for each position. Given labels, the loss is all that is known to be
    read; without, the caller has the logits, and may take a loss of his own."""

    _rk_shift = 0  # label i is compared with the logits of position i - shift

    def _rk_unread(self, mask: Tensor, kwargs: dict[str, Any]) -> RealRows | None:
        if mask.dim() != 2:
            return None
        reads = self._rk_reads_padding(mask, kwargs)
        return None if reads is True else RealRows(mask, returned=True, unless=None if reads is False else reads)

    def _rk_reads_padding(self, mask: Tensor, kwargs: dict[str, Any]) -> bool | Tensor:
        """Whether padded rows are read; a bool tensor of no dimension, which is not looked at here, where the labels
        tell."""
        labels = kwargs.get("labels")
        if labels is None or tracing() or self._rk_unknown_tensor(kwargs):
            return True
        if hasattr(self, "_loss_function"):  # the user's own
            return True
        shift, length = self._rk_shift, mask.shape[1]
        if shift and kwargs.get("shift_labels") is not None:
            labels, shift = kwargs["shift_labels"], 0
        if labels.shape != mask.shape:
            return False
        read = labels[:, shift:].to(mask.device) != kwargs.get("ignore_index", -100)
        return (read > mask[:, : length - shift].bool()).any()  # of two booleans, "and not"

    def _rk_unknown_tensor(self, kwargs: dict[str, Any]) -> bool:
        """Whether a tensor was given that may be labels under another name."""
        known = self._rk_base_arguments
        return any(
            isinstance(value, Tensor) and name not in _NO_LABELS and name not in known for name, value in kwargs.items()
        )


class FastNextTokenHead(FastTokenHead):
    """Causal language modelling: label i is compared with the logits of position i - 1."""

    _rk_shift = 1


class FastDiscriminatorHead(FastTokenHead):
    """ELECTRA's pretraining: its loss leaves masked positions out, whatever their label is."""

    def _rk_reads_padding(self, mask: Tensor, kwargs: dict[str, Any]) -> bool:
        return kwargs.get("labels") is None or self._rk_unknown_tensor(kwargs)


class FastSpanHead(FastHead):
    """Question answering: a softmax over positions reads the logits of every row, padded ones too."""

    def _rk_unread(self, mask: Tensor, kwargs: dict[str, Any]) -> RealRows | None:
        return None


class FastSummaryHead(FastHead):
    """ELECTRA's multiple choice: takes position 0 of each choice, or what its config says, which may be padding."""

    def _rk_unread(self, mask: Tensor, kwargs: dict[str, Any]) -> RealRows | None:
        return RealRows(mask) if self.sequence_summary.summary_type == "first" else None
