"""What is verified, and how it is called: a transformers model, or a module of the user's own around one.

A module around a model is called as its user calls it, because it may read what the model inside does not promise (the
rows at padding, say). Its layers are compared beside that: those of the one transformers model inside, called with
what the module gave it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from roberta_kernels.verification.report import VerificationError

_OF_A_TASK = ("labels", "start_positions", "end_positions")  # of the model inside; a module around it has its own


@dataclass(frozen=True)
class Subject:
    """The kind of model that is verified; every method takes the copy of it that is meant.

    path: of the transformers model, "" for the model itself, None where there are several. mapping: it takes the batch
    as one argument.
    """

    name: str
    path: str | None
    mapping: bool = False

    @property
    def wrapped(self) -> bool:
        return self.path != ""

    def call(self, model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        """What a user gets, by name."""
        if not self.wrapped:
            return _model_output(model, arguments)
        output = model(dict(arguments)) if self.mapping else model(**arguments)
        named = dict(_named("output", output))
        if not named:
            raise VerificationError(
                f"{self.name} must return tensors, a ModelOutput, or a tuple or dict of tensors, "
                f"got {type(output).__name__}"
            )
        return named

    def layers(self, model: nn.Module, arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the transformers model returns with its hidden states, and the arguments that it was called with. Both
        are empty where a module around it does not call it, and the batch does not fit it either."""
        if self.wrapped:
            if self.path is None:
                return {}, {}
            inner = model.get_submodule(self.path)
            # Of one that calls its model past __call__ (sentence-transformers) or in parts: what of the batch fits.
            takes = inspect.signature(inner.forward).parameters
            fitting = {key: value for key, value in arguments.items() if key in takes}
            arguments = self._given(model, inner, arguments) or fitting
            if not arguments:
                return {}, {}
            model = inner
        return _model_output(model, arguments, output_hidden_states=True), arguments

    def _given(self, model: nn.Module, inner: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        """What the model gives the one inside it, in its first call."""
        given: list[dict[str, Any]] = []
        signature = inspect.signature(inner.forward)
        rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)

        def look(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            bound = dict(signature.bind_partial(*positional, **named).arguments)
            unnamed = bound.pop(rest, {}) if rest else {}
            given.append(without_choices(bound | unnamed))

        handle = inner.register_forward_pre_hook(look, with_kwargs=True)
        try:
            self.call(model, arguments)
        finally:
            handle.remove()
        return given[0] if given else {}

    def check(self, model: nn.Module, arguments: dict[str, Any]) -> None:
        """Raises VerificationError where a module around a model cannot be called with this."""
        if not self.wrapped:
            return
        try:
            with torch.no_grad():
                self.call(model, arguments)
        except VerificationError:
            raise
        except Exception as error:  # the user's own code: anything
            inside = "" if self.path is None else f", or verify the model inside it, {self.path}"
            raise VerificationError(
                f"{self.name} cannot be called with this batch ({type(error).__name__}: {error}); pass as batch the "
                f"keyword arguments of a call that works{inside}"
            ) from error


def transformers_models(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The models that take a tokenizer's batch, the outermost, each with where it is ("" for the model itself)."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel) or hasattr(model, "get_base_model"):  # the second: PEFT's wrapper
        return [("", model)]
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not any(name.startswith(f"{outer}.") for outer, _ in found):
            found.append((name, module))
    return found


def subject_of(model: nn.Module, arguments: dict[str, Any], *, generated: bool) -> tuple[Subject, dict[str, Any]]:
    """How the model is called, and with what of these arguments. generated: no user chose them, so that those that a
    module does not take may be left out."""
    found = transformers_models(model)
    path = found[0][0] if len(found) == 1 else None
    name = type(model).__name__
    if path == "":
        return Subject(name, path), arguments
    parameters = list(inspect.signature(model.forward).parameters.values())
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    taken = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    mapping = len(needed) == 1 and not taken & set(arguments)
    if generated:
        arguments = {
            key: value
            for key, value in arguments.items()
            if key not in _OF_A_TASK and (mapping or open_ended or key in taken)
        }
    return Subject(name, path, mapping), arguments


def without_choices(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Without what every run decides for itself."""
    chosen = ("return_dict", "output_hidden_states", "output_attentions")
    return {key: value for key, value in arguments.items() if key not in chosen}


def _model_output(model: nn.Module, arguments: dict[str, Any], **extra: Any) -> dict[str, Any]:
    output = model(**arguments, **extra, return_dict=True)
    if not isinstance(output, Mapping):
        raise VerificationError(f"{type(model).__name__} must return a ModelOutput, got {type(output).__name__}")
    return dict(output)


def _named(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Every floating-point tensor of an output, with a name that says where in it."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _named(str(key) if name == "output" else f"{name}.{key}", part)
    elif isinstance(value, (tuple, list)):
        for i, part in enumerate(value):
            yield from _named(f"{name} {i}", part)
