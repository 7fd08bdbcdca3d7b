"""Which rows of a batch are computed, where only its data tells: decided once the mask was read."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from roberta_kernels.hf import route
from roberta_kernels.hf.arguments import is_causal
from roberta_kernels.hf.fusable import data_hidden
from roberta_kernels.hf.state import state_of
from roberta_kernels.unpadding import Padding, Unpadding, all_rows, look

_UNIFORM = "a row that sees no key, of which eager attention takes the mean over all positions"
_NOT_FINITE = "inputs_embeds are not finite at padding, from where the original lets it pass on"


def layout(
    model: Any, chosen: route.Unpadded, kwargs: dict[str, Any]
) -> Unpadding | route.Padded | route.ThroughInterface | route.Original:
    """The unpadded layout of a call, or the route to take in its place."""
    embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
    given: Tensor = kwargs["input_ids"] if embeds is None else embeds
    causal = is_causal(model)
    padding = None if mask is None else look(mask)
    if padding is None:
        return all_rows(given.shape[0], given.shape[1], given.device, causal)
    # A head that leaves padded rows alone still reads position 0 of a sequence that has no real token.
    reason = _original(model, padding, embeds, causal and chosen.reads == "all")
    if reason is not None:
        return route.Original(reason)
    if model._rk_biased and chosen.reads != "all" and not padding.at_the_end():
        return route.because(chosen.padded, "padding that is not at the end, and a bias on the scores, by position")
    if chosen.reads == "real":
        return padding.real_rows(causal)
    reason = chosen.differ or _differ(model, padding, kwargs, causal)
    if reason is None:
        return padding.one_row(causal)
    if chosen.reads == "returned":
        return padding.real_rows(causal)
    state_of(model).computed_padding(model, reason, padding.rows, padding.padded)
    return route.because(chosen.padded, reason)


def original(model: Any, kwargs: dict[str, Any]) -> str | None:
    """Why a call in the padded layout needs the original after all, or None. Looks at the data where something may be
    wrong, and there are data."""
    embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
    if mask is None or not (_uniform(model) or embeds is not None) or data_hidden(mask):
        return None
    if embeds is not None and mask.shape != embeds.shape[:2]:
        return None  # with a cache, of the tokens before too
    padding = look(mask)
    return None if padding is None else _original(model, padding, embeds, is_causal(model))


def _uniform(model: Any) -> bool:
    """Whether a row that sees no key gets the mean over all positions in the original (of scores that are all the same
    lowest number), and not zeros, as here and under sdpa."""
    return model.config._attn_implementation in (None, "eager")


def _original(model: Any, padding: Padding, embeds: Tensor | None, causal: bool) -> str | None:
    if _uniform(model) and padding.blind(causal):
        return _UNIFORM
    # A sum is finite where all is, but for an overflow, which costs a look at each.
    if embeds is not None and not embeds.detach().sum().isfinite() and not embeds[~padding.real].isfinite().all():
        return _NOT_FINITE
    return None


def _differ(model: Any, padding: Padding, kwargs: dict[str, Any], causal: bool) -> str | None:
    """Why the padded rows of a sequence are not one row, or None: of ids, on their way to fused embeddings."""
    input_ids, types = kwargs["input_ids"], kwargs.get("token_type_ids")
    positions = kwargs.get("position_ids")
    positions_given = positions is not None
    if types is None and not positions_given and not causal and padding.holds(model.embeddings.padding_idx, input_ids):
        return None  # the usual case: one id, which has one position, and so one type
    if positions is None:
        positions = model.embeddings.positions(input_ids)
    per_row = [input_ids, positions.expand(input_ids.shape)]
    if types is not None:
        per_row.append(types.expand(input_ids.shape))
    *same, same_keys = padding.alike(per_row, causal)
    if not same[0] or not (same[1] or positions_given):
        return "masked tokens that are not padding"
    if not same[1]:
        return "padded rows have several positions"
    if not all(same):
        return "padded rows have several token types"
    return None if same_keys else "padding before a real token sees fewer keys than padding after it"
