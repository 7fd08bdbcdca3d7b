"""How each part of a layer runs: chosen once for a call, so that what runs it asks nothing more."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from roberta_kernels.hf.fusable import (
    FUSABLE_DTYPES,
    foreign_hooks,
    gelu_kind,
    plain_dropout,
    plain_layer_norm,
    plain_linear,
    tracing,
    transform,
    unserved,
)
from roberta_kernels.hf.structure import (
    CoreParts,
    OutputParts,
    attention_parts,
    feed_forward_parts,
    replaced_code,
)
from roberta_kernels.ops.attention import serving_head_dim

_OWN_CODE = "a part of the layer has code of its own"
# Adapters, quantised weights: the modules run as they are, and what is around them stays fused.
_OWN_PROJECTION = "query, key or value is not a plain nn.Linear (an adapter, a quantised weight), and runs its own code"
_OWN_PRODUCT = "an output product is not a plain nn.Linear (an adapter, a quantised weight), and runs its own code"
_OWN_FEED_FORWARD = "a product of the feed-forward is not a plain nn.Linear (an adapter, a quantised weight)"


class OutputChoice(NamedTuple):
    """dense, dropout, residual and LayerNorm at the end of both halves of a layer.

    reason: why the original code runs, or None. plain: whether the product is. said: what runs its own code inside.
    """

    reason: str | None
    plain: bool = True
    said: tuple[str, ...] = ()


class AttentionChoice(NamedTuple):
    """The attention half of a layer that is handed sequences.

    reason: why the original code runs, or None. projections: whether those of query, key and value are plain products.
    head_dim: that the op runs with. output: of what follows. said: as OutputChoice's, of all parts.
    """

    reason: str | None
    projections: tuple[bool, bool, bool] = (True, True, True)
    head_dim: int = 0
    output: OutputChoice = OutputChoice(None)
    said: tuple[str, ...] = ()


class FeedForwardChoice(NamedTuple):
    """The other half. gelu: gelu_ffn's `approximate`; None: the modules run as they are, and only the norm is fused.
    cast: dtype of the products under autocast."""

    reason: str | None
    gelu: str | None = None
    cast: torch.dtype | None = None
    output: OutputChoice = OutputChoice(None)
    said: tuple[str, ...] = ()


class LayerChoice(NamedTuple):
    """Both halves. call: the op call of this layer by itself, or None, and `no_call` says why."""

    attention: AttentionChoice
    feed_forward: FeedForwardChoice
    call: Any = None
    no_call: str | None = None

    @property
    def fused(self) -> str | None:
        """Why not both halves run fused, or None."""
        return self.attention.reason or self.feed_forward.reason


def replaced(module: nn.Module) -> str | None:
    """Which of a module's methods is somebody else's code, or None. A graph that is being traced does not look."""
    return None if tracing() else replaced_code(type(module))


def skipped(module: nn.Module) -> str | None:
    """Why a module's own call may not be skipped, or None: somebody would notice."""
    return "hooks on a module that fusing would skip" if foreign_hooks(module) else replaced(module)


def any_skipped(*modules: Any) -> str | None:
    for module in modules:
        if isinstance(module, nn.Module):
            reason = skipped(module)
            if reason is not None:
                return reason
    return None


def dtype_reason(dtype: torch.dtype, layer_norm: Any) -> str | None:
    if layer_norm.weight.dtype != dtype:
        return f"hidden states are {dtype} and LayerNorm is {layer_norm.weight.dtype}"
    return unserved(dtype, layer_norm.weight.device)


def output_choice(output: OutputParts, dtype: torch.dtype, hidden: int) -> OutputChoice:
    """For hidden states `[..., hidden]` of this dtype."""
    modules, dense, dropout, layer_norm = output
    if not plain_layer_norm(layer_norm, hidden):
        return OutputChoice("LayerNorm is not a plain nn.LayerNorm")
    if dropout is not None and not plain_dropout(dropout):
        return OutputChoice("dropout is not a plain nn.Dropout with p < 1")
    reason = any_skipped(*modules, dense, layer_norm, dropout) or dtype_reason(dtype, layer_norm) or transform()
    plain = plain_linear(dense)
    return OutputChoice(reason, plain, () if plain or dense is None else (_OWN_PRODUCT,))


def self_attention_choice(core: CoreParts, dtype: torch.dtype) -> AttentionChoice:
    """Of the attention by itself."""
    head_dim = serving_head_dim(core.head_dim)
    if head_dim is None:
        return AttentionChoice(f"head_dim {core.head_dim} is not supported")
    if core.dropout.p >= 1.0:
        return AttentionChoice("attention dropout is 1")
    query, key, value = core.query, core.key, core.value
    reason = any_skipped(core.module, query, key, value, core.dropout) or transform()
    projections = plain_linear(query), plain_linear(key), plain_linear(value)
    if reason is None and dtype not in FUSABLE_DTYPES:
        reason = f"no kernels for {dtype}"
    if reason is None:
        reason = _heads_reason(
            [m.weight for m, plain in zip((query, key, value), projections, strict=True) if plain], core
        )
    said = () if all(projections) else (_OWN_PROJECTION,)
    return AttentionChoice(reason, projections, head_dim, said=said)


def _heads_reason(weights: list[Any], core: CoreParts) -> str | None:
    """Why the rows of projections `[heads * head_dim, H]` are not as many heads in each of them, or None."""
    rows = {weight.shape[0] for weight in weights}
    if len(rows) > 1:
        return "query, key and value have different numbers of heads"
    if any(count % core.head_dim for count in rows):
        return "the widths of query, key and value are not multiples of head_dim"
    return None


def _own_code(layer: Any, half: int) -> bool:
    """Whether a module around the parts of one half of a layer is of another class than is known."""
    for path, classes in layer._rk_around[half]:
        module = layer
        for step in path.split("."):
            module = module._modules[step]
        if type(module) not in classes:
            return True
    return False


def attention_choice(layer: Any, dtype: torch.dtype, hidden: int) -> AttentionChoice:
    if _own_code(layer, 0):
        return AttentionChoice(_OWN_CODE)
    parts = attention_parts(layer)
    own = self_attention_choice(parts.core, dtype)
    end = output_choice(parts.output, dtype, hidden)
    reason = replaced(layer) or skipped(parts.module) or own.reason or end.reason
    return AttentionChoice(reason, own.projections, own.head_dim, end, own.said + end.said)


def feed_forward_choice(layer: Any, dtype: torch.dtype, hidden: int, autocast: torch.dtype | None) -> FeedForwardChoice:
    if _own_code(layer, 1):
        return FeedForwardChoice(_OWN_CODE)
    parts = feed_forward_parts(layer)
    w_in, activation, w_out = parts.inner, parts.activation, parts.output.dense
    end = output_choice(parts.output, dtype, hidden)
    reason = any_skipped(parts.module, w_in, activation) or end.reason
    plain = plain_linear(w_in) and plain_linear(w_out)
    said = end.said if plain else (_OWN_FEED_FORWARD, *end.said)
    gelu = gelu_kind(activation)
    if (
        not plain
        or w_in.bias is None
        or (autocast is not None and unserved(autocast, w_in.weight.device) is not None)
        or (autocast is None and not (w_in.weight.dtype == w_in.bias.dtype == w_out.weight.dtype == dtype))
    ):
        gelu = None
    return FeedForwardChoice(reason, gelu, autocast, end, said)


def layer_choice(layer: Any, dtype: torch.dtype, hidden: int, autocast: torch.dtype | None) -> LayerChoice:
    """Of a layer with a fast class, for hidden states `[..., hidden]` of this dtype. autocast: its dtype, if any."""
    return LayerChoice(attention_choice(layer, dtype, hidden), feed_forward_choice(layer, dtype, hidden, autocast))


def autocast_dtype(device_type: str) -> torch.dtype | None:
    enabled = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if enabled else None
