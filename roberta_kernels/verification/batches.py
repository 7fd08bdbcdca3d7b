"""Batches to verify a model on: made up from its configuration, or completed with what its task asks for."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

from roberta_kernels.verification.report import VerificationError

_LENGTHS = (40, 27, 16, 9, 5, 3, 2)  # of the sequences of a generated batch, in tokens


def generated_batch(model: nn.Module) -> dict[str, Any]:
    """Random token ids in sequences of mixed lengths, padded on the right, with what else the model's task asks for."""
    config: Any = getattr(model, "config", None)
    source = getattr(config, "encoder", None) or config
    vocabulary, positions = getattr(source, "vocab_size", None), getattr(source, "max_position_embeddings", None)
    if not isinstance(vocabulary, int) or not isinstance(positions, int):
        raise VerificationError(
            f"no batch can be made up for {type(model).__name__}: its configuration has no vocab_size or "
            "max_position_embeddings; pass a batch"
        )
    pad = _id(source, "pad_token_id", 1)
    longest = max(1, min(_LENGTHS[0], positions - pad - 1))
    lengths = sorted({max(1, length * longest // _LENGTHS[0]) for length in _LENGTHS}, reverse=True)
    generator = torch.Generator().manual_seed(0)
    first, last = _id(source, "bos_token_id", 0), _id(source, "eos_token_id", 2)
    words = torch.tensor([i for i in range(vocabulary) if i not in (pad, first, last)] or [first])
    ids = torch.full((len(lengths), longest), pad)
    for row, length in enumerate(lengths):
        ids[row, :length] = words[torch.randint(len(words), (length,), generator=generator)]
        ids[row, length - 1] = last
        ids[row, 0] = first
    mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    batch = complete_batch(model, ids, mask.long())
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        batch |= {"decoder_input_ids": ids.flip(0), "decoder_attention_mask": mask.flip(0).long()}
        batch.pop("labels", None)
    return batch


def complete_batch(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
    """The two, `[B, S]`, as this model's task takes them, with labels where the task is known."""
    unwrap: Any = getattr(model, "get_base_model", None)
    base: Any = unwrap() if unwrap is not None else model
    task = re.search(r"For([A-Za-z]+)$", type(base).__name__)
    known = task.group(1) if task else ""
    config = base.config
    generator = torch.Generator().manual_seed(1)
    batch: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    rows, labels = len(input_ids), max(1, getattr(config, "num_labels", 2))
    real = attention_mask.bool()
    if known in ("MaskedLM", "CausalLM"):
        batch["labels"] = input_ids.masked_fill(~real, -100)
    elif known == "TokenClassification":
        batch["labels"] = torch.randint(labels, input_ids.shape, generator=generator).masked_fill(~real, -100)
    elif known == "SequenceClassification":
        kind = getattr(config, "problem_type", None) or ("regression" if labels == 1 else "single_label_classification")
        if kind == "single_label_classification":
            batch["labels"] = torch.randint(labels, (rows,), generator=generator)
        else:
            dtype = next(base.parameters()).dtype
            shape = (rows,) if kind == "regression" and labels == 1 else (rows, labels)
            batch["labels"] = torch.rand(shape, generator=generator).round().to(dtype)
    elif known == "QuestionAnswering":
        ends = attention_mask.sum(1) - 1
        batch |= {"start_positions": ends // 2, "end_positions": ends}
    elif known == "MultipleChoice":
        pairs = rows // 2 * 2
        if pairs == 0:
            raise VerificationError("a multiple-choice model needs two sequences or more")
        batch = {key: value[:pairs].reshape(pairs // 2, 2, -1) for key, value in batch.items()}
        batch["labels"] = torch.randint(2, (pairs // 2,), generator=generator)
    return batch


def _id(config: Any, name: str, default: int) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value >= 0 else default


def describe(arguments: dict[str, Any]) -> str:
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() in (2, 3):
        rows = mask.numel() // mask.shape[-1]
        return f"{rows} sequences, {int(mask.bool().sum())} real tokens of {mask.numel()}"
    tensor = next((v for v in arguments.values() if isinstance(v, Tensor)), None)
    return f"a batch of shape {list(tensor.shape)}" if tensor is not None else "an empty batch"
