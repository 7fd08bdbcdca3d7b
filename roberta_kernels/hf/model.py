"""RobertaModel and its like: unpadded from the embeddings to the last layer where it can be, else padded, else the
original. route.py decides; what is here runs what was decided."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from roberta_kernels import backends, quantized, unpadding
from roberta_kernels.hf import padding, route
from roberta_kernels.hf.arguments import by_name, is_causal
from roberta_kernels.hf.choice import AttentionChoice, any_skipped, replaced, self_attention_choice
from roberta_kernels.hf.embeddings import HuggingFaceModule
from roberta_kernels.hf.fusable import own_forward
from roberta_kernels.hf.graphs import Rows
from roberta_kernels.hf.known_code import position_bias
from roberta_kernels.hf.layer import FastLayer, FastSelfAttention
from roberta_kernels.hf.masks import BESIDE, Handover, LayerMask, RealRows, find, put
from roberta_kernels.hf.state import Options, drop_quantized, state_of
from roberta_kernels.hf.structure import core_parts
from roberta_kernels.hf.survey import Survey, encoder_of
from roberta_kernels.unpadding import Sequences, Unpadding


class FastModel(HuggingFaceModule):
    """A model all of whose layers are RoBERTa's."""

    _rk_facts: Any  # known_code.ModelFacts of the Hugging Face class
    _rk_parameters: tuple[str, ...]  # names of forward's positional parameters, in order
    _rk_defaults: dict[str, Any]  # names of all its parameters -> their defaults
    _rk_embedding_arguments: tuple[str, ...]  # what the embeddings take of these
    _rk_known_arguments: frozenset[str]  # these, and those of the family's own that change nothing for us

    def train(self, mode: bool = True) -> Any:
        dropped = mode and drop_quantized(self)  # before the layers, which free their own
        super().train(mode)
        if dropped:
            quantized.trim()
        return self

    def _rk_forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = by_name(self, args, kwargs)
        backend = state_of(self).options.backend
        if backend != "auto":
            with backends.backend(backend):
                return self._rk_run(kwargs)
        return self._rk_run(kwargs)

    def _rk_run(self, kwargs: dict[str, Any]) -> Any:
        chosen = route.decide(self, kwargs)
        mask = kwargs.get("attention_mask")
        if type(mask) is RealRows:
            kwargs = kwargs | {"attention_mask": mask.attention_mask}
        if isinstance(chosen, route.Unpadded):
            unless = mask.unless if type(mask) is RealRows else None
            batch_layout = padding.layout(self, chosen, kwargs, unless)
            if isinstance(batch_layout, Unpadding):
                return self._rk_unpadded(chosen, batch_layout, kwargs)
            chosen = batch_layout
        elif not isinstance(chosen, route.Original):
            reason = padding.original(self, kwargs)
            chosen = chosen if reason is None else route.Original(reason)
        return self._rk_padded(chosen, kwargs)

    # --- unpadded ---

    def _rk_unpadded(self, chosen: route.Unpadded, batch_layout: Unpadding, kwargs: dict[str, Any]) -> Any:
        padded = None
        if chosen.fused_embeddings:
            rows = self._rk_rows(batch_layout, kwargs)
            if chosen.graphs is not None:
                padded = chosen.graphs.run(
                    id(chosen), partial(self._rk_compute, chosen), rows, batch_layout, state_of(self).graphs
                )
            elif chosen.no_graphs is not None:
                state_of(self).graphs[chosen.no_graphs] += 1
            if padded is None:
                hidden_states = self._rk_embed(rows)
        else:
            given = {name: kwargs[name] for name in self._rk_embedding_arguments if name in kwargs}
            hidden_states = self._rk_project(batch_layout.unpad(self.embeddings(**given)))
        if padded is None:
            sequences = self._rk_sequences(batch_layout.sequences, hidden_states, batch_layout.length)
            padded = batch_layout.pad(self._rk_layers(chosen, hidden_states, sequences))
        return self._rk_output(padded, kwargs.get("return_dict"))

    def _rk_rows(self, batch_layout: Unpadding, kwargs: dict[str, Any]) -> Rows:
        """What fused embeddings take."""
        embeddings = self.embeddings
        input_ids, position_ids = kwargs["input_ids"], kwargs.get("position_ids")
        if position_ids is None:
            position_ids = embeddings.positions(input_ids)
        embeddings.check_positions(position_ids)
        token_type_ids = embeddings.token_types(kwargs.get("token_type_ids"), position_ids)
        position_ids = position_ids.expand(input_ids.shape)
        if batch_layout.indices is not None:
            embeddings.check_padding(input_ids, token_type_ids)
        return Rows(
            batch_layout.unpad(input_ids),
            batch_layout.unpad(position_ids),
            None if token_type_ids is None else batch_layout.unpad(token_type_ids.expand(input_ids.shape)),
        )

    def _rk_embed(self, rows: Rows) -> Tensor:
        return self._rk_project(self.embeddings.embed(*rows))

    def _rk_project(self, hidden_states: Tensor) -> Tensor:
        project = self._modules.get("embeddings_project")
        return hidden_states if project is None else project(hidden_states)

    def _rk_layers(self, chosen: route.Unpadded, hidden_states: Tensor, sequences: Sequences) -> Tensor:
        if isinstance(chosen, route.Encoder):
            return chosen.call.run(hidden_states, sequences)
        layer_mask = LayerMask(sequences, chosen.choices)
        for layer in encoder_of(self).layer:
            hidden_states = self._rk_layer(layer, hidden_states, layer_mask)
        return hidden_states

    def _rk_compute(self, chosen: route.Unpadded, rows: Rows, sequences: Sequences) -> Tensor:
        """All op calls of a call without a bias on the scores. What may be recorded."""
        return self._rk_layers(chosen, self._rk_embed(rows), sequences)

    def _rk_output(self, sequence_output: Tensor, return_dict: bool | None) -> Any:
        facts = self._rk_facts
        given: dict[str, Tensor | None] = {"last_hidden_state": sequence_output}
        if facts.pooled:
            pooler = self.pooler
            given["pooler_output"] = None if pooler is None else pooler(sequence_output)
        output = facts.output(**given)
        return_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    # --- padded ---

    def _rk_padded(self, chosen: route.Padded | route.ThroughInterface | route.Original, kwargs: dict[str, Any]) -> Any:
        if isinstance(chosen, route.Original):
            state_of(self).fell_back(self, chosen.reason)
            return super().forward(**kwargs)
        if chosen.reason is not None:
            state_of(self).stayed_padded(chosen.reason)
        if isinstance(chosen, route.ThroughInterface):
            return super().forward(**kwargs)
        mask, embeds = kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
        given = kwargs["input_ids"] if embeds is None else embeds
        batch, length = given.shape[:2]
        sequences = unpadding.padded_sequences(batch, length, mask, given.device, is_causal(self))
        vetted = tuple([value for value in kwargs.values() if value is not None])

        def layer_mask(make_original: Any) -> LayerMask:
            return LayerMask(sequences, chosen.choices, vetted, make_original)

        handed = {BESIDE: layer_mask(None)} if self._rk_facts.beside else {"attention_mask": Handover(mask, layer_mask)}
        output = super().forward(**kwargs | handed)
        return _zero_padding(output, mask) if chosen.zeros else output

    def _create_attention_masks(self, *args: Any, **kwargs: Any) -> Any:
        """Called by the original forward; gives the layers sequences in place of a mask."""
        handover = find(Handover, args, kwargs)
        if handover is None:
            return super()._create_attention_masks(*args, **kwargs)
        args, kwargs = put(handover.attention_mask, handover, args, kwargs)
        make = super()._create_attention_masks
        return handover.layer_mask(lambda: make(*args, **kwargs)[0]), None

    # --- what differs between kinds of models ---

    _rk_biased = False  # whether a bias on the scores follows the position in the batch

    def _rk_sequences(self, sequences: Sequences, hidden_states: Tensor, length: int) -> Sequences:
        """The sequences of a batch of this length as layers get them, which are given hidden_states."""
        return sequences

    def _rk_layer(self, layer: Any, hidden_states: Tensor, mask: LayerMask) -> Tensor:
        return layer(hidden_states, mask)

    def _rk_original_reason(self, survey: Survey, choices: dict[int, Any], unknown: str | None) -> str | None:
        """Why the original attention must run, or None. unknown: why the hidden states may be others than the choices
        are for."""
        return None

    def _rk_known_layers(self, layers: tuple[Any, ...]) -> bool:
        return all(isinstance(layer, FastLayer) for layer in layers)

    def _rk_choices(self, survey: Survey, call: route.Call, options: Options) -> dict[int, Any]:
        return route.layer_choices(survey, call, options)


def _zero_padding(output: Any, mask: Tensor | None) -> Any:
    """The output of a model that ran padded, in a graph, with zeros where the unpadded layout of real rows leaves
    them."""
    if mask is None:
        return output
    padding = ~mask.to(torch.bool) & (torch.arange(mask.shape[1], device=mask.device) > 0)
    hidden_states = output[0].masked_fill(padding.unsqueeze(-1), 0.0)
    if isinstance(output, tuple):
        return (hidden_states, *output[1:])
    return type(output)(**dict(output) | {"last_hidden_state": hidden_states})


class FastAttentionModel(FastModel):
    """A model of which only the attention is RoBERTa's."""

    def _rk_known_layers(self, layers: tuple[Any, ...]) -> bool:
        facts = self._rk_facts
        return all(
            type(layer) is facts.layer
            and type(layer.attention) is facts.attention
            and isinstance(layer.attention.self, FastSelfAttention)
            and not any(map(own_forward, (layer, layer.attention, layer.attention.self)))
            for layer in layers
        )

    def _rk_choices(self, survey: Survey, call: route.Call, options: Options) -> dict[int, AttentionChoice]:
        cores = [layer.attention.self for layer in survey.layers]
        return {id(core): self_attention_choice(core_parts(core), survey.like.dtype) for core in cores}


class FastBiasedModel(FastModel):
    """A model with a bias on the scores of all its layers (MPNet's). Its forward takes nothing in the place of a mask:
    so the padded layout too runs here, part by part. known_code has compared this with its forward."""

    _rk_biased = True

    def _rk_run(self, kwargs: dict[str, Any]) -> Any:
        # Of this forward's arguments a None given is none: the config's answer counts.
        return super()._rk_run({name: value for name, value in kwargs.items() if value is not None})

    def _rk_padded(self, chosen: route.Padded | route.ThroughInterface | route.Original, kwargs: dict[str, Any]) -> Any:
        if not isinstance(chosen, route.Padded):
            return super()._rk_padded(chosen, kwargs)
        if chosen.reason is not None:
            state_of(self).stayed_padded(chosen.reason)
        mask = kwargs.get("attention_mask")
        hidden_states = self.embeddings(
            **{name: kwargs[name] for name in self._rk_embedding_arguments if name in kwargs}
        )
        batch, length = hidden_states.shape[:2]
        sequences = unpadding.padded_sequences(batch, length, mask, hidden_states.device, False)
        layer_mask = LayerMask(self._rk_sequences(sequences, hidden_states, length), chosen.choices)
        asked = route.wants(self, "output_hidden_states", kwargs)
        states: tuple[Tensor, ...] = (hidden_states,)
        for layer in encoder_of(self).layer:
            hidden_states = self._rk_layer(layer, hidden_states, layer_mask)
            states = (*states, hidden_states) if asked else states
        output = self._rk_output(hidden_states, kwargs.get("return_dict"), states if asked else None)
        return _zero_padding(output, mask) if chosen.zeros else output

    def _rk_output(
        self, sequence_output: Tensor, return_dict: bool | None, states: tuple[Tensor, ...] | None = None
    ) -> Any:
        pooled = None if self.pooler is None else self.pooler(sequence_output)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if not return_dict:
            return (sequence_output, pooled) if states is None else (sequence_output, pooled, states)
        return self._rk_facts.output(last_hidden_state=sequence_output, pooler_output=pooled, hidden_states=states)

    def _rk_sequences(self, sequences: Sequences, hidden_states: Tensor, length: int) -> Sequences:
        bias = position_bias(encoder_of(self), hidden_states, length)
        return Sequences(sequences.cu_seqlens, sequences.max_seqlen, sequences.key_mask, sequences.causal, bias)

    def _rk_layer(self, layer: Any, hidden_states: Tensor, mask: LayerMask) -> Tensor:
        return layer(hidden_states, mask)[0]

    def _rk_known_layers(self, layers: tuple[Any, ...]) -> bool:
        # Their own mask is never made; what runs before a layer may change what was chosen for it.
        known = super()._rk_known_layers(layers) and not any(layer._forward_pre_hooks for layer in layers)
        return known and any_skipped(encoder_of(self)) is None and replaced(self) is None

    def _rk_original_reason(self, survey: Survey, choices: dict[int, Any], unknown: str | None) -> str | None:
        return unknown or next((c.attention.reason for c in choices.values() if c.attention.reason is not None), None)
