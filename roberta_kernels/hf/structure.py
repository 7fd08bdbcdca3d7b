"""The parts that a module of a known class must have, what they are to the fused code, and whether a class is still its
own.

DistilBERT's layer is RoBERTa's under other names, MPNet's too, with a bias on its scores: this is the one place that
knows them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch.nn.functional import gelu

# --- parts ------------------------------------------------------------------------------------------------------------

_OUTPUT_PARTS = {"dense", "LayerNorm", "dropout"}
# Module -> its children, and the attributes that the fused code reads.
_LAYER_STRUCTURE: dict[str, tuple[set[str], set[str]]] = {
    "": ({"attention", "intermediate", "output"}, {"chunk_size_feed_forward"}),
    "attention": ({"self", "output"}, set()),
    "attention.self": (
        {"query", "key", "value", "dropout"},
        {"attention_head_size", "scaling"},
    ),
    "attention.output": (_OUTPUT_PARTS, set()),
    "intermediate": ({"dense"}, {"intermediate_act_fn"}),
    "output": (_OUTPUT_PARTS, set()),
}
_TABLES = {"word_embeddings", "position_embeddings", "token_type_embeddings"}
_STRUCTURES: dict[str, dict[str, tuple[set[str], set[str]]]] = {
    "layer": _LAYER_STRUCTURE,
    "distilbert_layer": {
        "": ({"attention", "sa_layer_norm", "ffn", "output_layer_norm"}, set()),
        "attention": (
            {"q_lin", "k_lin", "v_lin", "out_lin", "dropout"},
            {"attention_head_size", "scaling"},
        ),
        "ffn": ({"lin1", "lin2", "dropout"}, {"activation", "chunk_size_feed_forward"}),
    },
    "mpnet_layer": {
        "": ({"attention", "intermediate", "output"}, set()),
        "attention": ({"attn", "LayerNorm", "dropout"}, set()),
        "attention.attn": ({"q", "k", "v", "o", "dropout"}, {"attention_head_size"}),
        **{name: _LAYER_STRUCTURE[name] for name in ("intermediate", "output")},
    },
    "self_attention": {"": _LAYER_STRUCTURE["attention.self"]},
    "self_output": {"": (_OUTPUT_PARTS, set())},
    "vocabulary": {"": ({"dense", "layer_norm", "decoder"}, set())},
    "embeddings": {"": (_TABLES | {"LayerNorm", "dropout"}, {"padding_idx"})},
    "absolute_embeddings": {"": (_TABLES | {"LayerNorm", "dropout"}, {"position_ids"})},
    "typeless_embeddings": {"": (_TABLES - {"token_type_embeddings"} | {"LayerNorm", "dropout"}, {"padding_idx"})},
    "typeless_absolute_embeddings": {
        "": (_TABLES - {"token_type_embeddings"} | {"LayerNorm", "dropout"}, {"position_ids"})
    },
}
# An activation may be a function; a decoder's layers may have a second attention, which never runs fused.
_OPTIONAL_PARTS = {"intermediate_act_fn", "activation", "crossattention"}
# Attributes of the modules inside that the fused code reads beside their parameters.
ATTRIBUTES = frozenset(
    {name for _, names in (part for parts in _STRUCTURES.values() for part in parts.values()) for name in names}
    | {"eps", "p", "normalized_shape", "max_norm", "scale_grad_by_freq", "sparse", "approximate"}
)


def structure_difference(module: Any, role: str) -> str | None:
    """How the parts of a module of a role differ from the known ones, or None."""
    for name, (children, attributes) in _STRUCTURES.get(role, {}).items():
        part = module
        for step in name.split("."):
            part = part._modules[step] if step else part
        found = set(part._modules)
        if not children <= found or not found <= children | _OPTIONAL_PARTS:
            return f"{type(part).__name__} holds {sorted(found)}, expected {sorted(children)}"
        missing = sorted(attribute for attribute in attributes if not hasattr(part, attribute))
        if missing:
            return f"{type(part).__name__} has no {', '.join(missing)}"
    return None


# --- what the parts are to the fused code -----------------------------------------------------------------------------


class CoreParts(NamedTuple):
    """Projections and attention. module: whose own call the fused code skips."""

    module: Any
    query: Any
    key: Any
    value: Any
    dropout: Any
    head_dim: int
    scale: float


class OutputParts(NamedTuple):
    """dense, dropout (None: there is none), residual and LayerNorm. modules: whose own call the fused code skips. dense
    is None where the product is part of something else."""

    modules: tuple[Any, ...]
    dense: Any
    dropout: Any
    norm: Any


class AttentionParts(NamedTuple):
    """The first half of a layer. module: around it, whose own call the fused code skips."""

    module: Any
    core: CoreParts
    output: OutputParts


class FeedForwardParts(NamedTuple):
    """The second half. module: around inner and activation. chunk: positions that it takes at a time; 0: all."""

    module: Any
    inner: Any
    activation: Any
    output: OutputParts
    chunk: int


def core_parts(module: Any) -> CoreParts:
    """Of a SelfAttention module."""
    parts = module._modules
    return CoreParts(
        *(module, parts["query"], parts["key"], parts["value"], parts["dropout"]),
        *(module.attention_head_size, module.scaling),
    )


def output_parts(module: Any) -> OutputParts:
    """Of a SelfOutput or Output module."""
    parts = module._modules
    return OutputParts((module,), parts["dense"], parts["dropout"], parts["LayerNorm"])


def _roberta_attention(layer: Any) -> AttentionParts:
    attention = layer._modules["attention"]
    parts = attention._modules
    return AttentionParts(attention, core_parts(parts["self"]), output_parts(parts["output"]))


def _roberta_feed_forward(layer: Any) -> FeedForwardParts:
    inner, output = layer._modules["intermediate"], output_parts(layer._modules["output"])
    chunk = getattr(layer, "chunk_size_feed_forward", 0)  # which MPNet's layer does not have
    return FeedForwardParts(inner, inner._modules["dense"], inner.intermediate_act_fn, output, chunk)


def _distilbert_attention(layer: Any) -> AttentionParts:
    core, norm = layer._modules["attention"], layer._modules["sa_layer_norm"]
    parts = core._modules
    projections = parts["q_lin"], parts["k_lin"], parts["v_lin"], parts["dropout"]
    own = CoreParts(core, *projections, core.attention_head_size, core.scaling)
    return AttentionParts(core, own, OutputParts((), parts["out_lin"], None, norm))


def _distilbert_feed_forward(layer: Any) -> FeedForwardParts:
    ffn, norm = layer._modules["ffn"], layer._modules["output_layer_norm"]
    parts = ffn._modules
    output = OutputParts((), parts["lin2"], parts["dropout"], norm)
    return FeedForwardParts(ffn, parts["lin1"], ffn.activation, output, ffn.chunk_size_feed_forward)


def _mpnet_attention(layer: Any) -> AttentionParts:
    attention = layer._modules["attention"]
    core, norm = attention._modules["attn"], attention._modules["LayerNorm"]
    parts, head_dim = core._modules, core.attention_head_size
    own = CoreParts(core, parts["q"], parts["k"], parts["v"], parts["dropout"], head_dim, head_dim**-0.5)
    return AttentionParts(attention, own, OutputParts((), parts["o"], attention._modules["dropout"], norm))


# By the role of a layer, for each half: its parts, and the modules around them, each after the one that it is in.
_HALVES: dict[str, tuple[Callable[[Any], AttentionParts], Callable[[Any], FeedForwardParts]]] = {
    "layer": (_roberta_attention, _roberta_feed_forward),
    "distilbert_layer": (_distilbert_attention, _distilbert_feed_forward),
    "mpnet_layer": (_mpnet_attention, _roberta_feed_forward),
}
AROUND: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "layer": (("attention", "attention.self", "attention.output"), ("intermediate", "output")),
    "distilbert_layer": (("attention",), ("ffn",)),
    "mpnet_layer": (("attention", "attention.attn"), ("intermediate", "output")),
}
LAYER_ROLES = ("layer", "distilbert_layer", "mpnet_layer")  # of whole layers


def attention_parts(layer: Any, role: str | None = None) -> AttentionParts:
    """Of a layer whose modules around them are as known. role: of one without a fast class."""
    return _HALVES[role or layer._rk_role][0](layer)


def feed_forward_parts(layer: Any, role: str | None = None) -> FeedForwardParts:
    """As attention_parts."""
    return _HALVES[role or layer._rk_role][1](layer)


# --- what stands before the logits of a masked language model --------------------------------------------------------


class VocabularyParts(NamedTuple):
    """decoder: the product with the vocabulary. steps: modules and functions that run before it, each by its own call.
    around: modules that hold these and are not called themselves."""

    steps: tuple[Callable[[Any], Any], ...]
    decoder: Any
    around: tuple[Any, ...]


# around, steps and decoder by name; _GELU is a function, and no part of the model.
_GELU = "gelu"
_VOCABULARIES: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (
    (("lm_head",), ("lm_head.dense", _GELU, "lm_head.layer_norm"), "lm_head.decoder"),  # RoBERTa's, MPNet's
    (("cls", "cls.predictions"), ("cls.predictions.transform",), "cls.predictions.decoder"),  # BERT's
    ((), ("vocab_transform", "activation", "vocab_layer_norm"), "vocab_projector"),  # DistilBERT's
    ((), ("generator_predictions",), "generator_lm_head"),  # ELECTRA's
)


def vocabulary_parts(head: Any) -> VocabularyParts | None:
    """Of a model with a head for masked language modelling; None where it has other parts."""
    for around, steps, decoder in _VOCABULARIES:
        found = {name: _part(head, name) for name in (*around, *steps, decoder) if name != _GELU}
        if all(part is not None for part in found.values()):
            found[_GELU] = gelu
            return VocabularyParts(
                tuple(found[name] for name in steps), found[decoder], tuple(found[name] for name in around)
            )
    return None


def _part(module: Any, path: str) -> Any:
    for step in path.split("."):
        module = None if module is None else module._modules.get(step)
    return module


# --- code of somebody else's in a class ------------------------------------------------------------------------------

METHODS = (
    *("forward", "feed_forward_chunk", "ff_chunk", "create_position_ids_from_input_ids", "_create_attention_masks"),
    *("compute_position_bias", "relative_position_bucket"),
)


def replaced_code(cls: type) -> str | None:
    """Which method of a class of transformers' or torch's is not its own any more (a monkey patch), or None."""
    cls = getattr(cls, "_rk_original", cls)  # a fast class stands for its original
    package = cls.__module__.partition(".")[0]
    for name in METHODS:
        function = getattr(cls, name, None)
        while function is not None:
            scope = getattr(function, "__globals__", None)
            if scope is not None and str(scope.get("__name__")).partition(".")[0] not in (package, "torch"):
                return f"{cls.__name__}.{name} was replaced by code of {scope.get('__name__')}"
            function = getattr(function, "__wrapped__", None)
    return None
