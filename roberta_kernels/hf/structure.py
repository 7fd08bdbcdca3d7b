"""The parts that a module of a known class must have, and whether its class is still its own."""

from __future__ import annotations

from typing import Any

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
    "self_attention": {"": _LAYER_STRUCTURE["attention.self"]},
    "self_output": {"": (_OUTPUT_PARTS, set())},
    "embeddings": {"": (_TABLES | {"LayerNorm", "dropout"}, {"padding_idx"})},
    "absolute_embeddings": {"": (_TABLES | {"LayerNorm", "dropout"}, {"position_ids"})},
}
# An activation may be a function; a decoder's layers may have a second attention, which never runs fused.
_OPTIONAL_PARTS = {"intermediate_act_fn", "crossattention"}
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


# --- code of somebody else's in a class ------------------------------------------------------------------------------

METHODS = ("forward", "feed_forward_chunk", "create_position_ids_from_input_ids", "_create_attention_masks")


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
