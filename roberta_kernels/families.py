"""Which Hugging Face classes are known, and what each is: the one place that a new family is added to."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass

# transformers module -> prefix of its class names. The layer code of these families is identical.
FAMILIES = {
    "transformers.models.roberta.modeling_roberta": "Roberta",
    "transformers.models.xlm_roberta.modeling_xlm_roberta": "XLMRoberta",
}

# Class name without its prefix -> (role, parameters that its forward must have, in this order).
# A future transformers whose class differs here is not the code that the fused layers stand in for.
_ROLES = {
    "Embeddings": (
        "embeddings",
        ("input_ids", "token_type_ids", "position_ids", "inputs_embeds", "past_key_values_length"),
    ),
    "SelfOutput": ("self_output", ("hidden_states", "input_tensor")),
    "Layer": (
        "layer",
        ("hidden_states", "attention_mask", "encoder_hidden_states", "encoder_attention_mask", "past_key_values"),
    ),
    "Model": (
        "model",
        (
            *("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"),
            *("encoder_hidden_states", "encoder_attention_mask", "past_key_values", "use_cache"),
        ),
    ),
    "ForMaskedLM": ("token_head", ("input_ids", "attention_mask")),
    "ForCausalLM": ("next_token_head", ("input_ids", "attention_mask")),
    "ForTokenClassification": ("token_head", ("input_ids", "attention_mask")),
    "ForQuestionAnswering": ("span_head", ("input_ids", "attention_mask")),
    "ForSequenceClassification": ("head", ("input_ids", "attention_mask")),
    "ForMultipleChoice": ("head", ("input_ids", "token_type_ids", "attention_mask")),
}


@dataclass(frozen=True)
class Role:
    """role: what the class is to the fused code. mismatch: how it differs from what is known, or None."""

    role: str
    mismatch: str | None


def role_of(cls: type) -> Role | None:
    """The role of a Hugging Face class, or None for a class that is none of the families'."""
    prefix = FAMILIES.get(cls.__module__)
    if prefix is None or not cls.__name__.startswith(prefix):
        return None
    known = _ROLES.get(cls.__name__[len(prefix) :])
    if known is None:
        return None
    role, parameters = known
    return Role(role, _mismatch(cls, role, parameters))


def _mismatch(cls: type, role: str, parameters: tuple[str, ...]) -> str | None:
    found = tuple(inspect.signature(cls.forward).parameters)[1:]  # type: ignore[attr-defined]
    if found[: len(parameters)] != parameters:
        return f"{cls.__name__}.forward takes ({', '.join(found)}), expected ({', '.join(parameters)}, ...)"
    if role == "model" and not hasattr(cls, "_create_attention_masks"):
        return f"{cls.__name__} has no _create_attention_masks"
    if role == "layer" and not hasattr(cls, "feed_forward_chunk"):
        return f"{cls.__name__} has no feed_forward_chunk"
    return None


def part_class(cls: type, part: str) -> type | None:
    """The Hugging Face class that stands beside `cls`: for XLMRobertaLayer and "Output", XLMRobertaOutput."""
    return getattr(importlib.import_module(cls.__module__), FAMILIES[cls.__module__] + part, None)


def family_class(name: str) -> type | None:
    """The Hugging Face class of that name, e.g. "XLMRobertaLayer", or None."""
    for module, prefix in sorted(FAMILIES.items(), key=lambda item: -len(item[1])):
        if name.startswith(prefix) and name[len(prefix) :] in _ROLES:
            return getattr(importlib.import_module(module), name, None)
    return None


def family_classes(*roles: str) -> list[type]:
    """Every known Hugging Face class of these roles."""
    names = [name for name, (role, _) in _ROLES.items() if role in roles]
    return [
        getattr(importlib.import_module(module), prefix + name) for module, prefix in FAMILIES.items() for name in names
    ]
