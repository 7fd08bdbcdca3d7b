"""What the modules of a model allow, whatever the call: taken once, and kept as long as its Watch holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from roberta_kernels.hf import known_code
from roberta_kernels.hf.choice import replaced, skipped
from roberta_kernels.hf.embeddings import FastEmbeddings
from roberta_kernels.hf.fusable import input_grads_hook, own_forward, plain_linear, tracing
from roberta_kernels.hf.names import ATTENTION
from roberta_kernels.hf.state import memory_of
from roberta_kernels.hf.watch import Watch


@dataclass
class Survey:
    """What the modules of a model allow, whatever the call; each reason is None where nothing is in the way.

    watch: None in a graph that is being traced, and for tensors without data, to which the same applies.
    layers: of the encoder.
    original: why they cannot be handed sequences.
    interface: why their mask cannot be replaced, and through_interface whether transformers' attention interface leads
        to ours instead.
    padded: why they cannot run unpadded.
    tables: why the embeddings cannot be fused.
    own_embeddings: why what their original code gives cannot be unpadded. given_embeddings: where words are
        given to it.
    like: a tensor of the hidden states' dtype, device and width.
    embeddings_grad: whether what the embeddings give may need a gradient.
    dropout: whether any is active.
    routes: of the calls that were made, by route.Call. graphs: what was recorded of them (graphs.py).
    """

    watch: Watch | None
    layers: tuple[Any, ...]
    original: str | None
    interface: str | None
    through_interface: bool
    padded: str | None
    tables: str | None
    own_embeddings: str | None
    given_embeddings: str | None
    like: Tensor
    embeddings_grad: bool
    dropout: bool
    routes: dict[Any, Any] = field(default_factory=dict)
    graphs: Any = None


def survey_of(model: Any) -> Survey:
    """The survey that holds now."""
    memory = memory_of(model)
    survey = memory.survey
    if survey is None or not survey.watch.holds():
        survey = memory.survey = taken(model, Watch(model))
    return survey


def taken(model: Any, watch: Watch | None) -> Survey:
    """A survey of the modules as they are, which holds as long as the watch does."""
    facts: Any = model._rk_facts if watch is None else known_code.current_facts(model)
    modules = model._modules
    embeddings, encoder, project = modules["embeddings"], encoder_of(model), modules.get("embeddings_project")
    layers = tuple(encoder._modules["layer"]) if type(encoder) is facts.encoder else ()
    like = _like(embeddings) if project is None else project.weight.t()
    return Survey(
        watch=watch,
        layers=layers,
        original=_unknown_layers(model, facts, layers),
        interface=facts.masks,
        through_interface=model.config._attn_implementation == ATTENTION,
        padded=facts.unpadded or _padded_modules(model, encoder, layers, project),
        tables=skipped(embeddings) or embeddings.fused_reason() if isinstance(embeddings, FastEmbeddings) else None,
        own_embeddings=_own_embeddings(facts, embeddings, list(embeddings.parameters())),
        given_embeddings=_own_embeddings(facts, embeddings, _without_words(embeddings)),
        like=like,
        embeddings_grad=_wants_grad(embeddings) or (project is not None and _wants_grad(project)),
        dropout=any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in model.modules()),
    )


def encoder_of(model: Any) -> Any:
    """The module that has the layers."""
    return model._modules[model._rk_facts.encoder_name]


def _like(embeddings: Any) -> Tensor:
    """A tensor `[..., H]` of the dtype and device that the embeddings give, as far as their parameters tell."""
    norm, word = embeddings._modules.get("LayerNorm"), embeddings._modules.get("word_embeddings")
    found = getattr(norm, "weight", None) if norm is not None else getattr(word, "weight", None)
    return next(embeddings.parameters(), torch.empty(0)) if found is None else found


def _wants_grad(module: Any) -> bool:
    word = module._modules.get("word_embeddings")
    if word is not None and any(input_grads_hook(hook) for hook in word._forward_hooks.values()):
        return True
    return any(parameter.requires_grad for parameter in module.parameters())


def _unknown_layers(model: Any, facts: Any, layers: tuple[Any, ...]) -> str | None:
    """Whether the encoder and all its layers are what the fused code stands in for."""
    known = type(encoder_of(model)) is facts.encoder
    if known and not any(own_forward(layer) for layer in layers) and model._rk_known_layers(layers):
        return None
    return "an encoder or layer with code of its own"


def _padded_modules(model: Any, encoder: Any, layers: tuple[Any, ...], project: Any) -> str | None:
    pooler: Any = model._modules.get("pooler")
    reason = replaced(model) or (None if pooler is None else replaced(pooler))
    if reason is None and skipped(encoder):
        reason = "hooks on the encoder" if tracing() else skipped(encoder)
    if reason is None and any(skipped(layer) for layer in layers):
        reason = "hooks on a layer"
    if reason is None and project is not None and (skipped(project) or not plain_linear(project)):
        reason = "embeddings_project is not a plain nn.Linear"  # ELECTRA's, between tables and layers of two widths
    if reason is None and project is not None and project.weight.dtype != _like(model.embeddings).dtype:
        reason = "embeddings_project is of another dtype than the embeddings"
    return reason


def _without_words(embeddings: Any) -> list[Tensor]:
    parts = [part for name, part in embeddings.named_children() if name != "word_embeddings"]
    return [parameter for part in parts for parameter in part.parameters()]


def _own_embeddings(facts: Any, embeddings: Any, parameters: list[Tensor]) -> str | None:
    """Their original code runs on the padded batch, before unpadding. The layers take its dtype for granted.

    parameters: those that it reads.
    """
    if not isinstance(embeddings, FastEmbeddings) and type(embeddings) is not facts.embeddings:
        return "the embeddings have code of their own"
    dtype = _like(embeddings).dtype
    if any(parameter.dtype != dtype for parameter in parameters):
        return "embeddings of several dtypes"
    return None
