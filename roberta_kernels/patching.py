"""patch and unpatch: the fused code put into a model in place, and taken out again without a trace."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from roberta_kernels import quantized
from roberta_kernels.hf import known_code
from roberta_kernels.hf.families import FAMILIES, MODELS, family_classes, role_of, why_left
from roberta_kernels.hf.fast_class import (
    MODEL_ROLES,
    holds_fast_class,
    is_fast_class,
    make_fast,
    make_original,
    mismatch,
)
from roberta_kernels.hf.fusable import gelu_kind, plain_linear
from roberta_kernels.hf.layer import FastLayer
from roberta_kernels.hf.state import (
    Options,
    PatchState,
    attach,
    attach_name,
    attached,
    forget,
    logger,
    refresh_quantized,
    takes_options,
)
from roberta_kernels.hf.structure import AROUND, LAYER_ROLES, feed_forward_parts
from roberta_kernels.patch_report import Left, PatchReport, Replaced

_FUSED = {
    "embeddings": "embeddings + LayerNorm + dropout",
    "absolute_embeddings": "embeddings + LayerNorm + dropout",
    "typeless_embeddings": "embeddings + LayerNorm + dropout",
    "typeless_absolute_embeddings": "embeddings + LayerNorm + dropout",
    "self_attention": "attention",
    "self_output": "bias + dropout + residual + LayerNorm",
    "vocabulary": "products of few rows, for inference on a CPU",
    **dict.fromkeys(LAYER_ROLES, "attention, GELU feed-forward, bias + dropout + residual + LayerNorm"),
    "model": "padding-free pass",
    "biased_model": "padding-free pass where padding is at the end and nobody reads it",
    "attention_model": "hands its attention the lengths of the sequences",
    "token_head": "does without padded rows where its loss does",
    "masked_lm_head": "does without padded rows where its loss does",
    "next_token_head": "does without padded rows where its loss does",
    "discriminator_head": "does without padded rows where its loss does",
    "span_head": "unchanged (its base model is fused); its softmax reads padded rows",
    "summary_head": "does without padded rows where its summary does",
    "head": "does without padded rows",
    "splade_pooling": "log1p(relu) and maximum of the logits",
}

# Package and class of models around those of the families that leave their encoder's padded rows alone, if made of
# these parts only; None: of whatever parts.
_LEAVE_PADDING: dict[tuple[str, str], set[str] | None] = {
    ("sentence_transformers", "SentenceTransformer"): {
        *("Transformer", "Pooling", "Normalize", "Dense", "Dropout", "LayerNorm")
    },
    ("sentence_transformers", "SparseEncoder"): {"Transformer", "MLMTransformer", "SpladePooling"},
    ("transformers", "EncoderDecoderModel"): None,
}

_LARGEST = "for SpladePooling: the largest logits, and no others"
_NO_LAYER = "it holds no layer that can run from quantised weights"
_NOT_KNOWN = "not the code that is known"


@takes_options
def patch(model: nn.Module, *, options: Options) -> PatchReport:
    """Makes every RoBERTa-family encoder inside `model` run on the fused kernels, in place.

    Args:
        model: any module that contains such encoders: a bare model, a task head, an encoder-decoder, a wrapper.
        padded_rows: "exact": what a caller may read at padded positions is what the original gives there
            (docs/compatibility.md says at what cost). "zeros": padding is left out of every computation that can do
            without; zeros come back in its place, position 0 excepted.
        backend: "auto", or the backend to use for this model.
        quantization: None; or what a copy of the layers' weights is rounded to, for inference of a float32 model on a
            CPU: "bfloat16" (products accumulate in float32), "int8" (weights only), "int8-dynamic" (weights, and
            activations as they come). The answers are then no longer those of the original (`verify` measures them).
            Parameters, state dict and saved files stay float32; a call that cannot use the copy, as in training, runs
            the float32 weights, and the report's fallbacks say so.
        offload: whether weights that were copied leave memory for an unlinked file in the temporary directory
            (TMPDIR), mapped in their place; they read, train and save as before. None: yes, with `quantization`.
        return_logits: False says that nobody reads the logits of a masked-language-model head (*ForMaskedLM) in calls
            with labels: a training loop, Trainer's too, that reads `.loss`. The loss is then made from the rows with a
            label alone, without the logits ever being there, in far less memory; `outputs.logits` is None. Of a
            SparseEncoder (SPLADE) it says that nobody but its SpladePooling reads them: `encode`, training and losses
            of sentence-transformers. Its vectors are then made without them; features have no "token_embeddings".
        cuda_graphs: True: inference on a GPU is recorded as CUDA graphs, one for each bucket of batches that comes
            twice, and replayed (docs/design.md, section 12). "auto": where that was measured to be faster, which is
            nowhere yet. False: never. What ran without although it was asked for, report.graphs() says.

    Returns:
        What was replaced, what was left, and why. A model with nothing to replace is left untouched; so is any model
        if an error occurs. What is left of a known family, and why, is also logged (logger "roberta_kernels").

    Parameters, buffers, state dict, forward's signature and what save_pretrained writes do not change. Patching twice
    is harmless: the options of the last call hold.

    Raises:
        ValueError: an unknown value of an option, options that contradict each other, or `quantization` for a model
        that is not float32 on a CPU. BackendError: an unknown or unavailable backend, or `quantization` without the
        compiled CPU kernels.
    """
    options.check_available()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    modules = list(model.named_modules())
    shared = PatchState(options, _known_reader(model), _pools_logits(model))
    report = PatchReport(backend=options.backend, state=shared)
    before: list[tuple[nn.Module, type, PatchState | None]] = []
    try:
        for name, module in modules:
            _patch_module(name, module, report, before)
    except BaseException:
        for module, _, state in before:
            if state is None:
                make_original(module)
            else:
                attach(module, state)
        raise
    for replaced, (module, *_) in zip(report.replaced, before, strict=True):
        attach_name(module, replaced.name)
        forget(module)  # what was derived under an earlier patch, with other options
    _say_left(model, report, any(isinstance(module, FastLayer) for module, *_ in before))
    return report


def _known_reader(model: nn.Module) -> bool:
    """Whether a model around those of the families is known to leave padded rows of its encoder alone."""
    if _kind(model) not in _LEAVE_PADDING:
        return False
    parts = _LEAVE_PADDING[_kind(model)]
    kinds = [_kind(part) for part in model.children()]
    return parts is None or all(package == _kind(model)[0] and name in parts for package, name in kinds)


def _pools_logits(model: nn.Module) -> bool:
    """Whether a SpladePooling is all that reads the logits of a masked-language-model head in it."""
    kinds = [_kind(model), *map(_kind, model.children())]
    transformer = {("sentence_transformers", name) for name in ("Transformer", "MLMTransformer")}
    return len(kinds) == 3 and (
        kinds[0] == ("sentence_transformers", "SparseEncoder")
        and kinds[1] in transformer
        and kinds[2] == ("sentence_transformers", "SpladePooling")
    )


def _kind(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__.partition(".")[0], type(module).__name__


def _patch_module(name: str, module: nn.Module, report: PatchReport, before: list[Any]) -> None:
    cls: Any = type(module)
    original = cls._rk_original if is_fast_class(cls) else cls
    role = role_of(original)
    if role is None:
        reason = _why_left(cls)
        if reason:
            report.left.append(Left(name, cls.__name__, reason))
        return
    difference = mismatch(module)
    if difference is not None:
        report.left.append(Left(name, cls.__name__, f"{_NOT_KNOWN}: {difference}"))
        return
    before.append((module, cls, attached(module)))
    make_fast(module, report.state)
    fused = _FUSED[role]
    if role in AROUND:
        fused = _layer_fused(module, fused)
    if role in LAYER_ROLES:
        if report.quantization is not None:
            _check_float32(name, module, report.quantization)
    elif role == "masked_lm_head" and not report.state.options.return_logits:
        head: Any = module._rk_head
        without = _LARGEST if report.state.pools_logits else "with labels: the loss, without logits"
        fused = f"{fused}; {head.vocabulary or without}"
    elif role == "splade_pooling" and report.state.options.return_logits:
        fused = "the original; with return_logits=False its logits are never all there"
    elif role in MODELS:
        facts: Any = module._rk_facts
        limits = dict.fromkeys((facts.masks, None if role == "attention_model" else facts.unpadded))
        fused = "; ".join([fused, *(reason for reason in limits if reason is not None)])
    report.replaced.append(Replaced(name, original.__name__, fused))


def _say_left(model: nn.Module, report: PatchReport, has_layer: bool) -> None:
    if report.quantization is not None and not has_layer:
        report.left.append(Left("", type(model).__name__, f"not quantised: {_NO_LAYER}"))
        logger.warning("roberta_kernels: %s is not quantised: %s", type(model).__name__, _NO_LAYER)
    strange = [left for left in report.left if left.reason.startswith(_NOT_KNOWN)]
    if strange:
        logger.warning(
            "roberta_kernels left %d modules as they are, the first of them %r, a %s: %s",
            *(len(strange), strange[0].name, strange[0].original, strange[0].reason),
        )
    if not report.replaced and not report.left:
        known = ", ".join(family.prefix for family in FAMILIES.values())
        report.left.append(Left("", type(model).__name__, f"holds no layer of a known family ({known})"))


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


def _layer_fused(layer: Any, fused: str) -> str:
    """What of `fused` runs fused in this layer."""
    parts = feed_forward_parts(layer)
    without = fused.replace("GELU feed-forward, ", "")
    if gelu_kind(parts.activation) is None:
        activation = type(parts.activation).__name__
        return f"{without} (feed-forward left: {activation})"
    if not plain_linear(parts.inner) or not plain_linear(parts.output.dense):
        return f"{without} (feed-forward left: its products are not plain nn.Linear)"
    return fused


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
    quantized.trim()


def refresh(model: nn.Module) -> None:
    """Says that weights of a patched model were changed in a way that torch does not count: through `.data`, a numpy
    view, another process. The next call sees it.

    Only quantised weights need this (`patch(quantization=...)`), as they are copies; they notice such an edit by
    themselves some calls later (docs/design.md, section 9). Harmless on any other module.
    """
    refresh_quantized(model)


def is_patched(model: nn.Module) -> bool:
    """Whether any part of the model runs on fused code."""
    return any(holds_fast_class(type(module)) for module in model.modules())


_wrapped: list[tuple[Any, Callable[..., None]]] = []
_options = Options()  # of the last patch_transformers


@takes_options
def patch_transformers(*, options: Options) -> contextlib.AbstractContextManager[None]:
    """Patches every model of a known family that is created from now on, by whatever route; options are patch's.

    As a context manager, `with patch_transformers(): ...`, only those created inside the block; the options of an outer
    block hold again after an inner one.
    """
    global _options
    options.check_available()
    before = _options if _wrapped else None
    _options = options
    if not _wrapped:
        for cls in family_classes(*MODEL_ROLES):
            _wrapped.append((cls, cls.__init__))
            cls.__init__ = _patching_init(cls, cls.__init__)
    return _back_on_exit(before)


def _patching_init(cls: type, original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if type(self) is cls and not known_code.making():
            patch(self, **dataclasses.asdict(_options))

    return init


def unpatch_transformers() -> None:
    """Ends patch_transformers(). Models that exist stay as they are (see unpatch)."""
    while _wrapped:
        cls, init = _wrapped.pop()
        cls.__init__ = init


@contextlib.contextmanager
def _back_on_exit(before: Options | None) -> Iterator[None]:
    global _options
    try:
        yield
    finally:
        if before is None:
            unpatch_transformers()
        else:
            _options = before
