"""The model of encode(): its encoder, run on rows of token ids, pooled; and what identifies it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from roberta_kernels import backends
from roberta_kernels.encoding.sources import EncodingError
from roberta_kernels.hf.masks import RealRows
from roberta_kernels.hf.model import FastModel
from roberta_kernels.hf.state import PatchState, attached
from roberta_kernels.patching import is_patched, patch, unpatch

POOLINGS = ("mean", "cls", "max")


def encoder_of(model: nn.Module) -> Any:
    """The bare encoder of a transformers model.

    A wrapper is refused: what it does around the encoder (prompts, a pooling of its own) would be left out in silence.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"encode needs a transformers model or a SentenceTransformer, not {type(model).__name__}; pass the one "
            "inside it (cross_encoder.model, peft_model.merge_and_unload())"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise EncodingError(f"{type(model).__name__} is an encoder and a decoder; pass its encoder")
    return model.base_model


def longest_input(model: Any, tokenizer: Any = None) -> int:
    """The most tokens that the model has positions for, and that its tokenizer, if given, allows."""
    table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    if isinstance(table, nn.Embedding):
        # RoBERTa's positions begin after the padding's.
        longest = table.weight.shape[0] - (0 if table.padding_idx is None else table.padding_idx + 1)
    else:
        longest = getattr(model.config, "max_position_embeddings", 512)
    return max(1, min(longest, getattr(tokenizer, "model_max_length", longest)))


@contextlib.contextmanager
def running(model: nn.Module, patched: bool, backend: str, quantization: str | None) -> Iterator[list[str]]:
    """The model in evaluation mode and patched where asked for; afterwards all is as before. Gives why it runs on its
    original code, if it does."""
    modes = [(module, module.training) for module in model.modules()]
    patched_here = patched and not is_patched(model)
    with backends.backend(backend) if backend != "auto" else contextlib.nullcontext(), torch.no_grad():
        reasons = [] if is_patched(model) else ["patch=False"]
        if patched_here:
            report = patch(model, quantization=quantization)
            reasons = [] if report else sorted({left.reason for left in report.left})
        try:
            model.eval()
            yield reasons
        finally:
            for module, training in modes:
                module.training = training
            if patched_here:
                unpatch(model)


def probe(base: Any, pad: int, original: list[str]) -> tuple[int, bool, list[str]]:
    """The width of its embeddings, whether it leaves padding out, and why not: from two rows, one of them padded."""
    token = 1 if pad == 0 else 0
    state = attached(base)
    before = Counter() if state is None else _detours(state)
    hidden, _ = _hidden(base, [np.array([token, token], np.int32), np.array([token], np.int32)], pad)
    if state is None:
        return hidden.shape[2], False, original
    detours = list(_detours(state) - before)
    return hidden.shape[2], not detours, detours


def _detours(state: PatchState) -> Counter[str]:
    return state.padded + Counter(state.reasons())


def kernels(base: Any) -> str:
    """What computes: another backend rounds otherwise, so that a run is continued with the same only."""
    state = attached(base)
    if state is None:
        return "original"
    options = state.options
    serving = str(backends.serving(next(base.parameters()))) if options.backend == "auto" else options.backend
    return serving if options.quantization is None else f"{serving}, {options.quantization} weights"


def _hidden(base: Any, rows: list[np.ndarray], pad: int) -> tuple[Tensor, Tensor]:
    """Last hidden states `[B, S, H]` of rows of token ids, and which are real, bool `[B, S]`."""
    lengths = np.array([len(row) for row in rows])
    real = np.arange(lengths.max())[None] < lengths[:, None]
    ids = np.full(real.shape, pad, np.int64)
    ids[real] = np.concatenate(rows)
    device = next(base.parameters()).device
    mask = torch.from_numpy(real).to(device)
    given: Any = RealRows(mask.long()) if isinstance(base, FastModel) else mask.long()  # `pool` reads no other
    output = base(input_ids=torch.from_numpy(ids).to(device), attention_mask=given)
    return output.last_hidden_state, mask


def embed(base: Any, rows: list[np.ndarray], pad: int, pooling: str, normalize: bool) -> Tensor:
    hidden, real = _hidden(base, rows, pad)
    return pool(hidden, real, pooling, normalize)


def pool(hidden: Tensor, real: Tensor, pooling: str = "mean", normalize: bool = False) -> Tensor:
    """Embeddings `[B, H]` in float32 (float64 of float64) from token vectors `[B, S, H]`; real: bool `[B, S]`, with a
    real token in each row, "cls" takes position 0."""
    hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
    if pooling == "cls":
        pooled = hidden[:, 0]
    elif pooling == "max":
        pooled = hidden.masked_fill(~real[..., None], -torch.inf).amax(1)
    else:
        pooled = _sums(hidden[real], real.sum(1)) / real.sum(1, keepdim=True)
    return nn.functional.normalize(pooled, dim=1) if normalize else pooled


def _sums(rows: Tensor, lengths: Tensor) -> Tensor:
    """The sum of each sequence's rows `[T, H]`, one after the other: in an order that no other sequence and no padding
    changes, which `sum` over a padded batch would."""
    if not rows.is_cpu:
        return torch.segment_reduce(rows, "sum", lengths=lengths, axis=0)
    batch = lengths.shape[0]
    owner = torch.repeat_interleave(torch.arange(batch), lengths)
    return rows.new_zeros(batch, rows.shape[1]).index_add_(0, owner, rows)


def model_fingerprint(base: Any) -> str:
    """Of the configuration and every weight but the pooler's, which is not read, and often random: not in the files."""
    config = base.config.to_dict()
    for irrelevant in ("_name_or_path", "transformers_version"):
        config.pop(irrelevant, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, value in base.state_dict().items():
        if name.startswith("pooler."):
            continue
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:
        content = json.loads(fast.to_str())
        for of_the_last_call in ("truncation", "padding"):
            content.pop(of_the_last_call, None)
    else:
        content = [type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def patched_quantization(base: Any) -> str | None:
    """What the weights of a patched model are rounded to."""
    state = attached(base)
    return None if state is None else state.options.quantization
