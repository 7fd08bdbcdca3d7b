"""Original, patched and float64, side by side over one batch.

The model is copied, and the copy runs three times: as it is, patched, and as it is in float64. Whatever the model
returns is compared at real positions, and so is what every layer returns. The patched copy runs twice: as a user calls
it (padding taken out before the embeddings), and once more asked for its hidden states, which shows each layer.

The original's own error is the yardstick. Where an error is one draw of luck (a loss, the scores of one sentence; a
gradient, all of whose elements share the rounding of one loss), the original's is at times small by chance and ours
large: the gradient of the keys' bias is nothing but rounding, being zero in exact arithmetic. Where the plain rule
fails on such a tensor, both are therefore measured again with the weights moved by at most one rounding, several
times, and the mean of our errors is held to the largest of the original's: `SMALL` and `REDRAWS`. A mean hides
nothing that is wrong: one nan or infinity makes it infinite.

Quantised weights give other answers by intention. They are not held to the promise: their errors are measured, beside
those of the float32 weights, which are held to it, and which every call falls back to that cannot use the others.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from roberta_kernels import backends, tolerance
from roberta_kernels.hf.state import attached, warn_of_former
from roberta_kernels.patching import PatchReport, patch, unpatch
from roberta_kernels.verification.batches import describe, generated_batch
from roberta_kernels.verification.report import (
    GRADIENT,
    LAYERWISE,
    REDRAWS,
    Entry,
    VerificationError,
    VerificationReport,
)
from roberta_kernels.verification.run import Found, detours, float64_attention, loss_scale, run, to_float64
from roberta_kernels.verification.subject import Subject, subject_of, transformers_models, without_choices

SMALL = 1024  # numbers; below it the largest error of one run says little about the error of the next


def verify(
    model: nn.Module,
    batch: Mapping[str, Any] | None = None,
    *,
    padded_rows: str = "exact",
    backend: str = "auto",
    quantization: str | None = None,
    gradients: bool = False,
    **former: Any,
) -> VerificationReport:
    """Runs original and patched side by side against a float64 original, layer by layer, in eval mode.

    Args:
        model: any model that `patch` accepts, patched or not. It is copied; it and the random state stay as they are.
            A module around a transformers model is itself called, and what it returns is compared: tensors, or a
            ModelOutput, tuple or dict of them.
        batch: keyword arguments of a call, e.g. what a tokenizer returns. By default random token ids in sequences of
            mixed lengths, padded on the right, with labels where the task is known. A module whose one argument is the
            batch gets it as a dict.
        padded_rows, backend: as for `patch`; of the options of former versions too.
        quantization: as for `patch`; None: what the model is patched with, if it is. The errors of quantised weights
            are reported beside the others, and not held to the promise.
        gradients: compares the gradient of every parameter too: of the loss, or, where the model returns none, of a
            fixed random projection of what it returns.

    Raises:
        VerificationError: patch finds nothing to replace, or the model cannot be called with this batch, or none can
            be made for it, or it cannot be quantised.
        BackendError: the backend asked for is not available for this model.
    """
    warn_of_former(former)
    padded_rows = former.pop("padded_rows", padded_rows)
    if former:
        raise TypeError(f"verify() got an unexpected keyword argument {next(iter(former))!r}")
    inner = _inner_models(model, batch)
    parameter = next((p for part in inner for p in part.parameters() if p.is_floating_point()), None)
    if parameter is None:
        raise VerificationError(f"{type(model).__name__} has no floating-point parameters")
    with torch.random.fork_rng(devices=[parameter.device] if parameter.device.type == "cuda" else []):
        call = _call(model, generated_batch(inner[0]) if batch is None else batch, batch is None, parameter.device)
        call = dataclasses.replace(
            call, scale=loss_scale(model) if gradients else None, quantization=quantization or _quantization_of(model)
        )
        with backends.backend(backend if backend != "auto" else backends.current_backend()):
            served = backends.serving(parameter)
        notes: list[str] = []
        runs = _runs(model, call, notes, padded_rows=padded_rows, backend=backend)
        entries = _judged(model, call, runs, padded_rows=padded_rows, backend=backend) + _measured(call, runs)
    return VerificationReport(
        model=call.subject.name,
        dtype=str(parameter.dtype).removeprefix("torch."),
        device=str(parameter.device),
        backend=f"{served} ({served.detail})",
        batch=describe(call.arguments),
        entries=tuple(entries),
        patch_report=runs.report,
        notes=(*_notes(call, runs), *notes),
        quantization=call.quantization,
    )


# -- the model and the call --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """What every run does. scale: of the loss whose gradients are compared; None: they are not."""

    subject: Subject
    arguments: dict[str, Any]
    scale: float | None = None
    quantization: str | None = None

    def run(self, model: nn.Module, after_call: Callable[[], None] | None = None) -> Found:
        return run(self.subject, model, self.arguments, self.scale, after_call)


def _inner_models(model: nn.Module, batch: Mapping[str, Any] | None) -> list[nn.Module]:
    """The transformers models in it, or itself."""
    found = [inner for _, inner in transformers_models(model)]
    if not found or (batch is None and len(found) != 1):
        raise VerificationError(
            f"{type(model).__name__} is not a transformers model and contains {len(found)} of them; "
            "verify each on its own" + (", or pass a batch that it takes" if found else "")
        )
    return found


def _call(model: nn.Module, batch: Mapping[str, Any], generated: bool, device: torch.device) -> _Call:
    """A call with the batch on the model's device."""
    arguments = without_choices(batch)
    arguments = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in arguments.items()}
    return _Call(*subject_of(model, arguments, generated=generated))


def _notes(call: _Call, runs: _Runs) -> list[str]:
    notes = []
    if call.subject.wrapped and any(name == LAYERWISE for name, _ in runs.original):
        notes.append(f"layers are those of {call.subject.path}, the transformers model inside {call.subject.name}")
    elif call.subject.wrapped:
        notes.append(f"only what {call.subject.name} returns is compared: it does not call one transformers model")
    if call.scale not in (None, 1.0):
        notes.append(f"gradients are those of {call.scale:.0f} times the loss: float16 training scales it too")
    return notes


def _copy(model: nn.Module) -> nn.Module:
    try:
        work = copy.deepcopy(model)
    except Exception as error:
        raise VerificationError(f"{type(model).__name__} cannot be copied: {error}") from error
    unpatch(work)  # of a FastRoberta* model it makes its namesake
    return work.eval()


def _quantization_of(model: nn.Module) -> str | None:
    """What a patched model's weights are rounded to."""
    states = map(attached, model.modules())
    return next((state.options.quantization for state in states if state is not None), None)


# -- the runs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Runs:
    """What each run found. rounded: of the quantised weights, empty where there are none."""

    original: Found
    ours: Found
    exact: Found
    rounded: Found
    report: PatchReport


def _runs(model: nn.Module, call: _Call, notes: list[str], **options: Any) -> _Runs:
    """options: of `patch`. Adds to the notes what ran otherwise than it should."""
    work = _copy(model)
    call.subject.check(work, call.arguments)
    original = call.run(work)
    report = patch(work, **options)
    if not report.replaced:
        left = report.left[0].reason if report.left else "it has no RoBERTa-like encoder"
        raise VerificationError(f"patch finds nothing to replace in {type(model).__name__}: {left}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what patch warns about is in the notes
        ours = call.run(work, after_call=lambda: notes.extend(detours(report)))
    rounded = {} if call.quantization is None else _run_quantised(work, call, notes, **options)
    unpatch(work)
    float64_attention(work.double())
    exact = dataclasses.replace(call, arguments=to_float64(call.arguments)).run(work)
    missing = [f"{call_name} {name}" for call_name, name in original if (call_name, name) not in ours]
    if missing:
        raise VerificationError(f"the patched model does not return {', '.join(missing)}, and the original does")
    return _Runs(original, ours, exact, rounded, report)


def _run_quantised(
    model: nn.Module, call: _Call, notes: list[str], *, padded_rows: str, backend: str, **rest: Any
) -> Found:
    """run with quantised weights; what did not use them goes to the notes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            report = patch(
                model, padded_rows=padded_rows, backend=backend, quantization=call.quantization, offload=False
            )
        except ValueError as error:
            raise VerificationError(str(error)) from None
        ours = dataclasses.replace(call, scale=None).run(model)
    notes += [f"{reason} ({calls} calls)" for reason, calls in report.fallbacks().items() if "float32" in reason]
    notes += [item.reason for item in report.left if "not quantised" in item.reason]
    return ours


# -- judging -----------------------------------------------------------------------------------------------------------


def _judged(model: nn.Module, call: _Call, runs: _Runs, **options: Any) -> list[Entry]:
    """options: of `patch`."""
    entries = [
        Entry(key[0], tolerance.compare(runs.ours[key], runs.original[key], runs.exact[key], name=key[1]))
        for key in runs.original
    ]
    if any(not entry.holds and _one_draw(entry, runs.exact) for entry in entries):
        entries = _redrawn(model, call, runs, entries, **options)
    return entries


def _measured(call: _Call, runs: _Runs) -> list[Entry]:
    """What the quantised weights made, with its distance from what is exact."""
    entries = []
    for key, tensor in runs.rounded.items():
        name = str(call.quantization) + (", layerwise" if key[0] == LAYERWISE else "")
        comparison = tolerance.compare(tensor, runs.original[key], runs.exact[key], name=key[1])
        exact = runs.exact[key]
        size = float(exact.double().square().mean().sqrt()) if exact.numel() else 0.0
        relative = comparison.rms_error / size if size > 0 else 0.0
        entries.append(Entry(name, comparison, quantised=True, relative=relative))
    return entries


def _one_draw(entry: Entry, exact: Found) -> bool:
    return entry.call == GRADIENT or exact[entry.call, entry.name].numel() < SMALL


def _redrawn(model: nn.Module, call: _Call, runs: _Runs, entries: list[Entry], **options: Any) -> list[Entry]:
    """entries, with those that failed and are one draw of luck judged by several. options: of `patch`."""
    failed = {
        i: [entry.comparison] for i, entry in enumerate(entries) if not entry.holds and _one_draw(entry, runs.exact)
    }
    for draw in range(REDRAWS):
        nudged = _copy(model)
        nudge(nudged, seed=draw)
        original = call.run(nudged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said of the first
            patch(nudged, **options)
            ours = call.run(nudged)
        for i, comparisons in failed.items():
            key = (entries[i].call, entries[i].name)
            comparisons.append(tolerance.compare(ours[key], original[key], runs.exact[key], name=entries[i].name))
    return [
        Entry(entry.call, over_draws(failed[i]), redrawn=True) if i in failed else entry
        for i, entry in enumerate(entries)
    ]


def over_draws(draws: list[tolerance.Comparison]) -> tolerance.Comparison:
    """The mean of our errors, beside the largest of the original's and what it allows."""
    return tolerance.Comparison(
        draws[0].name,
        max_error=statistics.fmean(draw.max_error for draw in draws),
        max_error_original=max(draw.max_error_original for draw in draws),
        max_allowed=max(draw.max_allowed for draw in draws),
        rms_error=statistics.fmean(draw.rms_error for draw in draws),
        rms_error_original=max(draw.rms_error_original for draw in draws),
        rms_allowed=max(draw.rms_allowed for draw in draws),
    )


@torch.no_grad()
def nudge(model: nn.Module, *, seed: int) -> None:
    """Moves every weight up or down by at most one rounding of its dtype."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            up = torch.randint(0, 2, parameter.shape, generator=generator).to(parameter.device, parameter.dtype)
            parameter.add_(parameter * (2 * up - 1), alpha=torch.finfo(parameter.dtype).eps / 2)
