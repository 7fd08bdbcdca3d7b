"""The arguments of a call, by the names that the original forward gives them."""

from __future__ import annotations

import inspect
from typing import Any


def by_name(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call of a module with a fast class. Raises TypeError as Python would."""
    if not args:
        return kwargs
    names = module._rk_parameters
    if len(args) > len(names):
        raise TypeError(
            f"{type(module).__name__}.forward() takes {len(names)} positional arguments but {len(args)} were given"
        )
    named = dict(zip(names, args, strict=False))
    for name in named:
        if name in kwargs:
            raise TypeError(f"{type(module).__name__}.forward() got multiple values for argument {name!r}")
    return named | kwargs


def is_causal(model: Any) -> bool:
    """Whether a token of this model sees itself and those before it only."""
    return bool(getattr(model.config, "is_decoder", False))  # of which an encoder's config need not know


def parameters(original: Any) -> dict[str, Any]:
    """What `by_name`, and whoever asks what is given, must know of a class: its forward's parameters."""
    found = list(inspect.signature(original.forward).parameters.values())[1:]
    named = [parameter for parameter in found if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    return {
        "_rk_parameters": tuple(parameter.name for parameter in named),
        "_rk_defaults": {p.name: None if p.default is p.empty else p.default for p in found},
    }
