"""What is found out of a model with a head by running a tiny one (known_code.py): what it reads, what its loss is."""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from roberta_kernels.hf.formulas import IDS, dense, numbers, same, zeros_at_padding
from roberta_kernels.hf.structure import vocabulary_parts


@dataclass(frozen=True)
class HeadFacts:
    """reads_padding: whether padded rows of the base model's hidden states change what the head gives elsewhere.

    Of a masked-language-model head also: vocabulary: why its loss is not that of structure.vocabulary_parts, the mean
    over the rows with a label, or None. output: what makes its output. unread: arguments that do not change its loss.
    """

    reads_padding: bool
    vocabulary: str | None = None
    output: Any = None
    unread: frozenset[str] = frozenset()


def run_head(module: Any) -> tuple[HeadFacts, bool]:
    """Whether what stands behind the base model reads padded rows."""
    ids = torch.tensor(IDS)
    base = getattr(module, module.base_model_prefix)
    for shape in ((2, 5), (1, 2, 5)):  # of multiple choice
        try:
            given, mask = ids.view(shape), (ids != 1).long().view(shape)
            want = module(input_ids=given, attention_mask=mask)
            break
        except Exception:
            if len(shape) == 3:
                return HeadFacts(reads_padding=True), True  # for all that is known
    real = ids != 1

    def hook(_module: Any, _args: Any, out: Any) -> Any:
        hidden_states = zeros_at_padding(out[0], real)
        if isinstance(out, tuple):
            return (hidden_states, *out[1:])
        return type(out)(**{**out, "last_hidden_state": hidden_states})

    handle = base.register_forward_hook(hook)
    try:
        got = module(input_ids=given, attention_mask=mask)
    finally:
        handle.remove()
    return HeadFacts(reads_padding=not all(_same_rows(got[name], want[name], real) for name in want)), True


def run_masked_lm_head(module: Any) -> tuple[HeadFacts, bool]:
    facts, as_known = run_head(module)
    name = type(module).__name__
    ids = torch.tensor(IDS)
    mask, labels = (ids != 1).long(), torch.tensor([[3, -100, 4, -100, -100], [-100, 7, -100, -100, -100]])
    given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    try:
        out = module(**given)
        parts = vocabulary_parts(module)
        if parts is None:
            return replace(facts, vocabulary=f"{name} has another head than is known"), as_known
        rows = getattr(module, module.base_model_prefix)(input_ids=ids, attention_mask=mask)[0][labels != -100]
        for step in parts.steps:
            rows = step(rows)
        loss = F.cross_entropy(dense(parts.decoder, rows), labels[labels != -100])
        fields = {"loss": loss, "logits": None, "hidden_states": None, "attentions": None}
        if not same(out.loss, loss) or not set(fields) <= set(inspect.signature(type(out)).parameters):
            return replace(facts, vocabulary=f"the loss of {name} is another than is known"), as_known
    except Exception as error:
        return replace(
            facts, vocabulary=f"the parts of {name} cannot be run: {type(error).__name__}: {error}"
        ), as_known
    unread = set()
    for argument in ("num_items_in_batch",):  # which Trainer gives
        with contextlib.suppress(Exception):
            if same(module(**given, **{argument: torch.tensor(7)}).loss, loss):
                unread.add(argument)
    return replace(facts, output=type(out), unread=frozenset(unread)), as_known


def _same_rows(got: Any, want: Any, real: Tensor) -> bool:
    """At the real positions of a tensor of the shape `[batch, length, ...]`; of any other, everywhere."""
    if isinstance(want, Tensor) and want.shape[:2] == real.shape:
        return same(got[real], want[real])
    return same(got, want) if isinstance(want, Tensor) else True


def run_splade_pooling(module: Any) -> tuple[None, bool]:
    """Whether a SpladePooling as it is made gives the largest log1p(relu(logits)) of each sequence's real tokens."""
    logits = numbers((2, 5, 7), 100) * 4.0
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    want = logits.relu().log1p().masked_fill(mask[:, :, None] == 0, 0.0).amax(1)
    return None, same(module({"token_embeddings": logits.clone(), "attention_mask": mask})["sentence_embedding"], want)
