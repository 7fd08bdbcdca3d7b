"""What a corpus is encoded with: an encoder, its tokenizer, and what is done with the token vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from roberta_kernels.encoding import embedding
from roberta_kernels.encoding.sentence_model import as_sentence_model
from roberta_kernels.encoding.sources import EncodingError
from roberta_kernels.encoding.tokenization import Tokens


@dataclass(frozen=True)
class Subject:
    """model: as it was given, or what is inside a SentenceTransformer. base: its encoder."""

    model: nn.Module
    base: Any
    tokens: Tokens
    pooling: str
    normalize: bool

    def identity(self) -> dict[str, Any]:
        """What embeddings depend on, as JSON values. Reads every weight, so before they leave memory."""
        return {
            "model": embedding.model_fingerprint(self.base),
            "tokenizer": embedding.tokenizer_fingerprint(self.tokens.tokenizer),
            "pooling": self.pooling,
            "normalize": self.normalize,
            "max_length": self.tokens.longest,
        }


def subject_of(
    model: nn.Module, tokenizer: Any, pooling: str | None, normalize: bool | None, max_length: int | None
) -> Subject:
    """With what is open (None) decided. Raises as encode() does."""
    sentences = as_sentence_model(model, embedding.POOLINGS)
    if sentences is not None:
        model, tokenizer = sentences.model, tokenizer or sentences.tokenizer
        pooling = sentences.pooling if pooling is None else pooling
        normalize = sentences.normalize if normalize is None else normalize
    pooling, normalize = pooling or "mean", bool(normalize)
    if pooling not in embedding.POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(embedding.POOLINGS)}, got {pooling!r}")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    base = embedding.encoder_of(model)
    if tokenizer is None:
        raise TypeError("encode needs the model's tokenizer; only a SentenceTransformer brings its own")
    tokens = Tokens(tokenizer, _longest(base, tokenizer, max_length), base.config)
    return Subject(model, base, tokens, pooling, normalize)


def _longest(base: Any, tokenizer: Any, max_length: int | None) -> int:
    """The most tokens of a text."""
    longest = embedding.longest_input(base, tokenizer)
    if max_length is not None and max_length > longest:
        raise EncodingError(f"max_length must be at most {longest}, which the model takes, got {max_length}")
    special = tokenizer.num_special_tokens_to_add() if hasattr(tokenizer, "num_special_tokens_to_add") else 0
    if max_length is not None and max_length <= special:
        raise EncodingError(
            f"max_length must be at least {special + 1}, {special} special tokens and one of the text, got {max_length}"
        )
    return max_length or longest
