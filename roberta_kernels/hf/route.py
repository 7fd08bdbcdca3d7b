"""The route of a call: decided once, before anything runs; what then runs it asks nothing more.

    Encoder          unpadded, all layers in one op call
    Unpadded         unpadded, layer by layer
    Padded           every row of the batch, through the model's original forward, layers fused
    ThroughInterface the same by way of transformers' attention interface: where a release lets nobody replace the
                     layers' mask, and where a decoder that was loaded with it has a key/value cache or cross-attention
    Original         the original attention; what else of a layer can be fused still is

A route follows from two things alone. `Call` is all that it depends on in a call; `Survey` (survey.py) is all that it
depends on in the modules. So the routes of a survey are kept by call.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from roberta_kernels.encoder_call import EncoderCall
from roberta_kernels.hf import encoder_layers
from roberta_kernels.hf.arguments import is_causal
from roberta_kernels.hf.choice import LayerChoice, autocast_dtype, layer_choice
from roberta_kernels.hf.embeddings import FastEmbeddings
from roberta_kernels.hf.fusable import (
    compiled,
    data_hidden,
    fake,
    tracing,
    transform,
    unserved,
)
from roberta_kernels.hf.graphs import Graphs, make_recorder
from roberta_kernels.hf.masks import RealRows
from roberta_kernels.hf.names import ATTENTION
from roberta_kernels.hf.same_attention import attention_difference
from roberta_kernels.hf.state import Options, state_of
from roberta_kernels.hf.survey import Survey, survey_of, taken
from roberta_kernels.quantized import QuantizedCall

# What a model's own forward, or transformers' around it, does with these is known, and is done on every route.
_HANDLED = frozenset(
    {
        *("input_ids", "attention_mask", "inputs_embeds", "encoder_hidden_states", "encoder_attention_mask"),
        *("output_attentions", "output_hidden_states", "return_dict", "use_cache", "is_causal", "num_items_in_batch"),
    }
)
# Where a decoder is handed its keys and values of former calls, by the name of the release.
_CACHES = frozenset({"cache", "past_key_values"})
_CACHED = "a key/value cache or cross-attention"
# What only flash attention reads, which takes the boundaries of several sequences in a row from them.
_FLASH = frozenset({"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"})


@dataclass(frozen=True)
class Original:
    reason: str


@dataclass(frozen=True)
class ThroughInterface:
    reason: str


@dataclass(frozen=True)
class Padded:
    """Every row, fused.

    reason: why not unpadded; None: only the data says why (`because`).
    choices: by id of a layer; None where each layer looks again: in a graph that is being traced, or when the
        embeddings may give another dtype than their parameters have. One is None where its layer alone does.
    zeros: whether padded rows come back as zeros, as in the unpadded layout.
    """

    reason: str | None
    choices: dict[int, Any] | None
    zeros: bool = False


@dataclass(frozen=True)
class Unpadded:
    """Of a batch with padding, its data may tell that another route is to be taken (padding.py).

    fused_embeddings: else their original code runs, on the padded batch. reads: READS. differ: why the padded rows of a
    sequence are not one row, or None where the data tells. padded: the route where all of them are to be computed.
    graphs: what records and replays it, or None; no_graphs says why, where that was asked for.
    """

    fused_embeddings: bool
    choices: dict[int, Any]
    reads: str
    differ: str | None
    padded: Padded | ThroughInterface | Original
    graphs: Graphs | None
    no_graphs: str | None


@dataclass(frozen=True)
class Encoder(Unpadded):
    call: EncoderCall | QuantizedCall


# Whether padded rows are read: by whoever it may be; by the caller alone, in what a head makes of them; not, position 0
# of a sequence excepted.
READS = ("all", "returned", "real")

Route = Original | ThroughInterface | Padded | Unpadded


# --- what a route depends on in a call --------------------------------------------------------------------------------


class Call(NamedTuple):
    """All that a route depends on in a call; each reason is None where nothing is in the way.

    original: why only the original attention can give what the call asks for.
    cached: why transformers' own code must hand out keys and values, to the fused attention by way of its interface.
    padded: why every row must be computed.
    reads: READS.
    positions: whether position ids were given.
    embeds: dtype of the inputs_embeds given in the place of input_ids; embeds_grad: whether they need a gradient.
    autocast: its dtype, if any.
    encoder: whose op can run layers, "cpu" or "cuda"; None: none can, and no_encoder says why.
    grad: whether gradients are recorded.
    """

    original: str | None
    cached: str | None
    padded: str | None
    reads: str
    positions: bool
    embeds: torch.dtype | None
    embeds_grad: bool
    autocast: torch.dtype | None
    encoder: str | None
    no_encoder: str | None
    grad: bool


def call_of(model: Any, survey: Survey, kwargs: dict[str, Any]) -> Call:
    """kwargs: all arguments of the model's forward, by name."""
    like, traced = survey.like, survey.watch is None
    mask: Any = kwargs.get("attention_mask")
    marked = type(mask) is RealRows
    embeds = kwargs.get("inputs_embeds")
    cached = _cached(model, kwargs)
    traced_reason = (None, "a graph is being traced")
    encoder, no_encoder = (
        traced_reason if traced else encoder_layers.op_backend(state_of(model).options, like, model._rk_biased)
    )
    return Call(
        original=_original_reason(model, kwargs, mask.attention_mask if marked else mask, cached),
        cached=_CACHED if cached and _switched(model) else None,
        padded=_padded_call(model, like, kwargs),
        reads=_reads(model, mask),
        positions=kwargs.get("position_ids") is not None,
        embeds=None if embeds is None else embeds.dtype,
        embeds_grad=embeds is not None and embeds.requires_grad,
        autocast=autocast_dtype(like.device.type),
        encoder=encoder,
        no_encoder=no_encoder,
        grad=torch.is_grad_enabled(),
    )


def _reads(model: Any, mask: Any) -> str:
    if state_of(model).options.padded_rows != "zeros" and type(mask) is RealRows:
        return "returned" if mask.returned else "real"
    return reads(model)


def reads(model: Any) -> str:
    """READS of a call whose padded rows nobody vouches for."""
    state = state_of(model)
    if state.options.padded_rows == "zeros":
        return "real"
    # Only encoders: a loss over a decoder's rows is taken by labels.
    return "returned" if state.known_reader and not is_causal(model) else "all"


def wants(model: Any, output: str, kwargs: dict[str, Any]) -> Any:
    """What the call asks of this output, as transformers' capture_outputs looks it up: a None given is a no."""
    return kwargs.get(output, getattr(model.config, output, False))


def _cached(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether keys and values of a decoder come from former calls, or go to later ones, or from an encoder."""
    if not is_causal(model):
        return False
    use_cache = model.config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
    given = any(kwargs.get(name) is not None for name in ("encoder_hidden_states", *_CACHES))
    return bool(use_cache) or given


def _switched(model: Any) -> bool:
    """Whether the model was loaded with attn_implementation="roberta_kernels"."""
    return model.config._attn_implementation == ATTENTION


def _original_reason(model: Any, kwargs: dict[str, Any], mask: Any, cached: bool) -> str | None:
    config = model.config
    if wants(model, "output_attentions", kwargs):
        return "attention weights were asked for"  # which the fused kernel never makes
    causal = kwargs.get("is_causal", getattr(config, "is_causal", None))
    if causal is not None and bool(causal) != is_causal(model):
        return f"is_causal={causal}"
    reason = _unknown_argument(model, kwargs)
    if reason is not None:
        return reason
    if cached:
        return None if _switched(model) else _CACHED
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        return "not one of input_ids and inputs_embeds"
    given: Any = ids if embeds is None else embeds
    if given.dim() != (2 if embeds is None else 3):
        return "input_ids is not [batch, length], or inputs_embeds not [batch, length, hidden]"
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != given.shape[:2]):
        return "the attention mask is not [batch, length]"
    if given.numel() == 0:
        return "an empty batch"
    return attention_difference(model, config._attn_implementation)


def _unknown_argument(model: Any, kwargs: dict[str, Any]) -> str | None:
    """Which argument is given (not None, not its default) and unknown, so that only the original code can take it."""
    flash = str(model.config._attn_implementation).startswith("flash_attention")
    defaults = model._rk_defaults
    for name, value in kwargs.items():
        if value is None or name in _HANDLED or value is defaults.get(name, False):
            continue
        if name in _CACHES and is_causal(model):
            continue
        if name in _FLASH:
            if flash:
                return f"{name} was given, which flash attention takes sequence boundaries from"
        elif name not in model._rk_known_arguments:
            return f"{name} was given"
    return None


def _padded_call(model: Any, like: Tensor, kwargs: dict[str, Any]) -> str | None:
    if asked := wants(model, "output_hidden_states", kwargs):
        return f"output_hidden_states={asked}"
    if not tracing() and not fake(like) and data_hidden(like):
        return "CUDA graph capture"
    return None


# --- the decision -----------------------------------------------------------------------------------------------------


def decide(model: Any, kwargs: dict[str, Any]) -> Route:
    """The route of a call of a model with a fast class. kwargs: all arguments of its forward, by name."""
    reason = transform()
    if reason is not None:
        return Original(reason)
    given = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    if tracing() or fake(given):
        survey = taken(model, None)
        return _decide(model, survey, call_of(model, survey, kwargs))
    survey = survey_of(model)
    call = call_of(model, survey, kwargs)
    route = survey.routes.get(call)
    if route is None:
        route = survey.routes[call] = _decide(model, survey, call)
    return route


def _decide(model: Any, survey: Survey, call: Call) -> Route:
    products = survey.like.dtype if call.autocast is None else call.autocast
    reason = call.original or survey.original or unserved(products, survey.like.device)
    if reason is not None:
        return Original(reason)
    if call.cached is not None:
        return ThroughInterface(call.cached)
    options = state_of(model).options
    fused = isinstance(model._modules["embeddings"], FastEmbeddings) and call.embeds is None
    unknown = _embeddings_reason(survey, call, fused)  # of which dtype the hidden states will be, say
    choices = model._rk_choices(survey, call, options)
    reason = model._rk_original_reason(survey, choices, unknown)
    if reason is not None:
        return Original(reason)
    handed = _handed(survey, choices) if unknown is None and survey.watch is not None else None
    reason = call.padded or survey.padded or unknown
    if reason is None:
        reason = next((choice.fused for choice in choices.values() if choice.fused is not None), None)
    if reason is not None:
        return _padded(survey, reason, handed)
    if survey.watch is None:
        return _padded(survey, "traced", handed, zeros=options.padded_rows == "zeros")
    differ, padded = _differ(model, survey, call, fused), _padded(survey, None, handed)
    call_all = _one_call(survey, call, choices, options)
    recorded = _graphs(model, survey, call, choices, options) if fused else (None, "the embeddings are not fused")
    if call_all is None:
        return Unpadded(fused, choices, call.reads, differ, padded, *recorded)
    return Encoder(fused, choices, call.reads, differ, padded, *recorded, call_all)


def _graphs(
    model: Any, survey: Survey, call: Call, choices: dict[int, LayerChoice], options: Options
) -> tuple[Graphs | None, str | None]:
    """What records such calls, and None; or None, and why they are not."""
    if options.cuda_graphs is not True:  # "auto": no card has measured it
        return None, None
    reason = None
    if call.grad:
        reason = "gradients are recorded (torch.no_grad() was not set)"
    elif call.autocast is not None:
        reason = "autocast"
    elif survey.dropout:
        reason = "dropout"
    elif model._rk_biased:
        reason = "a bias on the scores"
    elif any(c.attention.said or c.feed_forward.said or c.feed_forward.gelu is None for c in choices.values()):
        reason = "a part of a layer runs its own code"
    elif any(map(compiled, survey.layers)):
        reason = "a layer is compiled"
    if reason is None and survey.graphs is None:
        recorder = make_recorder(survey.like.device)
        if recorder is None:
            reason = "hidden states are not on a GPU"
        else:
            survey.graphs = Graphs(recorder)
    return (survey.graphs, None) if reason is None else (None, f"not recorded: {reason}")


def _differ(model: Any, survey: Survey, call: Call, fused: bool) -> str | None:
    """Why the padded rows of a sequence are not one row, whatever the data, or None."""
    if model._rk_biased:
        return "the bias on the scores makes padded rows differ"
    if survey.dropout:
        return "dropout makes padded rows differ"
    if call.embeds is not None:
        return "inputs_embeds make padded rows differ"
    if not fused or not (call.positions or model._modules["embeddings"].positions_stop):
        return "position embeddings go on through padding"
    return None


def _handed(survey: Survey, choices: dict[int, Any]) -> dict[int, Any]:
    """Choices as layers get them: one that hooks run before, which may change it (fully_shard gathers its parameters
    only then), looks again."""
    hooked = {id(layer) for layer in survey.layers if layer._forward_pre_hooks}
    return {key: None if key in hooked else choice for key, choice in choices.items()} if hooked else choices


def _padded(
    survey: Survey, reason: str | None, choices: dict[int, Any] | None, zeros: bool = False
) -> Padded | ThroughInterface | Original:
    if survey.interface is not None:
        reason = survey.interface if reason is None else f"{reason}; {survey.interface}"
        return ThroughInterface(reason) if survey.through_interface else Original(reason)
    return Padded(reason, choices, zeros)


def because(route: Padded | ThroughInterface | Original, reason: str) -> Padded | ThroughInterface | Original:
    """The same route, with a reason that only the data gave."""
    return replace(route, reason=reason if route.reason is None else f"{reason}; {route.reason}")


def _embeddings_reason(survey: Survey, call: Call, fused: bool) -> str | None:
    if fused:
        return None if survey.tables is None else "the embeddings cannot be fused"
    reason = survey.own_embeddings if call.embeds is None else survey.given_embeddings
    if reason is not None:
        return reason
    if call.autocast is not None:
        return "embeddings of several dtypes"
    if call.embeds is not None and call.embeds != survey.like.dtype:
        return "inputs_embeds of another dtype than the embeddings"
    return None


def layer_choices(survey: Survey, call: Call, options: Options) -> dict[int, LayerChoice]:
    """Of a model all of whose layers have fast classes: by the id of each."""
    grad = call.grad and (survey.embeddings_grad or call.embeds_grad)
    choices = {}
    for layer in survey.layers:
        choice = layer_choice(layer, survey.like.dtype, survey.like.shape[-1], call.autocast)
        # From the first layer on that has something to learn, the hidden states need gradients.
        grad = grad or (call.grad and any(parameter.requires_grad for parameter in layer.parameters()))
        reason = call.no_encoder or (encoder_layers.GRADIENTS if grad else None)
        reason = reason or encoder_layers.no_layer_call(layer, choice, survey.like)
        if call.encoder is not None and reason is None:
            own = encoder_layers.encoder_call([layer], [choice], options, call.encoder)
            choices[id(layer)] = choice._replace(call=own)
        else:
            choices[id(layer)] = choice._replace(no_call=reason)
    return choices


def _one_call(
    survey: Survey, call: Call, choices: dict[int, LayerChoice], options: Options
) -> EncoderCall | QuantizedCall | None:
    if call.encoder is None or any(choice.call is None for choice in choices.values()):
        return None
    if any(map(compiled, survey.layers)):
        return None
    found = [choices[id(layer)] for layer in survey.layers]
    return encoder_layers.encoder_call(survey.layers, found, options, call.encoder)
