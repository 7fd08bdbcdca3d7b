"""Which Hugging Face classes are known, and what each is: the one place that a new family is added to."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field

_HEADS = {
    "ForMaskedLM": "token_head",
    "ForCausalLM": "next_token_head",
    "ForTokenClassification": "token_head",
    "ForQuestionAnswering": "span_head",
    "ForSequenceClassification": "head",
    "ForMultipleChoice": "head",
}
_LAYERS = {"SelfOutput": "self_output", "Layer": "layer", "Model": "model"}
_ROBERTA = {"Embeddings": "embeddings"} | _LAYERS | _HEADS
_BERT = _LAYERS | _HEADS | {"ForPreTraining": "token_head", "ForNextSentencePrediction": "head"}
_ATTENTION_ONLY = {"SelfAttention": "self_attention", "Model": "attention_model"}
_OWN_LAYER = dict.fromkeys(
    ("Layer", "Embeddings"), "only the attention of this family is the known code, and runs fused; this is the original"
)


@dataclass(frozen=True)
class Family:
    """prefix: of its class names. roles: class name without the prefix -> what the class is to the fused code.

    encoder: name of the class of the model's `encoder`, without the prefix if it has one. pooled: whether the model's
    output has a place for a pooler's. left: class name without the prefix -> why `patch` leaves it, which its report
    says.
    """

    prefix: str
    roles: Mapping[str, str]
    encoder: str = "Encoder"
    pooled: bool = True
    left: Mapping[str, str] = field(default_factory=dict)

    def class_name(self, part: str) -> str:
        return self.encoder if part == "Encoder" and self.encoder != part else self.prefix + part


def _embeddings_left(what: str) -> dict[str, str]:
    return {"Embeddings": f"embeddings {what} run the original code (the layers are fused)"}


# By transformers module. The layers of the first nine families are the same code, those of the last three are not.
FAMILIES = {
    "transformers.models.roberta.modeling_roberta": Family("Roberta", _ROBERTA),
    "transformers.models.xlm_roberta.modeling_xlm_roberta": Family("XLMRoberta", _ROBERTA),
    "transformers.models.camembert.modeling_camembert": Family("Camembert", _ROBERTA),
    "transformers.models.data2vec.modeling_data2vec_text": Family("Data2VecText", _ROBERTA),
    "transformers.models.bert.modeling_bert": Family(
        "Bert", _BERT | {"Embeddings": "absolute_embeddings", "LMHeadModel": "next_token_head"}
    ),
    "transformers.models.electra.modeling_electra": Family(
        "Electra",
        _BERT
        # Its pretraining loss leaves masked positions out, whatever their label is.
        | {"Embeddings": "absolute_embeddings", "ForPreTraining": "head", "ForMultipleChoice": "summary_head"},
        pooled=False,
    ),
    "transformers.models.ernie.modeling_ernie": Family("Ernie", _BERT, left=_embeddings_left("with task types")),
    "transformers.models.bert_generation.modeling_bert_generation": Family(
        "BertGeneration",
        {"SelfOutput": "self_output", "Layer": "layer", "Encoder": "model", "Decoder": "next_token_head"},
        encoder="BertEncoder",
        pooled=False,
        left=_embeddings_left("without token types"),
    ),
    "transformers.models.roc_bert.modeling_roc_bert": Family(
        "RoCBert",
        # Its pretraining loss has labels under other names.
        _BERT | {"ForPreTraining": "span_head"},
        left=_embeddings_left("of shapes and pronunciations"),
    ),
    "transformers.models.roberta_prelayernorm.modeling_roberta_prelayernorm": Family(
        "RobertaPreLayerNorm", _ATTENTION_ONLY, left=_OWN_LAYER
    ),
    "transformers.models.xlm_roberta_xl.modeling_xlm_roberta_xl": Family(
        "XLMRobertaXL", _ATTENTION_ONLY, left=_OWN_LAYER
    ),
    "transformers.models.xmod.modeling_xmod": Family("Xmod", _ATTENTION_ONLY, left=_OWN_LAYER),
}

_LAYER_CALL = ("hidden_states", "attention_mask", "encoder_hidden_states", "encoder_attention_mask", "past_key_values")
_SELF_ATTENTION_CALL = ("hidden_states", "attention_mask", "past_key_values")
_OUTPUT_CALL = ("hidden_states", "input_tensor")
_EMBEDDINGS_CALL = ("input_ids", "token_type_ids", "position_ids", "inputs_embeds", "past_key_values_length")
# Role -> all named parameters that its forward must have, in this order. A future transformers whose class differs here
# is not the code that the fused layers stand in for.
_EXACT_CALLS = {
    "embeddings": _EMBEDDINGS_CALL,
    "absolute_embeddings": _EMBEDDINGS_CALL,
    "self_output": _OUTPUT_CALL,
    "self_attention": _SELF_ATTENTION_CALL,
    "layer": _LAYER_CALL,
}
# The same for the parts of a layer that a fused one steps over.
_PART_CALLS = {
    "Attention": _LAYER_CALL,
    "SelfAttention": _SELF_ATTENTION_CALL,
    "Intermediate": ("hidden_states",),
    "Output": _OUTPUT_CALL,
}
# Models and heads are called by name: these parameters they must have, in whatever order and among others.
_MODEL_CALL = frozenset(
    {
        *("input_ids", "attention_mask", "position_ids", "inputs_embeds", "encoder_hidden_states"),
        *("encoder_attention_mask", "past_key_values", "use_cache"),
    }
)
_HEAD_CALL = frozenset({"input_ids", "attention_mask"})


@dataclass(frozen=True)
class Role:
    """role: what the class is to the fused code. mismatch: how it differs from what is known, or None."""

    role: str
    mismatch: str | None


def _family_and_part(cls: type) -> tuple[Family, str] | None:
    family = FAMILIES.get(cls.__module__)
    if family is None or not cls.__name__.startswith(family.prefix):
        return None
    return family, cls.__name__[len(family.prefix) :]


@functools.cache
def role_of(cls: type) -> Role | None:
    """The role of a Hugging Face class, or None for a class that is none of the families'."""
    found = _family_and_part(cls)
    if found is None or found[1] not in found[0].roles:
        return None
    role = found[0].roles[found[1]]
    return Role(role, _mismatch(cls, role))


def why_left(cls: type) -> str | None:
    """Why `patch` leaves a class of a known family that a reader would expect to see replaced, or None."""
    found = _family_and_part(cls)
    return None if found is None else found[0].left.get(found[1])


def _parameters(cls: type) -> tuple[str, ...]:
    """Names of the parameters of forward; those that *args and **kwargs gather are none of them."""
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]  # type: ignore[attr-defined]
    return tuple(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


def _call_mismatch(cls: type, expected: tuple[str, ...]) -> str | None:
    found = _parameters(cls)
    if found != expected:
        return f"{cls.__name__}.forward takes ({', '.join(found)}), expected ({', '.join(expected)})"
    return None


def _mismatch(cls: type, role: str) -> str | None:
    if role in _EXACT_CALLS:
        mismatch = _call_mismatch(cls, _EXACT_CALLS[role])
        if mismatch is not None:
            return mismatch
    else:
        missing = (_MODEL_CALL if role.endswith("model") else _HEAD_CALL).difference(_parameters(cls))
        if missing:
            return f"{cls.__name__}.forward takes no {', '.join(sorted(missing))}"
    if role.endswith("model") and not hasattr(cls, "_create_attention_masks"):
        return f"{cls.__name__} has no _create_attention_masks"
    if role == "layer":
        if not hasattr(cls, "feed_forward_chunk"):
            return f"{cls.__name__} has no feed_forward_chunk"
        for part, expected in _PART_CALLS.items():
            known = part_class(cls, part)
            if known is None:
                return f"{cls.__module__} has no {part}"
            mismatch = _call_mismatch(known, expected)
            if mismatch is not None:
                return mismatch
    return None


def part_class(cls: type, part: str) -> type | None:
    """The Hugging Face class that stands beside `cls`: for XLMRobertaLayer and "Output", XLMRobertaOutput."""
    name = FAMILIES[cls.__module__].class_name(part)
    return getattr(importlib.import_module(cls.__module__), name, None)


def family_class(name: str) -> type | None:
    """The Hugging Face class of that name, e.g. "XLMRobertaLayer", or None."""
    for module, family in FAMILIES.items():
        if name.startswith(family.prefix) and name[len(family.prefix) :] in family.roles:
            return getattr(importlib.import_module(module), name, None)
    return None


def family_classes(*roles: str) -> list[type]:
    """Every known Hugging Face class of these roles."""
    found = (
        getattr(importlib.import_module(module), family.prefix + name, None)
        for module, family in FAMILIES.items()
        for name, role in family.roles.items()
        if role in roles
    )
    return [cls for cls in found if cls is not None]
