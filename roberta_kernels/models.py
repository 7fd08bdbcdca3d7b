"""The fast classes: every known Hugging Face class with the fused code in front of it.

`fast_class(RobertaLayer)` is a subclass of RobertaLayer, of the same name, that puts a mixin before it. `patch` gives a
module that class; the FastRoberta* classes are such classes themselves. So there is one mechanism: what a patched
model runs and what FastRoberta runs is the same class.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
)

from roberta_kernels import attention_interface, backends, packed_weights, packing, probe
from roberta_kernels.families import FAMILIES, family_class, part_class, role_of
from roberta_kernels.hooks import compiled, foreign_hooks
from roberta_kernels.layers import (
    FastAbsoluteEmbeddings,
    FastEmbeddings,
    FastLayer,
    FastSelfAttention,
    FastSelfOutput,
    FusedMask,
    HuggingFaceModule,
    PatchState,
    inference_plan,
    plain_linear,
    state_of,
    structure_mismatch,
    tracing,
)
from roberta_kernels.packed_weights import NOTHING, Around, Plan

# Attention implementations that are the same mathematics as ours. Any other is somebody's own, and is left alone.
_SAME_ATTENTION = (
    *(None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"),
    attention_interface.NAME,
)
# Arguments that reach the attention function, and change what it computes.
_ATTENTION_ARGUMENTS = ("position_bias", "softcap", "sliding_window", "s_aux")
# What tells flash attention that a row of the batch holds several sequences.
_FLASH_ARGUMENTS = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k")


# Arguments of a model that its packed pass takes care of; what its embeddings take is known to be theirs.
_KNOWN_ARGUMENTS = (
    *("input_ids", "attention_mask", "inputs_embeds", "encoder_hidden_states", "encoder_attention_mask"),
    *("past_key_values", "use_cache"),
)


@dataclass(frozen=True, slots=True, eq=False)
class MaskRequest:
    """An attention mask on its way through Hugging Face's own forward code, with what was decided about it.

    attention_mask: the caller's. fused: whether the layers may use fused attention. packed: whether padding may be
    left out (a head that reads padded rows says no).
    """

    attention_mask: Any
    fused: bool = True
    packed: bool = True

    def size(self, dim: int) -> int:
        return self.attention_mask.size(dim)

    def view(self, *shape: int) -> MaskRequest:
        """What a multiple-choice head does with its mask, on the way to its base model."""
        return replace(self, attention_mask=self.attention_mask.view(*shape))


def _requested(mask: Any) -> MaskRequest:
    return mask if type(mask) is MaskRequest else MaskRequest(mask)


def _own_forward(module: nn.Module) -> bool:
    """Whether a forward is bound to the instance. One bound before patching, as accelerate's hooks are, runs the
    original code, which does not know our masks.
    """
    return "forward" in module.__dict__


def _by_name(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of forward by name."""
    names = model._rk_parameters
    if len(args) > len(names):
        raise TypeError(
            f"{type(model).__name__}.forward() takes {len(names)} positional arguments but {len(args)} were given"
        )
    named = dict(zip(names, args, strict=False))
    for name in named:
        if name in kwargs:
            raise TypeError(f"{type(model).__name__}.forward() got multiple values for argument {name!r}")
    return named | kwargs


def _without_padding(output: Any, mask: Tensor | None) -> Any:
    """The output of a model that ran padded, in a graph, with zeros where a packed pass leaves them."""
    if mask is None:
        return output
    real = mask.to(torch.bool)
    padding = ~real & real[:, :1].all()  # where a sequence starts with padding, the pass is not a packed one
    hidden_states = output[0].masked_fill(padding.unsqueeze(-1), 0.0)
    if isinstance(output, tuple):
        return (hidden_states, *output[1:])
    return type(output)(**dict(output) | {"last_hidden_state": hidden_states})


class FastModel(HuggingFaceModule):
    """RobertaModel: packed from the embeddings to the last layer where it can be, else padded, else the original."""

    _rk_parameters: tuple[str, ...]  # names of forward's positional parameters, in order
    _rk_unknown: tuple[str, ...]  # those of them that the packed pass does not know
    _rk_encoder: Any
    _rk_embeddings: Any  # the embeddings' class, where they always run the original code
    _rk_embedding_parameters: tuple[str, ...]  # what their forward takes, without past_key_values_length
    _rk_pooled: bool  # whether the output has a place for a pooler's
    _rk_unpackable: str | None = None  # why no model of this family can be packed

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if mode and packed_weights.drop(self):
            packed_weights.trim()
        return self

    def _rk_forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            kwargs = _by_name(self, args, kwargs)
        state = state_of(self)
        if state.backend != "auto":
            with backends.backend(state.backend):
                return self._rk_run(state, kwargs)
        return self._rk_run(state, kwargs)

    def _rk_run(self, state: PatchState, kwargs: dict[str, Any]) -> Any:
        request = _requested(kwargs.get("attention_mask"))
        reason = self._original_attention(kwargs)
        if reason is not None:
            state.fell_back(self, reason)
            request = MaskRequest(request.attention_mask, fused=False, packed=False)
        elif not request.packed:
            state.stayed_padded("a head reads padded rows")
        elif state.packed is not False:
            reason, plan = self._unpackable(request, kwargs), None
            if reason is None:
                reason, plan = self._layers_reason(state)
            if reason is None and tracing():
                state.stayed_padded("traced")
                return _without_padding(super().forward(**kwargs | {"attention_mask": request}), request.attention_mask)
            packed = self._pack(request.attention_mask, kwargs) if reason is None else None
            if packed is not None:
                return self._packed_forward(packed, kwargs, plan)
            state.stayed_padded(reason or "a sequence does not start with a real token")
        kwargs["attention_mask"] = request
        return super().forward(**kwargs)

    def _original_attention(self, kwargs: dict[str, Any]) -> str | None:
        """Why only the original attention can give what this call asks for, or None."""
        config = self.config
        if self._wants("output_attentions", kwargs):
            return "attention weights were asked for"  # which the fused kernel never makes
        causal = kwargs.get("is_causal", getattr(config, "is_causal", None))
        if causal is not None and bool(causal) != bool(config.is_decoder):
            return f"is_causal={causal}"
        for name in _ATTENTION_ARGUMENTS:
            if kwargs.get(name) is not None:
                return f"{name} was given"
        if str(config._attn_implementation).startswith("flash_attention"):
            for name in _FLASH_ARGUMENTS:
                if kwargs.get(name) is not None:
                    return f"{name} was given, which flash attention takes sequence boundaries from"
        return None

    def _known_layers(self) -> bool:
        """Whether the encoder and all its layers are what the fused pass stands in for."""
        encoder = self._modules["encoder"]
        return type(encoder) is self._rk_encoder and all(
            isinstance(layer, FastLayer) and not _own_forward(layer) for layer in encoder.layer
        )

    def _wants(self, output: str, kwargs: dict[str, Any]) -> Any:
        """What the call asks of this output, as transformers' capture_outputs looks it up: a None given is a no."""
        return kwargs.get(output, getattr(self.config, output, False))

    def _unpackable(self, request: MaskRequest, kwargs: dict[str, Any]) -> str | None:
        """Why this call stays in the padded layout, or None. Cheap reasons come first."""
        if self._rk_unpackable is not None:
            return self._rk_unpackable
        for name in self._rk_unknown:
            if kwargs.get(name) is not None:
                return f"{name} was given"
        input_ids, inputs_embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if (input_ids is None) == (inputs_embeds is None):
            return "not one of input_ids and inputs_embeds"
        given: Any = input_ids if inputs_embeds is None else inputs_embeds
        if given.dim() != (2 if inputs_embeds is None else 3):
            return "input_ids is not [batch, length], or inputs_embeds not [batch, length, hidden]"
        if kwargs.get("past_key_values") is not None:
            return "a key/value cache"
        config = self.config
        if config.is_decoder and (
            kwargs.get("encoder_hidden_states") is not None
            or (config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"])
        ):
            return "a key/value cache or cross-attention"
        mask = request.attention_mask
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != given.shape[:2]):
            return "the attention mask is not [batch, length]"
        if wish := self._wants("output_hidden_states", kwargs):
            return f"output_hidden_states={wish}"
        if config._attn_implementation not in _SAME_ATTENTION:
            return f"attention implementation {config._attn_implementation!r}"
        if given.numel() == 0:
            return "an empty batch"
        # Without CUDA's state (fake tensors, on a machine without a GPU) there is no capture, and asking is an error.
        if given.is_cuda and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return "CUDA graph capture"
        embeddings = self._modules["embeddings"]
        reason = self._embeddings_reason(embeddings, inputs_embeds)
        if reason is not None:
            return reason
        project = self._modules.get("embeddings_project")  # ELECTRA's, between tables and layers of different widths
        if project is not None and (
            foreign_hooks(project)
            or not plain_linear(project)
            or project.weight.dtype != embeddings.word_embeddings.weight.dtype
        ):
            return "embeddings_project is not a plain nn.Linear"
        return None

    def _layers_reason(self, state: PatchState) -> tuple[str | None, Plan | None]:
        """Why the layers cannot take packed tokens, or None; and the plan of one call through all of them, where there
        is one."""
        modules = self._modules
        project = modules.get("embeddings_project")
        like = modules["embeddings"].word_embeddings.weight if project is None else project.weight.t()
        plan, _ = inference_plan(self, state, like)
        if plan is not None:
            return None, plan
        if not self._known_layers():
            return "an encoder or layer with code of its own", None
        encoder = modules["encoder"]
        if foreign_hooks(encoder):
            return "hooks on the encoder", None
        for layer in encoder.layer:
            reason = layer.packed_reason(like)
            if reason is not None:
                return reason, None
        return None, None

    def plan_layers(self) -> tuple[str | None, tuple[Any, ...], Around]:
        """Of inference_plan: why its layers cannot run as one call, or None; the layers; what the call skips beside."""
        modules = self._modules
        encoder = modules["encoder"]
        if not self._known_layers():
            return "an encoder or layer with code of its own", (), NOTHING
        layers = encoder._modules["layer"]
        if any(map(foreign_hooks, (encoder, *layers))) or any(map(compiled, layers)):
            return "hooks on the encoder or a layer, or a layer compiled by itself", (), NOTHING
        places = [
            (modules, "encoder"),
            (encoder._modules, "layer"),
            *((layers._modules, key) for key in layers._modules),
        ]
        return None, tuple(layers), Around([encoder, *layers], places, layers._modules)

    def _embeddings_reason(self, embeddings: Any, inputs_embeds: Tensor | None) -> str | None:
        """Why what the embeddings give cannot be packed, or None."""
        if isinstance(embeddings, FastEmbeddings) and inputs_embeds is None:
            fusable = not foreign_hooks(embeddings) and embeddings.fused_reason() is None
            return None if fusable else "the embeddings cannot be fused"
        if not isinstance(embeddings, FastEmbeddings) and type(embeddings) is not self._rk_embeddings:
            return "the embeddings have code of their own"
        # Their original code runs: on the padded batch, before packing. The layers take its dtype for granted.
        weight = embeddings.word_embeddings.weight
        if torch.is_autocast_enabled(weight.device.type) or any(
            p.dtype != weight.dtype for p in embeddings.parameters()
        ):
            return "embeddings of several dtypes"
        if inputs_embeds is not None and inputs_embeds.dtype != weight.dtype:
            return "inputs_embeds of another dtype than the embeddings"
        return None

    def _pack(self, mask: Tensor | None, kwargs: dict[str, Any]) -> packing.Packing | None:
        given = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        batch, length = given.shape[:2]
        return packing.pack(mask, batch, length, given.device, self.config.is_decoder)

    def _packed_forward(self, packed: packing.Packing, kwargs: dict[str, Any], plan: Plan | None) -> Any:
        embeddings = self.embeddings
        if isinstance(embeddings, FastEmbeddings) and kwargs.get("inputs_embeds") is None:
            hidden_states = self._packed_embeddings(packed, kwargs)
        else:
            given = {name: kwargs[name] for name in self._rk_embedding_parameters if name in kwargs}
            hidden_states = packed.pack(embeddings(**given))
        project = self._modules.get("embeddings_project")
        if project is not None:
            hidden_states = project(hidden_states)
        if plan is not None and not hidden_states.requires_grad:
            hidden_states = plan.run(hidden_states, packed.sequences)
        else:
            mask = FusedMask(packed.sequences)
            for layer in self.encoder.layer:
                hidden_states = layer(hidden_states, mask)
        sequence_output = packed.unpack(hidden_states)
        output: Any
        if self._rk_pooled:
            pooler = self.pooler
            output = BaseModelOutputWithPoolingAndCrossAttentions(
                last_hidden_state=sequence_output,
                pooler_output=None if pooler is None else pooler(sequence_output),
            )
        else:
            output = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=sequence_output)
        return_dict = kwargs.get("return_dict")
        return_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _packed_embeddings(self, packed: packing.Packing, kwargs: dict[str, Any]) -> Tensor:
        embeddings = self.embeddings
        input_ids, token_type_ids = kwargs["input_ids"], kwargs.get("token_type_ids")
        position_ids = kwargs.get("position_ids")
        if position_ids is None:
            position_ids = embeddings.positions(input_ids)
        shape = input_ids.shape
        position_ids = position_ids.expand(shape)
        embeddings.check_positions(position_ids)
        return embeddings.embed(
            packed.pack(input_ids),
            packed.pack(position_ids),
            None if token_type_ids is None else packed.pack(token_type_ids.expand(shape)),
        )

    def _create_attention_masks(
        self,
        attention_mask: Any,
        encoder_attention_mask: Tensor | None,
        embedding_output: Tensor,
        encoder_hidden_states: Tensor | None,
        past_key_values: Any,
    ) -> tuple[Any, Tensor | None]:
        """Called by the original forward; gives the layers Sequences in place of a mask where they can use them."""
        request = _requested(attention_mask)
        mask = request.attention_mask

        def original(wanted: Any = mask) -> tuple[Any, Tensor | None]:
            return super(FastModel, self)._create_attention_masks(
                attention_mask=wanted,
                encoder_attention_mask=encoder_attention_mask,
                embedding_output=embedding_output,
                encoder_hidden_states=encoder_hidden_states,
                past_key_values=past_key_values,
            )

        reason = None
        config = self.config
        batch, length = embedding_output.shape[:2]
        if not request.fused:
            return original()
        if past_key_values is not None or (config.is_decoder and encoder_hidden_states is not None):
            reason = "a key/value cache or cross-attention"
        elif mask is not None and (not isinstance(mask, Tensor) or mask.shape != (batch, length)):
            reason = "the attention mask is not [batch, length]"
        elif config._attn_implementation not in _SAME_ATTENTION:
            reason = f"attention implementation {config._attn_implementation!r}"
        elif batch * length == 0:
            reason = "an empty batch"
        elif not self._known_layers():
            reason = "an encoder or layer with code of its own"
        if reason is not None:
            state_of(self).fell_back(self, f"attention: {reason}")
            return original()
        sequences = packing.padded_sequences(batch, length, mask, embedding_output.device, config.is_decoder)
        return FusedMask(sequences, lambda: original()[0]), encoder_attention_mask


class FastAttentionModel(FastModel):
    """A model of which only the attention is RoBERTa's."""

    _rk_unpackable = "only the attention of this family runs fused"
    _rk_layer: Any
    _rk_attention: Any

    def _known_layers(self) -> bool:
        encoder = self._modules["encoder"]
        return type(encoder) is self._rk_encoder and all(
            type(layer) is self._rk_layer
            and type(layer.attention) is self._rk_attention
            and isinstance(layer.attention.self, FastSelfAttention)
            and not any(map(_own_forward, (layer, layer.attention, layer.attention.self)))
            for layer in encoder.layer
        )


class FastHead(HuggingFaceModule):
    """A model with a head that reads position 0 only: nothing to add to what its base model does."""


class FastTokenHead(HuggingFaceModule):
    """A head with a loss over positions. Padded rows are zeros in a packed pass, so where a label makes the loss read
    one, the base model is asked to compute all rows."""

    _rk_shift = 0  # label i is compared with the logits of position i - shift
    _rk_mask_dim = 2

    def _reads_padding(self, mask: Tensor, kwargs: dict[str, Any]) -> bool:
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

    def _rk_forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            kwargs = _by_name(self, args, kwargs)
        mask = kwargs.get("attention_mask")
        if (
            isinstance(mask, Tensor)
            and mask.dim() == self._rk_mask_dim
            and state_of(self).packed == "auto"
            and self._reads_padding(mask, kwargs)
        ):
            kwargs["attention_mask"] = MaskRequest(mask, packed=False)
        return super().forward(**kwargs)


class FastNextTokenHead(FastTokenHead):
    """Causal language modelling: label i is compared with the logits of position i - 1."""

    _rk_shift = 1


class FastSpanHead(FastTokenHead):
    """Question answering: a softmax over positions reads the logits of every row, padded ones too."""

    def _reads_padding(self, mask: Tensor, kwargs: dict[str, Any]) -> bool:
        return True


class FastSummaryHead(FastTokenHead):
    """ELECTRA's multiple choice: takes position 0 of each choice, or what its config says, which may be padding."""

    _rk_mask_dim = 3  # [batch, choices, length]

    def _reads_padding(self, mask: Tensor, kwargs: dict[str, Any]) -> bool:
        return self.sequence_summary.summary_type != "first"


_MIXINS: dict[str, type] = {
    "embeddings": FastEmbeddings,
    "absolute_embeddings": FastAbsoluteEmbeddings,
    "self_attention": FastSelfAttention,
    "attention_model": FastAttentionModel,
    "summary_head": FastSummaryHead,
    "self_output": FastSelfOutput,
    "layer": FastLayer,
    "model": FastModel,
    "token_head": FastTokenHead,
    "next_token_head": FastNextTokenHead,
    "span_head": FastSpanHead,
    "head": FastHead,
}
# Roles of whole models: what a user constructs.
MODEL_ROLES = ("model", "attention_model", "token_head", "next_token_head", "span_head", "summary_head", "head")


@functools.cache
def fast_class(original: Any) -> Any:
    """The fast subclass of a known Hugging Face class; it keeps the name, which transformers looks classes up by.

    Raises TypeError for a class that is not known, or not as this version knows it.
    """
    role = role_of(original)
    if role is None:
        raise TypeError(f"{original.__module__}.{original.__name__} is not a class that roberta_kernels knows")
    if role.mismatch is not None:
        raise TypeError(role.mismatch)
    mixin = _MIXINS[role.role]
    namespace: dict[str, Any] = {
        "__module__": __name__,
        "__qualname__": f"Fast{original.__name__}",  # pickle finds the class by this
        "__doc__": original.__doc__,
        **_own_functions(mixin),
        "_rk_original": original,
        "_rk_parameters": tuple(
            name
            for name, parameter in inspect.signature(original.forward).parameters.items()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        )[1:],
    }
    if issubclass(mixin, FastModel):
        namespace |= _model_namespace(original, namespace["_rk_parameters"])
    elif role.role == "layer":
        self_output = part_class(original, "SelfOutput")
        known = role_of(self_output) if self_output else None
        fused = () if known is None or known.mismatch else (fast_class(self_output),)
        namespace |= {
            "_rk_attention": part_class(original, "Attention"),
            "_rk_self_attention": part_class(original, "SelfAttention"),
            "_rk_self_outputs": (self_output, *fused),
            "_rk_intermediate": part_class(original, "Intermediate"),
            "_rk_output": part_class(original, "Output"),
        }
    bases = (mixin, original)
    forward = namespace.get("_rk_forward")
    if forward is not None:
        namespace["forward"] = _like(original.forward, forward)
    if role.role in MODEL_ROLES:
        namespace["__init__"] = _like(original.__init__, _initialise(original))
    cls = type(original.__name__, bases, namespace)
    setattr(sys.modules[__name__], cls.__qualname__, cls)
    return cls


def _model_namespace(original: Any, parameters: tuple[str, ...]) -> dict[str, Any]:
    """What FastModel must know of its family."""
    family = FAMILIES[original.__module__]
    embeddings: Any = part_class(original, "Embeddings")
    taken = tuple(inspect.signature(embeddings.forward).parameters)[1:]
    return {
        "_rk_unknown": tuple(name for name in parameters if name not in (*_KNOWN_ARGUMENTS, *taken)),
        "_rk_encoder": part_class(original, "Encoder"),
        "_rk_embeddings": embeddings,
        "_rk_embedding_parameters": tuple(name for name in taken if name != "past_key_values_length"),
        "_rk_pooled": family.pooled,
        "_rk_layer": part_class(original, "Layer"),
        "_rk_attention": part_class(original, "Attention"),
    }


def _like(original: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    """replacement with the signature, name and docstring of the original."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return replacement(self, *args, **kwargs)

    return functools.wraps(original)(_own_code(method))


def _own_functions(mixin: type) -> dict[str, Callable[..., Any]]:
    """The methods of a mixin, each with a code object of its own."""
    functions: dict[str, Callable[..., Any]] = {}
    for base in reversed(mixin.__mro__):
        functions |= {name: _own_code(value) for name, value in vars(base).items() if inspect.isfunction(value)}
    return functions


def _own_code(function: Any) -> Any:
    """A copy of the function that shares no code object with it.

    torch.compile keeps what it compiled by code object, and gives up on one that it compiled eight times: classes that
    share their code would use up each other's share.
    """
    code = function.__code__.replace()
    copied = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(copied, function)


def _initialise(original: Any) -> Callable[..., None]:
    """__init__ of a fast class: builds the Hugging Face model, then gives its parts their fast classes."""

    def initialise(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        state = PatchState()
        self.__dict__["_rk_state"] = state  # Hugging Face code that runs during construction may already look it up
        original.__init__(self, *args, **kwargs)
        for module in self.modules():
            make_fast(module, state)

    return initialise


def make_fast(module: nn.Module, state: PatchState) -> bool:
    """Gives a module its fast class, in place, and the state it shares with the rest of its model; False if not
    known.
    """
    cls: Any = type(module)
    if not is_fast_class(cls):
        if role_of(cls) is None or mismatch(module) is not None:
            return False
        module.__class__ = fast_class(cls)
        _register_recordable_outputs(module, cls)
    module.__dict__["_rk_state"] = state
    return True


def mismatch(module: nn.Module) -> str | None:
    """How a module of a known class differs from the code that is known, or None."""
    cls: Any = type(module)
    role = role_of(cls._rk_original if is_fast_class(cls) else cls)
    if role is None or role.mismatch is not None:
        return None if role is None else role.mismatch
    where = {"layer": "", "self_attention": "attention.self"}.get(role.role)
    if where is None or is_fast_class(cls):
        return None
    return structure_mismatch(module, where) or probe.difference(cls, role.role)


def holds_fast_class(cls: type) -> bool:
    """Whether modules of this class run a fast class: it is one, or was derived from one (fully_shard does that)."""
    return hasattr(cls, "_rk_original")


def make_original(module: nn.Module) -> None:
    """Undoes make_fast."""
    cls: Any = type(module)
    if is_fast_class(cls):
        module.__class__ = cls._rk_original
    module.__dict__.pop("_rk_state", None)
    module.__dict__.pop("_rk_name", None)
    packed_weights.forget(module)


def is_fast_class(cls: type) -> bool:
    return "_rk_original" in cls.__dict__


def _register_recordable_outputs(module: nn.Module, original: type) -> None:
    """transformers keeps what can be recorded (hidden states, ...) by class: the new class records what the old one
    did.
    """
    from transformers.utils import output_capturing

    registry = getattr(output_capturing, "_CAN_RECORD_REGISTRY", None)
    recordable = getattr(original, "_can_record_outputs", None)
    if registry is not None and recordable is not None:
        dict.__setitem__(registry, str(type(module)), recordable)


def __getattr__(name: str) -> Any:
    """FastXLMRobertaModel, FastRobertaLayer, ...: made when first asked for, by a user or by pickle."""
    if name.startswith("Fast"):
        original = family_class(name.removeprefix("Fast"))
        if original is not None:
            return fast_class(original)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _roberta(name: str) -> Any:
    original = family_class(f"Roberta{name}")
    assert original is not None
    return fast_class(original)


FastRoberta = _roberta("Model")
FastRobertaForCausalLM = _roberta("ForCausalLM")
FastRobertaForMaskedLM = _roberta("ForMaskedLM")
FastRobertaForMultipleChoice = _roberta("ForMultipleChoice")
FastRobertaForQuestionAnswering = _roberta("ForQuestionAnswering")
FastRobertaForSequenceClassification = _roberta("ForSequenceClassification")
FastRobertaForTokenClassification = _roberta("ForTokenClassification")
