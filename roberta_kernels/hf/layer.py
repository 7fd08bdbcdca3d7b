"""A Transformer layer: subclasses of the Hugging Face modules that run the same mathematics on the fused ops.

Each is a mixin that fast_class.py puts in front of the Hugging Face class, so that `super().forward` is the original
code. What of it runs fused was chosen before (choice.py): by the model for its layers, which find the choice in the
mask that they are handed, or by the module itself where transformers' code calls it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from roberta_kernels import decoder_calls, ops
from roberta_kernels.hf.choice import (
    AttentionChoice,
    FeedForwardChoice,
    LayerChoice,
    OutputChoice,
    any_skipped,
    autocast_dtype,
    feed_forward_choice,
    layer_choice,
    output_choice,
    replaced,
    self_attention_choice,
)
from roberta_kernels.hf.embeddings import HuggingFaceModule
from roberta_kernels.hf.encoder_layers import NOT_QUANTISED
from roberta_kernels.hf.fusable import dropout_of, plain_linear
from roberta_kernels.hf.masks import BESIDE, LayerMask, find, put
from roberta_kernels.hf.state import drop_quantized, in_force, state_of
from roberta_kernels.hf.structure import (
    CoreParts,
    OutputParts,
    attention_parts,
    core_parts,
    feed_forward_parts,
    output_parts,
)
from roberta_kernels.unpadding import Sequences


def _count(module: Any, reasons: tuple[str, ...]) -> None:
    for reason in reasons:
        state_of(module).fell_back(module, reason)


# --- what the fused halves are made of --------------------------------------------------------------------------------


def _attend(
    core: CoreParts, choice: AttentionChoice, hidden_states: Tensor, sequences: Sequences, seed: Tensor | None
) -> Tensor:
    """Projections and attention. hidden_states `[..., H]` -> `[..., heads * head_dim]`."""
    head_dim = core.head_dim
    projected = [
        F.linear(hidden_states, m.weight, m.bias) if plain else m(hidden_states)
        for m, plain in zip((core.query, core.key, core.value), choice.projections, strict=True)
    ]
    # As many heads as were projected, whatever an attribute says: as the original counts them.
    query, key, value = (p.reshape(-1, p.shape[-1] // head_dim, head_dim) for p in projected)
    if choice.head_dim != head_dim:
        query, key, value = (F.pad(t, (0, choice.head_dim - head_dim)) for t in (query, key, value))
    dropout_p, bias = attention_dropout(core), sequences.bias
    context = ops.attention(
        query,
        key,
        value,
        sequences.cu_seqlens,
        max_seqlen_q=sequences.max_seqlen,
        scale=core.scale,
        causal=sequences.causal,
        key_mask=sequences.key_mask,
        dropout_p=dropout_p,
        seed=seed if dropout_p > 0 else None,
        bias=None if bias is None else bias.to(query.dtype),  # autocast gives the products in its own dtype
    )
    return context[..., :head_dim].reshape(projected[0].shape)


def attention_dropout(core: CoreParts) -> float:
    """The mode of the module itself decides, as in the original."""
    return core.dropout.p if core.module.training else 0.0


def output_dropout(output: OutputParts) -> float:
    return 0.0 if output.dropout is None else dropout_of(output.dropout)


def _project_add_norm(
    output: OutputParts, choice: OutputChoice, x: Tensor, residual: Tensor, seed: Tensor | None
) -> Tensor:
    """x `[..., K]`, residual `[..., H]`."""
    dense = output.dense
    if choice.plain:
        # In training a checkpointed layer runs without gradients first, and must be the same then.
        product = F.linear if dense.training else decoder_calls.linear
        return _add_norm(output, product(x, dense.weight), dense.bias, residual, seed)
    return _add_norm(output, dense(x), None, residual, seed)


def _add_norm(output: OutputParts, x: Tensor, x_bias: Tensor | None, residual: Tensor, seed: Tensor | None) -> Tensor:
    layer_norm, hidden = output.norm, residual.shape[-1]
    dropout_p = output_dropout(output)
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


# --- modules ----------------------------------------------------------------------------------------------------------


class FastSelfAttention(HuggingFaceModule):
    """The attention of a layer whose other parts are not RoBERTa's: fused where the model hands it sequences."""

    def _rk_forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        mask = find(LayerMask, args, kwargs)
        if mask is None:
            return super().forward(hidden_states, *args, **kwargs)
        with in_force(state_of(self)):
            choice, core = None if mask.choices is None else mask.choices[id(self)], core_parts(self)
            if choice is None:
                choice = self_attention_choice(core, hidden_states.dtype)
            reason = choice.reason or mask.unknown(args, kwargs)
            _count(self, choice.said if reason is None else (reason,))
            if reason is not None:
                args, kwargs = put(mask.original(), mask, args, kwargs)
                return super().forward(hidden_states, *args, **kwargs)
            seed = ops.draw_seeds(1, hidden_states.device)[0] if attention_dropout(core) > 0 else None
            return _attend(core, choice, hidden_states, mask.sequences, seed), None


class FastSelfOutput(HuggingFaceModule):
    """dense, dropout, residual and LayerNorm of an attention block, where the block itself runs the original code."""

    def _rk_forward(self, hidden_states: Tensor, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = output_parts(self)
        choice = output_choice(output, input_tensor.dtype, input_tensor.shape[-1])
        reason = choice.reason or ("arguments that are not known" if args or kwargs else None)
        _count(self, choice.said if reason is None else (reason,))
        if reason is not None:
            return super().forward(hidden_states, input_tensor, *args, **kwargs)
        seed = ops.draw_seeds(1, input_tensor.device)[0] if output_dropout(output) > 0 else None
        return _project_add_norm(output, choice, hidden_states, input_tensor, seed)


class FastVocabulary(HuggingFaceModule):
    """What gives RoBERTa's language models their logits: dense, GELU, LayerNorm and the product with the vocabulary, as
    large a weight as five layers'."""

    def _rk_forward(self, features: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parts: dict[str, Any] = self._modules
        inner, norm, decoder = parts["dense"], parts["layer_norm"], parts["decoder"]
        plain = not self.training and plain_linear(inner) and plain_linear(decoder)
        if args or not plain or any_skipped(self, inner, norm, decoder):
            return super().forward(features, *args, **kwargs)
        rows = norm(F.gelu(decoder_calls.linear(features, inner.weight, inner.bias)))
        return decoder_calls.linear(rows, decoder.weight, decoder.bias)


class FastFeedForward(HuggingFaceModule):
    """The second half of a layer."""

    # By half: paths of the modules around the parts, and the classes that each may have.
    _rk_around: tuple[tuple[tuple[str, tuple[type, ...]], ...], ...]

    def _rk_feed_forward(self, choice: FeedForwardChoice, attention_output: Tensor) -> Tensor:
        _count(self, choice.said if choice.reason is None else (choice.reason,))
        if choice.reason is not None:
            return self._rk_own_feed_forward(attention_output)
        parts = feed_forward_parts(self)
        output = parts.output
        seed = ops.draw_seeds(1, attention_output.device)[0] if output_dropout(output) > 0 else None
        if choice.gelu is None:
            # Another activation (which the report said), an adapter, a quantised weight: these modules run as they are.
            inner = parts.activation(parts.inner(attention_output))
            return _project_add_norm(output, choice.output, inner, attention_output, seed)
        w_in, w_out = parts.inner, output.dense
        x = attention_output.reshape(-1, attention_output.shape[-1])
        tensors = [x, w_in.weight, w_in.bias, w_out.weight]
        if choice.cast is not None:
            tensors = [tensor.to(choice.cast) for tensor in tensors]
        inner = ops.gelu_ffn(*tensors, approximate=choice.gelu)
        return _add_norm(output, inner, w_out.bias, attention_output, seed)

    def _rk_own_feed_forward(self, attention_output: Tensor) -> Tensor:
        """The original code of the feed-forward half."""
        return self.output(self.intermediate(attention_output), attention_output)


class FastLayer(FastFeedForward):
    """Fused attention where the model hands it sequences, fused feed-forward always."""

    def train(self, mode: bool = True) -> Any:
        if mode:
            drop_quantized(self)
        return super().train(mode)

    def _rk_forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        mask = find(LayerMask, args, kwargs)
        state = state_of(self)
        if mask is None:  # called with a Hugging Face mask: the model chose the original attention
            if state.options.quantization is not None:
                state.fell_back(self, "float32 weights: the original attention runs", NOT_QUANTISED)
            return self._rk_own_attention(hidden_states, *args, **kwargs)
        with in_force(state):
            return self._rk_run(mask, hidden_states, args, kwargs)

    def _rk_own_attention(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer with the original code of its attention."""
        return super().forward(hidden_states, *args, **kwargs)

    def _rk_run(self, mask: LayerMask, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        choice = self._rk_choice(mask, hidden_states)
        unknown = mask.unknown(args, kwargs)
        if choice.call is not None and unknown is None:
            return choice.call.run(hidden_states, mask.sequences)
        state = state_of(self)
        if state.options.quantization is not None:
            why = choice.no_call or f"{unknown} was given"
            state.fell_back(self, f"float32 weights: {why}", NOT_QUANTISED)
        reason = choice.attention.reason or (None if unknown is None else f"{unknown} was given")
        if reason is not None:
            state.fell_back(self, reason)
            args, kwargs = put(mask.original(), mask, args, kwargs)
            return super().forward(hidden_states, *args, **kwargs)
        hidden_states = self._rk_attention(choice.attention, hidden_states, mask.sequences)
        rows = self._rk_chunk(choice.feed_forward)
        if rows == 0:
            return self._rk_feed_forward(choice.feed_forward, hidden_states)
        dim = 1
        if hidden_states.dim() == 2:  # unpadded: as many rows at a time as chunks of the padded batch have
            rows, dim = rows * (mask.sequences.cu_seqlens.shape[0] - 1), 0
        chunks = [self._rk_feed_forward(choice.feed_forward, chunk) for chunk in hidden_states.split(rows, dim)]
        return torch.cat(chunks, dim)

    def _rk_choice(self, mask: LayerMask, hidden_states: Tensor) -> LayerChoice:
        choice = None
        if mask.choices is not None and not torch.compiler.is_compiling():
            choice = mask.choices[id(self)]
        if choice is None:
            device = hidden_states.device.type
            choice = layer_choice(self, hidden_states.dtype, hidden_states.shape[-1], autocast_dtype(device))
            choice = choice._replace(no_call="a graph is traced, or hooks run before the layer")
        return choice

    def _rk_attention(self, choice: AttentionChoice, hidden_states: Tensor, sequences: Sequences) -> Tensor:
        """Projections, attention, output projection, dropout, residual, LayerNorm. hidden_states `[..., H]`."""
        _count(self, choice.said)
        attention = attention_parts(self)
        seeds: tuple[Tensor | None, ...] = (None, None)
        if attention_dropout(attention.core) > 0 or output_dropout(attention.output) > 0:
            seeds = ops.draw_seeds(2, hidden_states.device)
        context = _attend(attention.core, choice, hidden_states, sequences, seeds[0])
        return _project_add_norm(attention.output, choice.output, context, hidden_states, seeds[1])

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        """The feed-forward half, as the original forward calls it."""
        if replaced(self):
            return super().feed_forward_chunk(attention_output)
        hidden, device = attention_output.shape[-1], attention_output.device.type
        choice = feed_forward_choice(self, attention_output.dtype, hidden, autocast_dtype(device))
        return self._rk_feed_forward(choice, attention_output)

    def _rk_chunk(self, choice: FeedForwardChoice) -> int:
        """How many positions the feed-forward takes at a time; 0: all."""
        return self.chunk_size_feed_forward


class FastDistilBertLayer(FastLayer):
    """The same mathematics in other modules. Its model makes the mask where nobody can replace it, and hands the layers
    what it was given beside: so the sequences come beside the mask."""

    def _rk_forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        beside = kwargs.pop(BESIDE, None)
        if beside is not None:
            original = attention_mask
            attention_mask = dataclasses.replace(beside, make_original=lambda: original)
        return super()._rk_forward(hidden_states, attention_mask, **kwargs)

    def _rk_chunk(self, choice: FeedForwardChoice) -> int:
        return 0 if choice.reason is not None else feed_forward_parts(self).chunk

    def _rk_own_feed_forward(self, attention_output: Tensor) -> Tensor:
        return self.output_layer_norm(self.ffn(attention_output) + attention_output)


class FastMPNetLayer(FastLayer):
    """The same with a bias on its scores, which it finds with the sequences. Of its model's own code it takes a mask, a
    bias and what was asked for, and gives a tuple."""

    def _rk_forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = super()._rk_forward(hidden_states, *args, **kwargs)
        return output if isinstance(output, tuple) else (output,)

    def _rk_own_attention(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if (reason := replaced(self)) is not None:
            _count(self, (reason,))
            return super()._rk_own_attention(hidden_states, *args, **kwargs)
        attended, *rest = self.attention(hidden_states, *args, **kwargs)
        choice = feed_forward_choice(self, attended.dtype, attended.shape[-1], autocast_dtype(attended.device.type))
        return (self._rk_feed_forward(choice, attended), *rest)

    def _rk_chunk(self, choice: FeedForwardChoice) -> int:
        return 0
