"""`attn_implementation="roberta_kernels"`: the attention op under transformers' own switch, for any model that has one.

Importing the package registers two functions under that name: what computes attention (AttentionInterface), and what
makes its mask (AttentionMaskInterface; without the second, transformers hands the first no mask at all). Nothing of the
model is replaced: `patch` fuses more.

The mask keeps to what the op takes, and never grows to `[B, 1, S, S]` for that: None; bool `[B, 1, 1, K]`, keys that
may be seen; bool `[B, K]`, the same, and each query sees no key after its own. Any other pattern comes as transformers
makes it for sdpa, and torch's attention takes it. The reasons are counted (`fallbacks()`).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from roberta_kernels import decoder_calls, ops
from roberta_kernels.hf.fusable import transform, unserved
from roberta_kernels.hf.names import ATTENTION
from roberta_kernels.hf.state import PatchState, attached, logger
from roberta_kernels.ops.attention import supported_head_dim
from roberta_kernels.unpadding import equal_lengths

# A token that is decoded by itself: the time is that of reading keys and values, and other kernels are handed a copy.
ONE_QUERY = "one query, whose keys only inference on the compiled CPU kernels reads in place"
_state = PatchState()
unavailable: str | None = None  # why no model can use it, or None

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask
except ImportError as error:  # a release that has them elsewhere; everything but this switch works without
    unavailable = f"this release of transformers is not as known: {error}"


def _register() -> None:
    """Makes `attn_implementation="roberta_kernels"` known to transformers. Where a release does not allow it,
    `unavailable` says why.
    """
    if unavailable is not None:
        logger.info("roberta_kernels: no attn_implementation=%r: %s", ATTENTION, unavailable)
        return
    AttentionInterface.register(ATTENTION, attention_forward)
    AttentionMaskInterface.register(ATTENTION, attention_mask)


def fallbacks() -> dict[str, int]:
    """Class of the attention module and reason -> calls that torch's attention took, in this process. A patched model's
    are in its report."""
    return _state.reasons()


def attention_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a forward pass, as transformers asks for it.

    attention_mask: bool `[B, K]` or None.

    Returns:
        None, `[B, K]` or `[B, 1, 1, K]` (see above), or sdpa's `[B, 1, Q, K]`.
    """
    mask_function = causal_mask_function if mask_function is None else mask_function
    # A static cache has more keys than there are tokens; a sliding one, or assisted generation, starts elsewhere.
    whole = kv_offset == 0 and (attention_mask is None or attention_mask.shape[-1] == kv_length)
    if whole and mask_function is bidirectional_mask_function:
        return None if attention_mask is None else attention_mask[:, None, None, :]
    last = isinstance(q_offset, int) and q_offset + q_length == kv_length
    if whole and last and mask_function is causal_mask_function and kwargs.get("allow_is_causal_skip", True):
        return attention_mask
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        # sdpa's None aligns the first query with the first key, and the op the last with the last.
        **(kwargs | {"allow_is_causal_skip": False}),
    )


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """query `[B, heads, Q, head_dim]`, key and value `[B, heads, K, head_dim]` -> (`[B, Q, heads, head_dim]`, None).

    Called by a model's attention module, with a mask of attention_mask() or one that the caller made (4D).
    """
    batch, heads, q_length, head_dim = query.shape
    kv_length = key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    key_mask, causal = None, bool(is_causal)
    if attention_mask is not None:
        causal = attention_mask.dim() == 2
        if causal or (attention_mask.dtype == torch.bool and attention_mask.shape[1:3] == (1, 1)):
            key_mask = attention_mask.reshape(-1, kv_length).expand(batch, kv_length)
    if attention_mask is not None and key_mask is None:
        reason: str | None = "a mask that is not one of keys"
    else:
        reason = _unserved(module, query, key, value, dropout, kwargs)
    # Not where queries are keys too: an encoder's, a prompt's.
    in_place = reason is None and q_length < kv_length and decoder_calls.reads_cache(query, key, value, dropout)
    if reason is None and q_length == 1 < kv_length and not in_place:
        reason = ONE_QUERY
    if reason is not None:
        (attached(module) or _state).fell_back(module, reason)
        if causal and q_length > 1:
            # torch's own causality aligns the first query with the first key.
            seen = key.new_ones(batch, kv_length, dtype=torch.bool) if key_mask is None else key_mask.bool()
            attention_mask = _causal_mask(seen, q_length)
        elif key_mask is not None:
            attention_mask = key_mask[:, None, None, :].bool()
        return _original(module, query, key, value, attention_mask, dropout, scaling, kwargs)
    causal = causal and q_length > 1  # a mask of keys says it all to a single query, which is the last
    if in_place:
        scale = head_dim**-0.5 if scaling is None else float(scaling)
        return decoder_calls.cached_attention(query, key, value, key_mask, scale, causal), None
    lengths_q = equal_lengths(batch, q_length, query.device)
    same = q_length == kv_length
    context = ops.attention(
        query.transpose(1, 2).reshape(batch * q_length, heads, head_dim),
        key.transpose(1, 2).reshape(batch * kv_length, heads, head_dim),
        value.transpose(1, 2).reshape(batch * kv_length, heads, head_dim),
        lengths_q,
        lengths_q if same else equal_lengths(batch, kv_length, query.device),
        max_seqlen_q=q_length,
        max_seqlen_k=kv_length,
        scale=scaling,
        causal=causal,
        key_mask=None if key_mask is None else key_mask.reshape(-1),
        dropout_p=dropout,
        seed=ops.draw_seeds(1, query.device)[0] if dropout > 0 else None,
    )
    return context.view(batch, q_length, heads, head_dim), None


def _unserved(
    module: Any, query: Tensor, key: Tensor, value: Tensor, dropout: float, kwargs: dict[str, Any]
) -> str | None:
    """Why the op does not support this call, or None."""
    if _wants_weights(module, kwargs):
        return "attention weights were asked for"
    for name in ("position_bias", "softcap", "sliding_window", "s_aux", "cache"):
        if kwargs.get(name) is not None:
            return f"{name} was given"
    if key.shape[1] != query.shape[1]:
        return "heads that share keys"
    if value.shape[-1] != query.shape[-1] or not supported_head_dim(query.shape[-1]):
        return f"head_dim {query.shape[-1]} is not supported"
    if not query.dtype == key.dtype == value.dtype:
        return f"no kernels for {query.dtype}"
    if (reason := unserved(query.dtype, query.device)) is not None:
        return reason
    if query.numel() == 0 or key.numel() == 0:
        return "an empty batch"
    if dropout >= 1.0:
        return "attention dropout is 1"
    return transform()


def _wants_weights(module: Any, kwargs: dict[str, Any]) -> Any:
    return kwargs.get("output_attentions", getattr(getattr(module, "config", None), "output_attentions", False))


def _causal_mask(key_mask: Tensor, q_length: int) -> Tensor:
    """bool `[B, K]` -> bool `[B, 1, Q, K]`: each query, the last of them at the last key, sees no later one."""
    kv_length = key_mask.shape[1]
    keys = torch.arange(kv_length, device=key_mask.device)
    queries = keys[kv_length - q_length :]
    return key_mask[:, None, None, :] & (keys <= queries[:, None])


def _original(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    eager = getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)
    if eager is not None and _wants_weights(module, kwargs):
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
        return eager(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
    return sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=False, **kwargs
    )


_register()
