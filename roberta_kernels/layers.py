"""The fused layers: subclasses of the Hugging Face modules that run the same mathematics on the fused ops.

Each is a mixin that `models.fast_class` puts in front of the Hugging Face class, so that `super().forward` is the
original code. A layer decides on every call whether it may fuse (adapters, hooks and quantisation arrive after
patching) and runs the original code where it may not; the reason is counted in its PatchState.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import activations

from roberta_kernels import backends, ops, packed_weights
from roberta_kernels.hooks import foreign_hooks, input_grads_hook
from roberta_kernels.ops.attention import serving_head_dim
from roberta_kernels.packed_weights import Around, Call, LayerParts, Plan
from roberta_kernels.packing import Sequences

if TYPE_CHECKING:
    HuggingFaceModule = Any
else:
    # What a mixin is put before; to a type checker it has whatever attributes the Hugging Face class has.
    HuggingFaceModule = object

# Activation class -> gelu_ffn's `approximate`.
_GELU = {
    "GELUActivation": "none",
    "NewGELUActivation": "tanh",
    "PytorchGELUTanh": "tanh",
    "GELUTanh": "tanh",
}
_OWN_CODE = "a part of the layer has code of its own"
# Adapters, quantised weights: the modules run as they are, and what is around them stays fused.
_OWN_PROJECTION = "query, key or value is not a plain nn.Linear (an adapter, a quantised weight), and runs its own code"
_OWN_PRODUCT = "an output product is not a plain nn.Linear (an adapter, a quantised weight), and runs its own code"
_OWN_FEED_FORWARD = "a product of the feed-forward is not a plain nn.Linear (an adapter, a quantised weight)"
FUSABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class PatchState:
    """What patch() was asked for, and what happened since: shared by the modules of one patched model.

    packed: "auto", True or False. backend: a backend name or "auto". prepack, quantization, offload: whether inference
    on a CPU runs from packed weights, how these are rounded (None: not), and whether the originals leave memory.
    fallbacks: (name of the module, its class, reason)
    -> calls in which it ran the original code. padded: reason -> calls in which a model ran fused, but on all rows of
    the padded batch. warned: what was warned about.
    """

    packed: str | bool = "auto"
    backend: str = "auto"
    prepack: bool = True
    quantization: str | None = None
    offload: bool = False
    fallbacks: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    warned: set[str] = field(default_factory=set)
    padded: Counter[str] = field(default_factory=Counter)

    def fell_back(self, module: Any, reason: str, runs: str = "the original code runs") -> None:
        if torch.compiler.is_compiling():
            return
        key = (module.__dict__.get("_rk_name", ""), type(module).__name__, reason)
        self.fallbacks[key] += 1
        what = f"{key[1]}: {reason}"
        if what not in self.warned:
            self.warned.add(what)
            warnings.warn(f"roberta_kernels: {what}; {runs} (warned once)", stacklevel=3)

    def reasons(self) -> dict[str, int]:
        """ "class: reason" -> calls of all modules of that class."""
        counts: Counter[str] = Counter()
        for (_, cls, reason), calls in self.fallbacks.items():
            counts[f"{cls}: {reason}"] += calls
        return dict(counts)

    def stayed_padded(self, reason: str) -> None:
        if not torch.compiler.is_compiling():
            self.padded[reason] += 1


def state_of(module: Any) -> PatchState:
    return module.__dict__["_rk_state"]


# --- which modules can be fused -------------------------------------------------------------------------------------


def _plain(tensor: Any) -> bool:
    """An ordinary weight: not quantised, not distributed, not on the meta device."""
    if type(tensor) not in (nn.Parameter, Tensor):
        # torch.export puts fake tensors in the place of weights.
        return torch.compiler.is_exporting() and type(tensor).__module__.startswith("torch._subclasses.")
    return tensor.device.type != "meta"


def plain_linear(module: Any) -> bool:
    """Exactly nn.Linear (adapters subclass it or take its name), with an ordinary weight."""
    return type(module) is nn.Linear and _plain(module._parameters.get("weight"))  # pruning takes it out


def plain_layer_norm(module: Any, hidden: int) -> bool:
    return (
        type(module) is nn.LayerNorm
        and module.normalized_shape == (hidden,)
        and module.weight is not None
        and module.bias is not None
        and _plain(module.weight)
    )


def plain_embedding(module: Any) -> bool:
    return (
        type(module) is nn.Embedding
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and not module.sparse
        and _plain(module.weight)
    )


def gelu_kind(activation: Any) -> str | None:
    """gelu_ffn's `approximate` for this activation, or None where it is not a GELU that the op knows."""
    name = type(activation).__name__
    if name in _GELU and type(activation) is getattr(activations, name, None):
        return _GELU[name]
    if type(activation) is nn.GELU:
        return activation.approximate
    return (activation is F.gelu and "none") or None


def dropout_of(module: Any) -> float:
    return module.p if module.training else 0.0


def attention_dropout(core: Any) -> float:
    """Of a SelfAttention module, whose own mode decides, as in the original."""
    return core.dropout.p if core.training else 0.0


def other_backend(state: PatchState) -> bool:
    """Whether another backend is in force than the one the model was patched for: gradient checkpointing runs a layer
    again in backward, outside of its model's forward."""
    return state.backend not in ("auto", backends.current_backend()) and not torch.compiler.is_compiling()


def _dtype_reason(hidden_states: Tensor, layer_norm: Any) -> str | None:
    if hidden_states.dtype not in FUSABLE_DTYPES:
        return f"no kernels for {hidden_states.dtype}"
    if layer_norm.weight.dtype != hidden_states.dtype:
        return f"hidden states are {hidden_states.dtype} and LayerNorm is {layer_norm.weight.dtype}"
    return None


def tracing() -> bool:
    """Whether a graph is being recorded, which must not depend on the data."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def functorch_active() -> bool:
    return not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None


# --- inference from packed weights ------------------------------------------------------------------------------------

_TRAINING = "training mode"
_GRADIENTS = "gradients are needed (torch.no_grad() was not set)"
_NOT_FLOAT32 = "not all of its parameters are plain, contiguous float32 tensors on the CPU"


def _call_reason(state: PatchState, like: Tensor) -> str | None:
    """Why no layer can run from packed weights in such a call, or None. like: of the hidden states' device, dtype and
    need of gradients.
    """
    if not state.prepack:
        return "prepack=False"
    if tracing():
        return "a graph is being traced"
    if not like.is_cpu or like.dtype != torch.float32 or type(like) not in (Tensor, nn.Parameter):
        return "hidden states are not float32 on the CPU"
    if torch.is_grad_enabled() and like.requires_grad:
        return _GRADIENTS
    if torch.is_autocast_enabled("cpu"):
        return "autocast"
    if functorch_active():
        return "inside a torch.func transform"
    if not backends.cpu_serves(like):
        return "another backend than the CPU kernels serves"
    return packed_weights.unavailable()


def _plain_float32(tensor: Any) -> bool:
    return (
        type(tensor) is nn.Parameter
        and tensor.is_cpu
        and tensor.dtype == torch.float32
        and tensor.is_contiguous()
        and not tensor.is_inference()  # whose edits are not counted
    )


def inference_plan(owner: Any, state: PatchState, like: Tensor) -> tuple[Plan | None, str | None]:
    """The plan of one op call through a layer, or through all layers of a model; or None, and why not.

    owner: the layer or model, whose `plan_layers` is asked when a plan is to be made. like: as `_call_reason`'s.
    """
    reason = _call_reason(state, like)
    if reason is not None:
        return None, reason
    kind, isa = packed_weights.KINDS[state.quantization], backends.cpu_isa()
    mine = packed_weights.prepared(owner)
    plan = mine.plan
    if plan is None or not plan.holds(kind, isa):
        plan = mine.plan = None  # it holds packed weights that may be made again
        reason, layers, around = owner.plan_layers()
        for layer in layers:
            reason = reason or layer.packed_weights_reason(like)
        if reason is not None:
            return None, reason
        parts = [layer.parts() for layer in layers]
        if len({part.call for part in parts}) != 1:
            return None, "the layers differ in heads, scale, eps or GELU"
        plan = packed_weights.make_plan(owner, layers, parts, around, kind=kind, isa=isa, offload=state.offload)
    if torch.is_grad_enabled() and plan.requires_grad():
        return None, _GRADIENTS
    return plan, None


# --- attention ------------------------------------------------------------------------------------------------------


def _attention_reason(core: Any) -> str | None:
    """Why the attention of a SelfAttention module cannot be fused, or None."""
    if serving_head_dim(core.attention_head_size) is None:
        return f"head_dim {core.attention_head_size} is not served"
    if core.dropout.p >= 1.0:
        return "attention dropout is 1"
    children = core._modules
    for name in ("query", "key", "value", "dropout"):
        if foreign_hooks(children[name]):
            return "hooks on a module that fusing would skip"
    if functorch_active():
        return "inside a torch.func transform"
    return None


def _attend(fast: Any, core: Any, hidden_states: Tensor, sequences: Sequences, seed: Tensor | None) -> Tensor:
    """Projections and attention of a SelfAttention module. hidden_states `[..., H]` -> `[..., heads * head_dim]`.

    fast: the module with a fast class that this is a part of.
    """
    heads, head_dim = core.num_attention_heads, core.attention_head_size
    projections = (core.query, core.key, core.value)
    plain = [plain_linear(m) for m in projections]
    if not all(plain):
        state_of(fast).fell_back(fast, _OWN_PROJECTION)
    query, key, value = (
        (F.linear(hidden_states, m.weight, m.bias) if is_plain else m(hidden_states)).reshape(-1, heads, head_dim)
        for m, is_plain in zip(projections, plain, strict=True)
    )
    dropout_p = attention_dropout(core)
    served = serving_head_dim(head_dim)
    assert served is not None
    if served != head_dim:
        query, key, value = (F.pad(t, (0, served - head_dim)) for t in (query, key, value))
    context = ops.attention(
        query,
        key,
        value,
        sequences.cu_seqlens,
        max_seqlen_q=sequences.max_seqlen,
        scale=core.scaling,
        causal=sequences.causal,
        key_mask=sequences.key_mask,
        dropout_p=dropout_p,
        seed=seed if dropout_p > 0 else None,
    )
    if served != head_dim:
        context = context[..., :head_dim]
    return context.reshape(*hidden_states.shape[:-1], heads * head_dim)


class FastSelfAttention(HuggingFaceModule):
    """The attention of a layer whose other parts are not RoBERTa's: fused where the model hands it Sequences."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if type(attention_mask) is not FusedMask:
            return super().forward(hidden_states, attention_mask, past_key_values=past_key_values, **kwargs)
        state = state_of(self)
        if other_backend(state):
            with backends.backend(state.backend):
                return FastSelfAttention.forward(self, hidden_states, attention_mask, past_key_values, **kwargs)
        reason = _attention_reason(self)
        if reason is None and hidden_states.dtype not in FUSABLE_DTYPES:
            reason = f"no kernels for {hidden_states.dtype}"
        if reason is not None:
            state.fell_back(self, reason)
            return super().forward(hidden_states, attention_mask.original(), past_key_values=past_key_values, **kwargs)
        seed = ops.draw_seeds(1, hidden_states.device)[0] if attention_dropout(self) > 0 else None
        return _attend(self, self, hidden_states, attention_mask.sequences, seed), None


# --- the end of both halves of a layer: dense, dropout, residual, LayerNorm -----------------------------------------


def _project_add_norm(fast: Any, output: Any, x: Tensor, residual: Tensor, seed: Tensor | None) -> Tensor:
    """output is a SelfOutput or Output module; x `[..., K]`, residual `[..., H]`. fast: as `_attend`'s."""
    dense, layer_norm = output.dense, output.LayerNorm
    if plain_linear(dense):
        projected, x_bias = F.linear(x, dense.weight), dense.bias
    else:
        state_of(fast).fell_back(fast, _OWN_PRODUCT)
        projected, x_bias = dense(x), None
    return _add_norm(output, projected, x_bias, residual, layer_norm, seed)


def _add_norm(
    output: Any, x: Tensor, x_bias: Tensor | None, residual: Tensor, layer_norm: Any, seed: Tensor | None
) -> Tensor:
    hidden = residual.shape[-1]
    dropout_p = dropout_of(output.dropout)
    normalised = ops.add_layer_norm(
        x.reshape(-1, hidden).to(residual.dtype),  # autocast gives the product in its own dtype
        residual.reshape(-1, hidden),
        layer_norm.weight,
        layer_norm.bias,
        eps=layer_norm.eps,
        x_bias=x_bias,
        dropout_p=dropout_p,
        seed=seed if dropout_p > 0 else None,
    )
    return normalised.view(residual.shape)


def _output_reason(output: Any, hidden_states: Tensor) -> str | None:
    """Why dense + dropout + residual + LayerNorm cannot be fused, or None."""
    modules = output._modules
    layer_norm, dropout = modules["LayerNorm"], modules["dropout"]
    if not plain_layer_norm(layer_norm, hidden_states.shape[-1]):
        return "LayerNorm is not a plain nn.LayerNorm"
    if type(dropout) is not nn.Dropout or dropout.p >= 1.0:
        return "dropout is not a plain nn.Dropout with p < 1"
    for module in (output, modules["dense"], layer_norm, dropout):
        if foreign_hooks(module):
            return "hooks on a module that fusing would skip"
    return _dtype_reason(hidden_states, layer_norm)


class FastSelfOutput(HuggingFaceModule):
    """dense, dropout, residual and LayerNorm of an attention block, where the block itself runs the original code."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        reason = _output_reason(self, input_tensor)
        if reason is None and functorch_active():
            reason = "inside a torch.func transform"
        if reason is not None:
            state_of(self).fell_back(self, reason)
            return super().forward(hidden_states, input_tensor)
        seed = ops.draw_seeds(1, input_tensor.device)[0] if dropout_of(self.dropout) > 0 else None
        return _project_add_norm(self, self, hidden_states, input_tensor, seed)


# --- a layer: what it is made of -------------------------------------------------------------------------------------

_OUTPUT_PARTS = {"dense", "LayerNorm", "dropout"}
# Module -> its children, and the attributes that a fused layer reads.
_STRUCTURE: dict[str, tuple[set[str], set[str]]] = {
    "": ({"attention", "intermediate", "output"}, {"chunk_size_feed_forward", "seq_len_dim"}),
    "attention": ({"self", "output"}, set()),
    "attention.self": (
        {"query", "key", "value", "dropout"},
        {"num_attention_heads", "attention_head_size", "scaling"},
    ),
    "attention.output": (_OUTPUT_PARTS, set()),
    "intermediate": ({"dense"}, {"intermediate_act_fn"}),
    "output": (_OUTPUT_PARTS, set()),
}
# An activation may be a function; a decoder's layers may have a second attention, which never runs fused.
_OPTIONAL_PARTS = {"intermediate_act_fn", "crossattention"}


def structure_mismatch(module: Any, where: str = "") -> str | None:
    """How the parts of a layer (or, with where="attention.self", of a SelfAttention) differ from the known, or None."""
    for name, (children, attributes) in _STRUCTURE.items():
        if name != where and not name.startswith(f"{where}." if where else ""):
            continue
        part = module
        for step in name.removeprefix(where).split("."):
            part = part._modules[step] if step else part
        found = set(part._modules)
        if not children <= found or not found <= children | _OPTIONAL_PARTS:
            return f"{type(part).__name__} holds {sorted(found)}, expected {sorted(children)}"
        missing = sorted(attribute for attribute in attributes if not hasattr(part, attribute))
        if missing:
            return f"{type(part).__name__} has no {', '.join(missing)}"
    return None


# --- a layer --------------------------------------------------------------------------------------------------------


class FastLayer(HuggingFaceModule):
    """A Transformer layer: fused attention where the model hands it Sequences, fused feed-forward always."""

    # The classes of the parts that fusing steps over; a part of any other class has code of its own.
    _rk_attention: Any
    _rk_self_attention: Any
    _rk_self_outputs: Any
    _rk_intermediate: Any
    _rk_output: Any

    def attention_reason(self, hidden_states: Tensor) -> str | None:
        """Why the attention half cannot be fused for such hidden states, or None."""
        modules = self._modules
        attention = modules["attention"]
        if type(attention) is not self._rk_attention:
            return _OWN_CODE
        core, output = attention._modules["self"], attention._modules["output"]
        if type(core) is not self._rk_self_attention or type(output) not in self._rk_self_outputs:
            return _OWN_CODE
        if foreign_hooks(attention) or foreign_hooks(core):
            return "hooks on a module that fusing would skip"
        return _attention_reason(core) or _output_reason(output, hidden_states)

    def feed_forward_reason(self, hidden_states: Tensor) -> str | None:
        """Why the feed-forward half cannot be fused at all, or None. (Where only the GELU cannot be, the norm still
        is.)
        """
        modules = self._modules
        intermediate = modules["intermediate"]
        if type(intermediate) is not self._rk_intermediate or type(modules["output"]) is not self._rk_output:
            return _OWN_CODE
        parts = intermediate._modules
        for module in (intermediate, parts["dense"], parts.get("intermediate_act_fn")):
            if module is not None and foreign_hooks(module):
                return "hooks on a module that fusing would skip"
        if functorch_active():
            return "inside a torch.func transform"
        return _output_reason(modules["output"], hidden_states)

    def packed_reason(self, like: Tensor) -> str | None:
        """Why this layer cannot take packed tokens, or None. like: `[*, H]`, a tensor of the hidden states' dtype."""
        if foreign_hooks(self):
            return "hooks on a layer"
        return self.attention_reason(like) or self.feed_forward_reason(like)

    def packed_weights_reason(self, like: Tensor) -> str | None:
        """Why this layer cannot run from packed weights, whatever the call, or None. like: as packed_reason's."""
        if self.training:
            return _TRAINING
        reason = self.attention_reason(like) or self.feed_forward_reason(like)
        if reason is not None:
            return reason
        attention, intermediate, output = self.attention, self.intermediate, self.output
        core = attention.self
        linears = (core.query, core.key, core.value, attention.output.dense, intermediate.dense, output.dense)
        if not all(map(plain_linear, linears)):
            return "a product is not a plain nn.Linear (an adapter, a quantised weight)"
        if any(linear.bias is None for linear in linears):
            return "a product has no bias"
        norms = (attention.output.LayerNorm, output.LayerNorm)
        tensors = [tensor for module in (*linears, *norms) for tensor in (module.weight, module.bias)]
        if not all(map(_plain_float32, tensors)):
            return _NOT_FLOAT32
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return _GRADIENTS
        if core.attention_head_size not in packed_weights.HEAD_DIMS:
            return f"head_dim {core.attention_head_size}"
        if gelu_kind(intermediate.intermediate_act_fn) is None:
            return f"activation {type(intermediate.intermediate_act_fn).__name__}"
        if norms[0].eps != norms[1].eps:
            return "its LayerNorms differ in eps"
        if self.chunk_size_feed_forward != 0:
            return "a feed-forward in chunks"
        if any(module.training for module in self.modules()):
            return _TRAINING
        return None

    def plan_layers(self) -> tuple[str | None, tuple[Any, ...], Around]:
        """Of inference_plan: this layer, whose own call is not skipped."""
        return None, (self,), packed_weights.NOTHING

    def parts(self) -> LayerParts:
        """What a call from packed weights reads and skips, where packed_weights_reason is None."""
        modules: list[nn.Module] = []
        places: list[tuple[dict[str, Any], str]] = []
        for path, (_, attributes) in _STRUCTURE.items():
            parent = self.get_submodule(path)
            own = parent.__dict__
            places += [(own, name) for name in ("_modules", *attributes) if name in own]
            for name, module in parent._modules.items():
                if name == "crossattention":
                    continue
                modules.append(module)
                places.append((parent._modules, name))
                leaf = module.__dict__
                places += [
                    (leaf, "_parameters"),
                    *((module._parameters, parameter) for parameter in module._parameters),
                ]
                places += [(leaf, "eps")] if "eps" in leaf else []
        core, first, second = self.attention.self, self.attention.output, self.output
        inner = self.intermediate.dense
        return LayerParts(
            modules=modules,
            places=places,
            weights=[m.weight for m in (core.query, core.key, core.value, first.dense, inner, second.dense)],
            vectors=[
                *(core.query.bias, core.key.bias, core.value.bias),
                *(first.dense.bias, first.LayerNorm.weight, first.LayerNorm.bias),
                *(inner.bias, second.dense.bias, second.LayerNorm.weight, second.LayerNorm.bias),
            ],
            call=Call(
                heads=core.num_attention_heads,
                scale=float(core.scaling),
                eps=first.LayerNorm.eps,
                tanh=gelu_kind(self.intermediate.intermediate_act_fn) == "tanh",
            ),
        )

    def train(self, mode: bool = True) -> Any:
        if mode:
            packed_weights.drop(self)
        return super().train(mode)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        state = state_of(self)
        if other_backend(state):
            with backends.backend(state.backend):
                return FastLayer.forward(
                    self,
                    hidden_states,
                    attention_mask,
                    encoder_hidden_states,
                    encoder_attention_mask,
                    past_key_values,
                    **kwargs,
                )
        fused = type(attention_mask) is FusedMask
        reason: str | None = "the original attention runs"
        if fused and state.prepack:
            plan, reason = inference_plan(self, state, hidden_states)
            if plan is not None:
                return plan.run(hidden_states, attention_mask.sequences)
        if state.quantization is not None:
            state.fell_back(self, f"float32 weights: {reason}", "the quantised ones are not used")
        if not fused:
            # Called with a Hugging Face mask: the model chose the original attention.
            return super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        reason = self.attention_reason(hidden_states)
        if reason is not None:
            state.fell_back(self, reason)
            return super().forward(hidden_states, attention_mask.original(), **kwargs)
        hidden_states = self.fused_attention(hidden_states, attention_mask.sequences)
        if self.chunk_size_feed_forward != 0:
            if hidden_states.dim() == 2:  # packed: as many rows at a time as chunks of the padded batch have
                rows = self.chunk_size_feed_forward * (attention_mask.sequences.cu_seqlens.shape[0] - 1)
                return torch.cat([self.feed_forward_chunk(chunk) for chunk in hidden_states.split(rows)])
            from transformers.pytorch_utils import apply_chunking_to_forward

            return apply_chunking_to_forward(
                self.feed_forward_chunk,
                self.chunk_size_feed_forward,
                self.seq_len_dim,
                hidden_states,
            )
        return self.feed_forward_chunk(hidden_states)

    def fused_attention(self, hidden_states: Tensor, sequences: Sequences) -> Tensor:
        """Projections, attention, output projection, dropout, residual, LayerNorm. hidden_states `[..., H]`."""
        attention = self.attention
        seeds: tuple[Tensor | None, ...] = (None, None)
        if attention_dropout(attention.self) > 0 or dropout_of(attention.output.dropout) > 0:
            seeds = ops.draw_seeds(2, hidden_states.device)
        context = _attend(self, attention.self, hidden_states, sequences, seeds[0])
        return _project_add_norm(self, attention.output, context, hidden_states, seeds[1])

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        """The feed-forward half; the name and signature are the original's."""
        reason = self.feed_forward_reason(attention_output)
        if reason is not None:
            state_of(self).fell_back(self, reason)
            return super().feed_forward_chunk(attention_output)
        intermediate, output = self.intermediate, self.output
        seed = ops.draw_seeds(1, attention_output.device)[0] if dropout_of(output.dropout) > 0 else None
        kind = gelu_kind(intermediate.intermediate_act_fn)
        w_in, w_out = intermediate.dense, output.dense
        plain = plain_linear(w_in) and plain_linear(w_out)
        if not plain:
            state_of(self).fell_back(self, _OWN_FEED_FORWARD)
        if kind is None or not plain or w_in.bias is None:
            # Another activation (which the report said), an adapter, a quantised weight: these modules run as they are.
            return _project_add_norm(self, output, intermediate(attention_output), attention_output, seed)
        x = attention_output.reshape(-1, attention_output.shape[-1])
        weights: tuple[Tensor, ...] = (w_in.weight, w_in.bias, w_out.weight)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype)
            weights = tuple(weight.to(dtype) for weight in weights)
        if any(weight.dtype != x.dtype for weight in weights):
            return _project_add_norm(self, output, intermediate(attention_output), attention_output, seed)
        inner = ops.gelu_ffn(x, weights[0], weights[1], weights[2], approximate=kind)
        return _add_norm(output, inner, w_out.bias, attention_output, output.LayerNorm, seed)


@dataclass(frozen=True, slots=True, eq=False)
class FusedMask:
    """What a model hands its layers in place of a mask: the sequences, and how to make the original mask should a
    layer need it (None in the packed layout, which is only taken when no layer does)."""

    sequences: Sequences
    make_original: Any = None

    def original(self) -> Any:
        if self.make_original is None:
            raise RuntimeError("a layer of a packed batch turned out not to be fusable in the middle of the pass")
        return self.make_original()


# --- embeddings -----------------------------------------------------------------------------------------------------


class FastEmbeddings(HuggingFaceModule):
    """Word, position and token-type embeddings, LayerNorm and dropout in one op."""

    def fused_reason(self) -> str | None:
        """Why the embeddings cannot be fused, or None."""
        modules = self._modules
        tables = [modules[name] for name in ("word_embeddings", "position_embeddings", "token_type_embeddings")]
        layer_norm, dropout = modules["LayerNorm"], modules["dropout"]
        if not all(plain_embedding(table) for table in tables):
            return "an embedding table is not a plain nn.Embedding"
        if not plain_layer_norm(layer_norm, tables[0].embedding_dim):
            return "LayerNorm is not a plain nn.LayerNorm"
        if type(dropout) is not nn.Dropout or dropout.p >= 1.0:
            return "dropout is not a plain nn.Dropout with p < 1"
        if any(foreign_hooks(module) for module in (*tables, layer_norm, dropout)):
            return "hooks on a module that fusing would skip"
        if len({module.weight.dtype for module in (*tables, layer_norm)}) != 1:
            return "the tables and LayerNorm have different dtypes"
        if functorch_active():
            return "inside a torch.func transform"
        return _dtype_reason(tables[0].weight, layer_norm)

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values_length: int = 0,
    ) -> Tensor:
        reason = self.fused_reason()
        if inputs_embeds is not None or reason is not None:
            if reason is not None:
                state_of(self).fell_back(self, reason)
            return super().forward(
                input_ids=input_ids,
                token_type_ids=token_type_ids,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                past_key_values_length=past_key_values_length,
            )
        assert input_ids is not None
        if position_ids is None:
            position_ids = self.positions(input_ids, past_key_values_length)
        batch, length = input_ids.shape
        if not tracing():
            self.check_positions(position_ids)
        hidden_states = self.embed(
            input_ids.reshape(-1),
            position_ids.expand(batch, length).reshape(-1),
            None if token_type_ids is None else token_type_ids.expand(batch, length).reshape(-1),
        )
        return hidden_states.view(batch, length, -1)

    def positions(self, input_ids: Tensor, past_key_values_length: int = 0) -> Tensor:
        """RoBERTa's position ids `[B, S]`, made from the ids: padding stays at padding_idx, the rest counts on from
        it.
        """
        return self.create_position_ids_from_input_ids(input_ids, self.padding_idx, past_key_values_length)

    def first_position(self) -> int:
        """What the position ids of a sequence count from."""
        return self.padding_idx + 1

    def check_positions(self, position_ids: Tensor) -> None:
        """Raises IndexError where a position `[B, S]` lies outside of the table, before any kernel runs.

        A batch of no more columns than the table has room for cannot hold one, and its values are not looked at (on a
        GPU that would be a synchronisation).
        """
        rows = self.position_embeddings.num_embeddings
        if position_ids.shape[1] + self.first_position() <= rows:
            return
        highest = int(position_ids.max())
        if highest >= rows:
            raise IndexError(
                f"index out of range in self: position {highest}, and there are {rows} position embeddings "
                "(a sequence has more tokens than the model has positions)"
            )

    def embed(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """`[T]` ids -> `[T, H]`."""
        word, position = self.word_embeddings, self.position_embeddings
        layer_norm, dropout_p = self.LayerNorm, dropout_of(self.dropout)
        hidden_states = ops.embedding_layer_norm(
            input_ids,
            position_ids,
            token_type_ids,
            word.weight,
            position.weight,
            self.token_type_embeddings.weight,
            layer_norm.weight,
            layer_norm.bias,
            eps=layer_norm.eps,
            dropout_p=dropout_p,
            seed=ops.draw_seeds(1, input_ids.device)[0] if dropout_p > 0 else None,
            word_padding_idx=word.padding_idx,
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

    def positions(self, input_ids: Tensor, past_key_values_length: int = 0) -> Tensor:
        """`[1, S]`."""
        return self.position_ids[:, past_key_values_length : past_key_values_length + input_ids.shape[1]]

    def first_position(self) -> int:
        return 0
