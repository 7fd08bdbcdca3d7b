"""Which Hugging Face classes are known, and what each is: the one place that a new family is added to.

Names only. Whether a class of a known name is the code that the fused code stands in for, known_code.py finds out.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_HEADS = {
    "ForMaskedLM": "masked_lm_head",
    "ForCausalLM": "next_token_head",
    "ForTokenClassification": "token_head",
    "ForQuestionAnswering": "span_head",
    "ForSequenceClassification": "head",
    "ForMultipleChoice": "head",
}
_LAYERS = {"SelfOutput": "self_output", "Layer": "layer", "Model": "model"}
_ROBERTA = {"Embeddings": "embeddings", "LMHead": "vocabulary"} | _LAYERS | _HEADS
_BERT = _LAYERS | _HEADS | {"ForPreTraining": "token_head", "ForNextSentencePrediction": "head"}
MODELS = ("model", "biased_model", "attention_model")  # roles of models without a head
_ATTENTION_ONLY = {"SelfAttention": "self_attention", "Model": "attention_model"}
_OWN_LAYER = dict.fromkeys(
    ("Layer", "Embeddings"), "only the attention of this family is the known code, and runs fused; this is the original"
)


@dataclass(frozen=True)
class Family:
    """prefix: of its class names. roles: class name without the prefix -> what the class is to the fused code.

    model: name without the prefix of the class that transformers gives by its public name and whose module has the
    others. left: class name without the prefix -> why `patch` leaves it, which its report says. own: arguments of the
    model that change nothing in what runs fused. bare: names without any prefix -> roles. encoder: where a model has
    its layers.
    """

    prefix: str
    roles: Mapping[str, str]
    model: str = "Model"
    left: Mapping[str, str] = field(default_factory=dict)
    own: frozenset[str] = frozenset()
    bare: Mapping[str, str] = field(default_factory=dict)
    encoder: str = "encoder"

    def role(self, name: str) -> str | None:
        return self.bare.get(name) or (
            self.roles.get(name[len(self.prefix) :]) if name.startswith(self.prefix) else None
        )


def _embeddings_left(what: str) -> dict[str, str]:
    return {"Embeddings": f"embeddings {what} run the original code (the layers are fused)"}


# By transformers package. The layers of the first nine families are the same code, those of DistilBERT the same
# mathematics, and of MPNet but for a bias on the scores; of the last three the attention alone is.
FAMILIES = {
    "transformers.models.roberta": Family("Roberta", _ROBERTA),
    "transformers.models.xlm_roberta": Family("XLMRoberta", _ROBERTA),
    "transformers.models.camembert": Family("Camembert", _ROBERTA),
    "transformers.models.data2vec": Family("Data2VecText", _ROBERTA),
    "transformers.models.bert": Family(
        "Bert", _BERT | {"Embeddings": "absolute_embeddings", "LMHeadModel": "next_token_head"}
    ),
    "transformers.models.electra": Family(
        "Electra",
        _BERT
        | {
            "Embeddings": "absolute_embeddings",
            "ForPreTraining": "discriminator_head",
            "ForMultipleChoice": "summary_head",
        },
    ),
    "transformers.models.ernie": Family("Ernie", _BERT, left=_embeddings_left("with task types")),
    "transformers.models.bert_generation": Family(
        "BertGeneration",
        {"SelfOutput": "self_output", "Layer": "layer", "Encoder": "model", "Decoder": "next_token_head"},
        model="Encoder",
        left=_embeddings_left("without token types"),
    ),
    "transformers.models.roc_bert": Family(
        "RoCBert",
        # Its pretraining loss has labels under other names.
        _BERT | {"ForPreTraining": "span_head"},
        left=_embeddings_left("of shapes and pronunciations"),
    ),
    "transformers.models.distilbert": Family(
        "DistilBert",
        {"Model": "model"} | {name: role for name, role in _HEADS.items() if name != "ForCausalLM"},
        own=frozenset({"token_type_ids"}),  # which it has none of
        bare={"Embeddings": "typeless_absolute_embeddings", "TransformerBlock": "distilbert_layer"},
        encoder="transformer",
    ),
    "transformers.models.mpnet": Family(
        "MPNet",
        {"Embeddings": "typeless_embeddings", "Layer": "mpnet_layer", "Model": "biased_model"}
        | {name: role for name, role in _HEADS.items() if name != "ForCausalLM"},
        own=frozenset({"token_type_ids"}),  # which it has none of
    ),
    "transformers.models.roberta_prelayernorm": Family("RobertaPreLayerNorm", _ATTENTION_ONLY, left=_OWN_LAYER),
    "transformers.models.xlm_roberta_xl": Family("XLMRobertaXL", _ATTENTION_ONLY, left=_OWN_LAYER),
    "transformers.models.xmod": Family("Xmod", _ATTENTION_ONLY, left=_OWN_LAYER, own=frozenset({"lang_ids"})),
}


# Classes of other packages around those models, by package and name.
_OTHERS = {("sentence_transformers", "SpladePooling"): "splade_pooling"}


def _package(cls: type) -> str:
    """ "transformers.models.roberta" of a class in a module of that package, whatever the module's own name."""
    return cls.__module__.rpartition(".")[0]


def family_of(cls: type) -> Family | None:
    """The family that a class belongs to by package and name, or None."""
    family = FAMILIES.get(_package(cls))
    known = family is not None and (cls.__name__.startswith(family.prefix) or cls.__name__ in family.bare)
    return family if known else None


@functools.cache
def role_of(cls: type) -> str | None:
    """What a Hugging Face class is to the fused code, or None for a class that is none of the families'."""
    family = family_of(cls)
    if family is None:
        return _OTHERS.get((cls.__module__.partition(".")[0], cls.__name__))
    return family.role(cls.__name__)


def why_left(cls: type) -> str | None:
    """Why `patch` leaves a class of a known family that a reader would expect to see replaced, or None."""
    family = family_of(cls)
    return None if family is None else family.left.get(cls.__name__[len(family.prefix) :])


def part_class(cls: type, part: str) -> Any:
    """The Hugging Face class that stands beside `cls`: for XLMRobertaLayer and "Config", XLMRobertaConfig; or None."""
    family = family_of(cls)
    return None if family is None else getattr(sys.modules[cls.__module__], family.prefix + part, None)


def _module(package: str, family: Family) -> Any:
    """The module that has the family's classes: that of its model, which transformers gives by its public name."""
    try:
        return sys.modules[getattr(importlib.import_module(package), family.prefix + family.model).__module__]
    except (ImportError, AttributeError):  # not in this release
        return None


def family_class(name: str) -> Any:
    """The Hugging Face class of that name, e.g. "XLMRobertaLayer", or None."""
    for package, family in FAMILIES.items():
        if name.startswith(family.prefix) and name[len(family.prefix) :] in family.roles:
            return getattr(_module(package, family), name, None)
    return None


def family_classes(*roles: str) -> list[Any]:
    """Every known Hugging Face class of these roles that this release of transformers has."""
    found = (
        getattr(_module(package, family), name, None)
        for package, family in FAMILIES.items()
        for name, role in [*((family.prefix + part, role) for part, role in family.roles.items()), *family.bare.items()]
        if role in roles
    )
    return [cls for cls in found if cls is not None]
