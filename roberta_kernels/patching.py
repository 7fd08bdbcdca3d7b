"""patch and unpatch: the fused code put into a model in place, and taken out again without a trace."""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from roberta_kernels import backends, packed_weights
from roberta_kernels.backends import BackendError
from roberta_kernels.families import FAMILIES, family_classes, role_of, why_left
from roberta_kernels.layers import FastLayer, PatchState, gelu_kind, plain_linear
from roberta_kernels.models import MODEL_ROLES, holds_fast_class, is_fast_class, make_fast, make_original, mismatch

_FUSED = {
    "embeddings": "embeddings + LayerNorm + dropout",
    "absolute_embeddings": "embeddings + LayerNorm + dropout",
    "self_attention": "attention",
    "self_output": "bias + dropout + residual + LayerNorm",
    "layer": "attention, GELU feed-forward, bias + dropout + residual + LayerNorm",
    "model": "padding-free pass",
    "attention_model": "hands its attention the lengths of the sequences",
    "token_head": "asks for padded rows where its loss reads them",
    "next_token_head": "asks for padded rows where its loss reads them",
    "span_head": "asks for padded rows, which its softmax reads",
    "summary_head": "asks for padded rows where its summary reads them",
    "head": "unchanged (its base model is fused)",
}

# (package, class) of modules of other libraries that let padded token vectors into the answer.
_READ_PADDING = {("sentence_transformers", "CNN")}

_NO_LAYER = "it holds no layer that can run from packed weights"
_NOT_KNOWN = "not the code that is known"


@dataclass(frozen=True)
class Replaced:
    """name: where in the model. original: the Hugging Face class. fused: what now runs fused there."""

    name: str
    original: str
    fused: str


@dataclass(frozen=True)
class Left:
    """name: where in the model. original: its class. reason: why it was left as it is."""

    name: str
    original: str
    reason: str


@dataclass
class PatchReport:
    """What patch() replaced, what it left and why. str() is a table."""

    replaced: list[Replaced] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    backend: str = "auto"
    state: PatchState = field(default_factory=PatchState, repr=False)

    def fallbacks(self) -> dict[str, int]:
        """ "Class: reason" -> how many calls since patching ran the original code for it."""
        return self.state.reasons()

    def fallbacks_by_module(self) -> dict[str, dict[str, int]]:
        """Name of a module in the model -> reason -> how many of its calls ran the original code for it."""
        counts: dict[str, dict[str, int]] = {}
        for (name, _, reason), calls in self.state.fallbacks.items():
            counts.setdefault(name, {})[reason] = calls
        return counts

    def padded(self) -> dict[str, int]:
        """Reason -> how many calls since patching ran fused, but on every row of the padded batch, for it."""
        return dict(self.state.padded)

    def __bool__(self) -> bool:
        """Whether anything was replaced."""
        return bool(self.replaced)

    @property
    def quantization(self) -> str | None:
        """What the layers' weights are rounded to for inference on a CPU; None: not at all."""
        return self.state.quantization

    def __rich__(self) -> Any:
        from rich.table import Table

        title = (
            f"roberta_kernels: {len(self.replaced)} modules replaced, {len(self.left)} left; backend: {self.backend}"
        )
        if self.quantization is not None:
            title += f"; inference on the CPU with {self.quantization} weights"
        table = Table(title=title, title_justify="left")
        for column in ("modules", "class", "what runs there now"):
            table.add_column(column, overflow="fold")
        grouped: dict[tuple[str, str, bool], list[str]] = {}
        for replaced in self.replaced:
            grouped.setdefault((replaced.original, replaced.fused, True), []).append(replaced.name)
        for left in self.left:
            grouped.setdefault((left.original, f"the original: {left.reason}", False), []).append(left.name)
        for (original, what, _), names in grouped.items():
            first = names[0] or "(the model)"
            table.add_row(first if len(names) == 1 else f"{first} and {len(names) - 1} more", original, what)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=120, color_system=None).print(self)
        return text.getvalue().rstrip()


def patch(
    model: nn.Module,
    *,
    packed: str | bool = "auto",
    backend: str = "auto",
    prepack: bool = True,
    quantization: str | None = None,
    offload: bool | None = None,
) -> PatchReport:
    """Makes every RoBERTa-family encoder inside `model` run on the fused kernels, in place.

    Args:
        model: any module that contains such encoders: a bare model, a task head, an encoder-decoder, a wrapper.
        packed: "auto": padding is left out of the computation wherever the answer cannot depend on it. False: never.
            True: also where a token or span head reads padded rows, which then come from zeros.
        backend: "auto", or the backend that shall serve this model.
        prepack: whether inference on a CPU keeps a copy of the layers' weights in the order in which the kernels read
            them, made in the first call. It is faster, and takes as much memory again as these weights do.
        quantization: None; or what that copy is rounded to, of a float32 model on a CPU: "bfloat16" (products
            accumulate in float32), "int8" (weights only), "int8-dynamic" (weights, and activations as they come). The
            answers are then no longer those of the original (`verify` measures them). Parameters, state dict and
            saved files stay float32; a call that cannot use the copy, as in training, runs the float32 weights, and
            the report's fallbacks say so.
        offload: True: weights that were copied leave memory for an unlinked file in the temporary directory (TMPDIR),
            mapped in their place; they read, train and save as before. None: where `quantization` is set.

    Returns:
        What was replaced, what was left, and why. A model with nothing to replace is left untouched; so is any model
        if an error occurs.

    Parameters, buffers, state dict, forward's signature and what save_pretrained writes do not change. Patching twice
    is
    harmless: the options of the last call hold. Rows at padded positions come back as zeros.

    Raises:
        ValueError: an unknown value of an option, options that contradict each other, or `quantization` for a model
        that is not float32 on a CPU. BackendError: an unknown or unavailable backend, or `quantization` without the
        compiled CPU kernels.
    """
    _check_options(packed, backend, prepack, quantization, offload)
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch needs a torch.nn.Module, not {type(model).__name__}")
    if offload is None:
        offload = quantization is not None
    state = PatchState(packed=packed, backend=backend, prepack=prepack, quantization=quantization, offload=offload)
    report = PatchReport(backend=backend, state=state)
    before: list[tuple[nn.Module, type, PatchState | None]] = []
    try:
        for name, module in model.named_modules():
            cls: Any = type(module)
            if (cls.__module__.partition(".")[0], cls.__name__) in _READ_PADDING and packed == "auto":
                state.packed = False
                report.left.append(Left(name, cls.__name__, "reads padded token vectors, which are therefore computed"))
            original = cls._rk_original if is_fast_class(cls) else cls
            role = role_of(original)
            if role is None:
                reason = _why_left(cls)
                if reason:
                    report.left.append(Left(name, cls.__name__, reason))
                continue
            difference = mismatch(module)
            if difference is not None:
                report.left.append(Left(name, cls.__name__, f"{_NOT_KNOWN}: {difference}"))
                continue
            before.append((module, cls, module.__dict__.get("_rk_state")))
            make_fast(module, state)
            fused = _FUSED[role.role]
            if role.role == "layer":
                fused = _layer_fused(module)
                if quantization is not None:
                    _check_float32(name, module, quantization)
            report.replaced.append(Replaced(name, original.__name__, fused))
    except BaseException:
        for module, cls, old_state in before:
            module.__class__ = cls
            if old_state is None:
                module.__dict__.pop("_rk_state", None)
            else:
                module.__dict__["_rk_state"] = old_state
        raise
    for replaced, (module, *_) in zip(report.replaced, before, strict=True):
        module.__dict__["_rk_name"] = replaced.name
        packed_weights.forget(module)  # of an earlier patch, with other options
    if quantization is not None and not any(isinstance(module, FastLayer) for module, *_ in before):
        report.left.append(Left("", type(model).__name__, f"not quantised: {_NO_LAYER}"))
        warnings.warn(f"roberta_kernels: {type(model).__name__} is not quantised: {_NO_LAYER}", stacklevel=2)
    strange = [left for left in report.left if left.reason.startswith(_NOT_KNOWN)]
    if strange:
        warnings.warn(
            f"roberta_kernels left {len(strange)} modules as they are, the first of them {strange[0].name!r}, a "
            f"{strange[0].original}: {strange[0].reason}",
            stacklevel=2,
        )
    if not report.replaced and not report.left:
        known = ", ".join(family.prefix for family in FAMILIES.values())
        report.left.append(Left("", type(model).__name__, f"holds no layer of a known family ({known})"))
    return report


def _check_options(packed: Any, backend: str, prepack: Any, quantization: Any, offload: Any) -> None:
    if packed != "auto" and not isinstance(packed, bool):
        raise ValueError(f'packed is {packed!r}, and must be "auto", True or False')
    with backends.backend(backend):
        pass  # raises for a backend that is unknown or not available
    if not isinstance(prepack, bool):
        raise ValueError(f"prepack is {prepack!r}, and must be True or False")
    if quantization not in packed_weights.KINDS:
        raise ValueError(
            f"quantization is {quantization!r}, and must be None or one of {', '.join(packed_weights.QUANTIZATIONS)}"
        )
    if offload is not None and not isinstance(offload, bool):
        raise ValueError(f"offload is {offload!r}, and must be None, True or False")
    if not prepack and (quantization is not None or offload):
        raise ValueError("quantization and offload concern packed weights, and prepack=False wants none")
    if quantization is None:
        return
    if backend not in ("auto", "cpu"):
        raise ValueError(f"quantization={quantization!r} runs on the cpu backend, and backend is {backend!r}")
    reason = packed_weights.unavailable()
    if reason is not None:
        raise BackendError(f"quantization={quantization!r} needs the compiled CPU kernels: {reason}")


def _check_float32(name: str, layer: nn.Module, quantization: str) -> None:
    for parameter in layer.parameters():
        # One on the meta device is yet to be loaded.
        if parameter.is_floating_point() and (
            parameter.dtype != torch.float32 or parameter.device.type not in ("cpu", "meta")
        ):
            raise ValueError(
                f"quantization={quantization!r} needs a float32 model on a CPU, and {name or 'the model'} is "
                f"{str(parameter.dtype).removeprefix('torch.')} on {parameter.device}"
            )


def _why_left(cls: type) -> str | None:
    """Why a module was left that a reader would expect to see replaced; None for the many that nobody would."""
    reason = why_left(cls)
    if reason is not None:
        return reason
    for base in cls.__mro__[1:]:
        if role_of(base) is not None and not is_fast_class(cls):
            return f"a subclass of {base.__name__}, whose code is not known"
    if cls.__name__.endswith(("Layer", "Embeddings")) and cls.__module__.startswith("transformers.models."):
        return f"{cls.__module__.split('.')[2]} is not a known family"
    return None


def _layer_fused(layer: Any) -> str:
    intermediate = layer.intermediate
    if gelu_kind(intermediate.intermediate_act_fn) is None:
        activation = type(intermediate.intermediate_act_fn).__name__
        return f"attention, bias + dropout + residual + LayerNorm (feed-forward left: {activation})"
    if not plain_linear(intermediate.dense) or not plain_linear(layer.output.dense):
        return (
            "attention, bias + dropout + residual + LayerNorm (feed-forward left: its products are not plain nn.Linear)"
        )
    return _FUSED["layer"]


def unpatch(model: nn.Module) -> None:
    """Puts back exactly what was there before patch(). Harmless on a model that is not patched.

    Raises RuntimeError, and changes nothing, where a module's class was derived from a fused one since (fully_shard).
    """
    for name, module in model.named_modules():
        cls = type(module)
        if holds_fast_class(cls) and not is_fast_class(cls):
            raise RuntimeError(f"{name or 'the model'} became a {cls.__name__} after patching, and cannot be unpatched")
    for module in model.modules():
        make_original(module)
    packed_weights.trim()


def is_patched(model: nn.Module) -> bool:
    """Whether any part of the model runs on fused code."""
    return any(holds_fast_class(type(module)) for module in model.modules())


_wrapped: list[tuple[Any, Callable[..., None]]] = []
_options: dict[str, Any] = {}  # of the last patch_transformers


def patch_transformers(
    *,
    packed: str | bool = "auto",
    backend: str = "auto",
    prepack: bool = True,
    quantization: str | None = None,
    offload: bool | None = None,
) -> contextlib.AbstractContextManager[None]:
    """Patches every model of a known family that is created from now on, by whatever route; options are patch's.

    As a context manager, `with patch_transformers(): ...`, only those created inside the block; the options of an outer
    block hold again after an inner one.
    """
    global _options
    _check_options(packed, backend, prepack, quantization, offload)
    before = _options if _wrapped else None
    _options = {
        "packed": packed,
        "backend": backend,
        "prepack": prepack,
        "quantization": quantization,
        "offload": offload,
    }
    if not _wrapped:
        cls: Any
        for cls in family_classes(*MODEL_ROLES):
            _wrapped.append((cls, cls.__init__))
            cls.__init__ = _patching_init(cls, cls.__init__)
    return _back_on_exit(before)


def _patching_init(cls: type, original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if type(self) is cls:
            patch(self, **_options)

    return init


def unpatch_transformers() -> None:
    """Ends patch_transformers(). Models that exist stay as they are (see unpatch)."""
    while _wrapped:
        cls, init = _wrapped.pop()
        cls.__init__ = init


@contextlib.contextmanager
def _back_on_exit(before: dict[str, Any] | None) -> Iterator[None]:
    global _options
    try:
        yield
    finally:
        if before is None:
            unpatch_transformers()
        else:
            _options = before
