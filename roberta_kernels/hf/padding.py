"""Which rows of a batch are computed, where only its data tells: decided once the mask was read."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from roberta_kernels.hf import route
from roberta_kernels.hf.arguments import is_causal
from roberta_kernels.hf.fusable import data_hidden
from roberta_kernels.hf.state import state_of
from roberta_kernels.unpadding import Padding, Unpadding, all_rows, ask, differences, look, other_ids, padding_before

_UNIFORM = "a row that sees no key, of which eager attention takes the mean over all positions"
_NOT_FINITE = "inputs_embeds are not finite at padding, from where the original lets it pass on"


def layout(
    model: Any, chosen: route.Unpadded, kwargs: dict[str, Any], unless: Tensor | None = None
) -> Unpadding | route.Padded | route.ThroughInterface | route.Original:
    """The unpadded layout of a call, or the route to take in its place. One read on the host, in which all that may be
    asked of the data is answered; a second where padded rows of several ids are not alike by that.

    unless: as RealRows'.
    """
    embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
    given: Tensor = kwargs["input_ids"] if embeds is None else embeds
    causal = is_causal(model)
    questions = _Questions(model, chosen, kwargs, unless, causal)
    padding = None if mask is None else look(mask, questions.all)
    if padding is None:
        return all_rows(given.shape[0], given.shape[1], given.device, causal)
    reads = route.reads(model) if padding.answers.get("unless") else chosen.reads
    # A head that leaves padded rows alone still reads position 0 of a sequence that has no real token.
    reason = _original(model, padding, embeds, causal and reads == "all")
    if reason is not None:
        return route.Original(reason)
    if model._rk_biased and reads != "all" and padding.answers["before"]:
        return route.because(chosen.padded, "padding that is not at the end, and a bias on the scores, by position")
    if reads == "real":
        return padding.real_rows(causal)
    reason = chosen.differ or questions.differ(padding)
    if reason is None:
        return padding.one_row(causal)
    if reads == "returned":
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
    padding = look(mask, lambda real, first: _of_embeds(embeds))
    return None if padding is None else _original(model, padding, embeds, is_causal(model))


def _uniform(model: Any) -> bool:
    """Whether a row that sees no key gets the mean over all positions in the original (of scores that are all the same
    lowest number), and not zeros, as here and under sdpa."""
    return model.config._attn_implementation in (None, "eager")


def _of_embeds(embeds: Tensor | None) -> dict[str, Tensor]:
    # A sum is finite where all is, but for an overflow, which costs a look at each.
    return {} if embeds is None else {"not finite": ~embeds.detach().sum().isfinite()}


def _original(model: Any, padding: Padding, embeds: Tensor | None, causal: bool) -> str | None:
    if _uniform(model) and padding.blind(causal):
        return _UNIFORM
    if embeds is not None and padding.answers["not finite"] and not embeds[~padding.real].isfinite().all():
        return _NOT_FINITE
    return None


class _Questions:
    """What a call asks of a batch with padding."""

    def __init__(
        self, model: Any, chosen: route.Unpadded, kwargs: dict[str, Any], unless: Tensor | None, causal: bool
    ) -> None:
        self._model, self._kwargs, self._causal = model, kwargs, causal
        self._unless = unless
        self._before = model._rk_biased and (chosen.reads != "all" or unless is not None)
        self._differ = chosen.differ is None and (chosen.reads != "real" or unless is not None)
        # The usual case: one id, which has one position, and so one type.
        self._usual = kwargs.get("token_type_ids") is None and kwargs.get("position_ids") is None and not causal

    def all(self, real: Tensor, first: Tensor) -> dict[str, Tensor]:
        asked = _of_embeds(self._kwargs.get("inputs_embeds"))
        if self._unless is not None:
            asked["unless"] = self._unless
        if self._before:
            asked["before"] = padding_before(real)
        if self._differ:
            asked |= self._other_ids(real) if self._usual else self._rows_differ(real, first)
        return asked

    def _other_ids(self, real: Tensor) -> dict[str, Tensor]:
        return {"other ids": other_ids(self._model.embeddings.padding_idx, self._kwargs["input_ids"], real)}

    def _rows_differ(self, real: Tensor, first: Tensor) -> dict[str, Tensor]:
        """Of ids, on their way to fused embeddings."""
        input_ids, types = self._kwargs["input_ids"], self._kwargs.get("token_type_ids")
        positions = self._kwargs.get("position_ids")
        if positions is None:
            positions = self._model.embeddings.positions(input_ids)
        per_row = {"ids": input_ids, "positions": positions.expand(input_ids.shape)}
        if types is not None:
            per_row["types"] = types.expand(input_ids.shape)
        return differences(per_row, self._causal, real, first)

    def differ(self, padding: Padding) -> str | None:
        """Why the padded rows of a sequence are not one row, or None."""
        found = padding.answers
        if self._usual:
            if not found["other ids"]:
                return None
            found = ask(self._rows_differ(padding.real, padding.first))
        positions_given = self._kwargs.get("position_ids") is not None
        if found["ids"] or (found["positions"] and not positions_given):
            return "masked tokens that are not padding"
        if found["positions"]:
            return "padded rows have several positions"
        if found.get("types"):
            return "padded rows have several token types"
        return "padding before a real token sees fewer keys than padding after it" if found.get("keys") else None
