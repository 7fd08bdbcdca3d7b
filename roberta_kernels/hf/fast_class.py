"""The fast classes: every known Hugging Face class with the fused code in front of it.

`fast_class(RobertaLayer)` is a subclass of RobertaLayer that puts a mixin before it. `patch` gives a module that class;
the FastRoberta* classes are such classes themselves. So there is one mechanism: what a patched model runs and what
FastRoberta runs is the same class. To whoever looks a class up by module and name it goes by those of the original.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import types
from abc import ABCMeta
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from roberta_kernels.hf import attention_interface, known_code
from roberta_kernels.hf.arguments import is_causal, parameters
from roberta_kernels.hf.embeddings import FastAbsoluteEmbeddings, FastEmbeddings
from roberta_kernels.hf.families import MODELS, family_class, family_classes, family_of, role_of
from roberta_kernels.hf.heads import (
    FastDiscriminatorHead,
    FastHead,
    FastNextTokenHead,
    FastSpanHead,
    FastSummaryHead,
    FastTokenHead,
)
from roberta_kernels.hf.layer import (
    FastDistilBertLayer,
    FastLayer,
    FastMPNetLayer,
    FastSelfAttention,
    FastSelfOutput,
    FastVocabulary,
)
from roberta_kernels.hf.masked_lm import FastMaskedLMHead
from roberta_kernels.hf.model import FastAttentionModel, FastBiasedModel, FastModel
from roberta_kernels.hf.names import ATTENTION
from roberta_kernels.hf.same_attention import attention_difference
from roberta_kernels.hf.sparse import FastSpladePooling
from roberta_kernels.hf.state import PatchState, attach, detach, keep_implementation, kept_implementation
from roberta_kernels.hf.structure import AROUND, structure_difference

_MIXINS: dict[str, type] = {
    "embeddings": FastEmbeddings,
    "absolute_embeddings": FastAbsoluteEmbeddings,
    "typeless_embeddings": FastEmbeddings,
    "typeless_absolute_embeddings": FastAbsoluteEmbeddings,
    "self_attention": FastSelfAttention,
    "attention_model": FastAttentionModel,
    "summary_head": FastSummaryHead,
    "self_output": FastSelfOutput,
    "vocabulary": FastVocabulary,
    "layer": FastLayer,
    "distilbert_layer": FastDistilBertLayer,
    "mpnet_layer": FastMPNetLayer,
    "model": FastModel,
    "biased_model": FastBiasedModel,
    "token_head": FastTokenHead,
    "masked_lm_head": FastMaskedLMHead,
    "next_token_head": FastNextTokenHead,
    "discriminator_head": FastDiscriminatorHead,
    "span_head": FastSpanHead,
    "head": FastHead,
    "splade_pooling": FastSpladePooling,
}
# Roles of whole models: what a user constructs.
MODEL_ROLES = (
    *(*MODELS, "head", "token_head", "masked_lm_head", "next_token_head", "discriminator_head", "span_head"),
    "summary_head",
)


class FastType(type):
    """Class of the fast classes. They have the module and name of their originals, by which pickle would find those:
    so a fast class is pickled as what makes it again."""


class FastAbstractType(FastType, ABCMeta):
    """The same where the original's is ABCMeta."""


def _reduce(cls: Any) -> Any:
    return (fast_class, (cls._rk_original,)) if is_fast_class(cls) else cls.__qualname__


copyreg.pickle(FastType, _reduce)  # type: ignore[arg-type]
copyreg.pickle(FastAbstractType, _reduce)  # type: ignore[arg-type]


_classes: dict[type, Any] = {}


def fast_class(original: Any) -> Any:
    """The fast subclass of a known Hugging Face class; it keeps the name, which transformers looks classes up by.

    Raises TypeError for a class that is not known, or not as this version knows it.
    """
    if original not in _classes:
        made = _make_class(original)
        if not known_code.lasting(original, role_of(original) or ""):
            return made  # while a part of it is somebody else's code
        _classes.setdefault(original, made)
    return _classes[original]


def _make_class(original: Any) -> Any:
    role = role_of(original)
    if role is None or is_fast_class(original):
        raise TypeError(f"{original.__module__}.{original.__name__} is not a class that roberta_kernels knows")
    difference = known_code.difference(original, role)
    if difference is not None:
        raise TypeError(difference)
    mixin = _MIXINS[role]
    namespace: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        **_own_functions(mixin),
        "_rk_original": original,
        "_rk_role": role,
        **parameters(original),
    }
    namespace |= _of_role(original, role, namespace["_rk_defaults"])
    forward = namespace.get("_rk_forward")
    if forward is not None:
        namespace["forward"] = _like(original.forward, forward)
    if role in MODEL_ROLES:
        namespace["__init__"] = _like(original.__init__, _initialise(original))
    kind = FastAbstractType if isinstance(original, ABCMeta) else FastType
    return kind(original.__name__, (mixin, original), namespace)


def _of_role(original: Any, role: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """What a mixin must know of the class that it is put before."""
    if role in MODELS:
        facts = known_code.model_facts(original, role)
        embeddings: Any = facts.embeddings
        taken = inspect.signature(embeddings.forward).parameters
        names = tuple(name for name in taken if name in defaults)
        family = family_of(original)
        assert family is not None
        ours = {"_rk_facts": facts, "_rk_embedding_arguments": names, "_rk_known_arguments": family.own.union(names)}
        if facts.masks is not None:
            ours["_create_attention_masks"] = getattr(original, "_create_attention_masks", None)
        return ours
    if role in AROUND:
        around = known_code.layer_facts(original, role).around
        return {"_rk_around": tuple(tuple((path, _same_code(cls)) for path, cls in half) for half in around)}
    if role.endswith("head"):
        head = known_code.head_facts(original, role)
        return {
            "_rk_base_arguments": frozenset(_base_arguments(original)),
            "_rk_always_reads": head is not None and head.reads_padding,
            "_rk_head": head,
            "_rk_parts": _head_parts(original),
        }
    return {}


def _same_code(cls: type) -> tuple[type, ...]:
    """A class, and the fast class of it, if it has one."""
    role = role_of(cls)
    return (cls,) if role is None or known_code.difference(cls, role) is not None else (cls, fast_class(cls))


def _head_parts(cls: Any) -> dict[str, type] | None:
    """The classes of what a model with a head has beside its base model, by name; None where it cannot be made."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.device("cpu"), unset_fake_temporarily():
            module = known_code.tiny(cls)
    except Exception:
        return None
    base = f"{module.base_model_prefix}."
    return {name: type(part) for name, part in module.named_modules() if not f"{name}.".startswith(base)}


def _base_arguments(head: Any) -> set[str]:
    """What the base models of the head's family take: no labels."""
    package = head.__module__.rpartition(".")[0]
    models = [cls for cls in family_classes(*MODELS) if cls.__module__.startswith(f"{package}.")]
    return {name for cls in models for name in inspect.signature(cls.forward).parameters}


def _like(original: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    """replacement with the signature, name and docstring of the original."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return replacement(self, *args, **kwargs)

    return functools.wraps(original)(_own_code(method))


def _own_functions(mixin: type) -> dict[str, Callable[..., Any]]:
    """The methods of a mixin, each with a code object of its own."""
    functions: dict[str, Callable[..., Any]] = {}
    for base in reversed(mixin.__mro__):
        functions |= {name: _own_code(value) for name, value in vars(base).items() if inspect.isfunction(value)}
    return functions


def _own_code(function: Any) -> Any:
    """A copy of the function that shares no code object with it.

    torch.compile keeps what it compiled by code object, and gives up on one that it compiled eight times: classes that
    share their code would use up each other's share.
    """
    code = function.__code__.replace()
    copied = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(copied, function)


def _initialise(original: Any) -> Callable[..., None]:
    """__init__ of a fast class: builds the Hugging Face model, then gives its parts their fast classes."""

    def initialise(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        state = PatchState()
        attach(self, state)  # Hugging Face code that runs during construction may already look it up
        original.__init__(self, *args, **kwargs)
        for module in self.modules():
            make_fast(module, state)

    return initialise


def make_fast(module: nn.Module, state: PatchState) -> bool:
    """Gives a module its fast class, in place, and the state it shares with the rest of its model; False if not
    known.
    """
    cls: Any = type(module)
    if not is_fast_class(cls):
        if role_of(cls) is None or mismatch(module) is not None:
            return False
        module.__class__ = fast_class(cls)
    attach(module, state)
    for part in _attentions(module):  # what they do not run fused is counted with the rest of the model
        attach(part, state)
    _set_interface(module)
    return True


def _attentions(module: Any) -> list[nn.Module]:
    """The modules of a layer that call transformers' attention interface."""
    if type(module)._rk_role not in AROUND:
        return []
    return [part for name, part in module.named_modules() if name.endswith("attention.self")]


def mismatch(module: nn.Module) -> str | None:
    """How a module of a known class differs from the code that is known, or None."""
    cls: Any = type(module)
    role = None if is_fast_class(cls) else role_of(cls)
    if role is None:
        return None
    return structure_difference(module, role) or known_code.difference(cls, role)


def _set_interface(module: Any) -> None:
    """Calls reach the fused attention through transformers' attention interface where nobody can replace the layers'
    mask (in the padded layout), and in a decoder with its caches and its cross-attention, which are transformers' own.
    """
    cls: Any = type(module)
    facts = cls.__dict__.get("_rk_facts")
    if facts is None or cls._rk_role == "biased_model" or attention_interface.unavailable is not None:
        return
    implementation = module.config._attn_implementation
    # Under eager attention a row that sees no key gets a mean, which only a replaced mask can leave to the original.
    decoding = is_causal(module) and implementation == "sdpa" and not attention_difference(module, implementation)
    if decoding or (facts.masks is not None and implementation in ("eager", "sdpa")):
        keep_implementation(module, implementation)
        module.set_attn_implementation(ATTENTION)


def make_original(module: Any) -> None:
    """Undoes make_fast."""
    cls: Any = type(module)
    if is_fast_class(cls):
        module.__class__ = cls._rk_original
    implementation = kept_implementation(module)
    if implementation is not None and module.config._attn_implementation == ATTENTION:
        module.set_attn_implementation(implementation)
    detach(module)


def is_fast_class(cls: type) -> bool:
    return "_rk_original" in cls.__dict__


def holds_fast_class(cls: type) -> bool:
    """Whether modules of this class run a fast class: it is one, or was derived from one (fully_shard does that)."""
    return hasattr(cls, "_rk_original")


def fast_class_named(name: str) -> Any:
    """FastXLMRobertaModel, FastRobertaLayer, ...; FastRoberta is FastRobertaModel. None: there is no such class."""
    if not name.startswith("Fast"):
        return None
    original = family_class("RobertaModel" if name == "FastRoberta" else name.removeprefix("Fast"))
    return None if original is None else fast_class(original)
