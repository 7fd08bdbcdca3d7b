"""What a SentenceTransformer does around its encoder, as options of encode()."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from roberta_kernels.encoding.sources import EncodingError


@dataclass(frozen=True)
class SentenceModel:
    """model: the transformers model inside. pooling, normalize: what is done with its token vectors."""

    model: Any
    tokenizer: Any
    pooling: str
    normalize: bool


def as_sentence_model(model: Any, poolings: tuple[str, ...]) -> SentenceModel | None:
    """The parts of a SentenceTransformer; None where the model is not one.

    Raises EncodingError for one that does more than its transformer, a pooling out of `poolings` and a normalisation.
    """
    library = sys.modules.get("sentence_transformers")  # not imported: there is no such model
    if library is None or not isinstance(model, library.SentenceTransformer):
        return None
    modules = list(model)
    names = [type(module).__name__ for module in modules]
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise _cannot(f"has the modules {', '.join(names)}")
    transformer, pooling = modules[:2]
    mode = getattr(pooling, "pooling_mode", None) or pooling.get_pooling_mode_str()
    if mode not in poolings:
        raise _cannot(f"pools by {mode}")
    if (model.prompts or {}).get(model.default_prompt_name):
        raise _cannot("puts a prompt before each text")
    if model.truncate_dim is not None:
        raise _cannot("truncates its embeddings")
    tokenizer = model.tokenizer
    if transformer.do_lower_case and tokenizer("A").input_ids != tokenizer("a").input_ids:
        raise _cannot("lowercases texts before its tokenizer")
    return SentenceModel(transformer.auto_model, tokenizer, mode, len(modules) == 3)


def _cannot(what: str) -> EncodingError:
    return EncodingError(
        f"this SentenceTransformer {what}, which encode() does not do: "
        "roberta_kernels.patch(model), then model.encode(texts)"
    )
