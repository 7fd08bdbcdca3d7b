"""Does the numerical promise (docs/design.md, section 6) hold for this model? Three runs of it, side by side.

The model is copied, and the copy runs three times over one batch: as it is, patched, and as it is in float64. Whatever
the model returns is compared at real positions, and so is what every layer returns. The patched copy runs twice: as a
user calls it (padding taken out before the embeddings), and once more asked for its hidden states, which shows each
layer.

The original's own error is the yardstick, and where it is one draw of luck (a loss, the scores of one sentence; a
gradient, all of whose elements share the rounding of one loss) it is at times small by chance. Where the plain rule
fails on such a tensor, the original is therefore measured again with its weights moved by at most one rounding,
several times, and its largest error counts: `SMALL` and `REDRAWS`.

Quantised weights give other answers by intention. They are not held to the promise: their errors are measured, beside
those of the float32 weights, which are held to it, and which every call falls back to that cannot use the others.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from roberta_kernels import backends, tolerance
from roberta_kernels.patching import PatchReport, patch, unpatch

SMALL = 1024  # numbers; below it the largest error of one run says little about the error of the next
REDRAWS = 4

ORDINARY, LAYERWISE, GRADIENT = "as called", "layerwise", "gradient"
_LENGTHS = (40, 27, 16, 9, 5, 3, 2)  # of the generated batch


class VerificationError(ValueError):
    """This model or batch cannot be verified; the message says why."""


@dataclass(frozen=True)
class Entry:
    """One tensor: which call of the patched model made it, and its errors.

    quantised: it was made with quantised weights, whose errors are measured and not judged. relative: then its root
    mean square error in units of the root mean square of its exact values.
    """

    call: str
    comparison: tolerance.Comparison
    redrawn: bool = False
    quantised: bool = False
    relative: float = 0.0

    @property
    def name(self) -> str:
        return self.comparison.name

    @property
    def holds(self) -> bool:
        """True of what is not judged."""
        return self.quantised or self.comparison.holds

    @property
    def share(self) -> float:
        """The larger of (largest error / allowed, rms error / allowed): above 1 the promise is broken."""
        c = self.comparison
        pairs = ((c.max_error, c.max_allowed), (c.rms_error, c.rms_allowed))
        return max(0.0 if error == 0 else error / allowed if allowed > 0 else float("inf") for error, allowed in pairs)


@dataclass(frozen=True)
class VerificationReport:
    """What `verify` found. `holds` is the answer; print it, or `str()` it, for the table."""

    model: str
    dtype: str
    device: str
    backend: str
    batch: str
    entries: tuple[Entry, ...]
    patch_report: PatchReport
    notes: tuple[str, ...] = field(default=())
    quantization: str | None = None

    @property
    def holds(self) -> bool:
        """Whether the promise holds. With a quantization this speaks of the float32 weights only."""
        return all(entry.holds for entry in self.entries)

    @property
    def broken(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if not entry.holds)

    @property
    def worst(self) -> Entry:
        return max((entry for entry in self.entries if not entry.quantised), key=lambda entry: entry.share)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the patch report's types, for json.dump."""
        return {
            "model": self.model,
            "dtype": self.dtype,
            "device": self.device,
            "backend": self.backend,
            "batch": self.batch,
            "quantization": self.quantization,
            "holds": self.holds,
            "replaced": len(self.patch_report.replaced),
            "left": [{"name": item.name, "reason": item.reason} for item in self.patch_report.left],
            "notes": list(self.notes),
            "entries": [
                {"call": e.call, "holds": e.holds, "redrawn": e.redrawn, **dataclasses.asdict(e.comparison)}
                for e in self.entries
                if not e.quantised
            ],
            "quantised_entries": [
                {"call": e.call, "relative_error": e.relative, **dataclasses.asdict(e.comparison)}
                for e in self.entries
                if e.quantised
            ],
        }

    def _quantised_summary(self) -> str:
        called = [e for e in self.entries if e.quantised and e.call == self.quantization]
        worst = max(called, key=lambda entry: entry.relative)
        c = worst.comparison
        return (
            f"The {self.quantization} weights are not held to it, and give other answers: {worst.name} is off by up to "
            f"{c.max_error:.1e} (original {c.max_error_original:.1e}), {worst.relative:.2%} of its values in the mean."
        )

    def _summary(self) -> str:
        if self.holds:
            weights = "" if self.quantization is None else " with the float32 weights"
            return (
                f"The promise holds{weights}: every error is within its allowance (closest: {self.worst.name}, "
                f"{self.worst.share:.0%} of it)."
            )
        names = ", ".join(dict.fromkeys(entry.name for entry in self.broken[:4]))
        more = f" and {len(self.broken) - 4} more" if len(self.broken) > 4 else ""
        return f"The promise is BROKEN for {names}{more}."

    def __rich__(self) -> Group:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("tensor", overflow="fold")
        table.add_column("call")
        for heading in ("largest error", "original's", "allowed", "rms / allowed"):
            table.add_column(heading, justify="right")
        table.add_column("verdict")
        for name, entry in self._rows():
            c = entry.comparison
            if entry.quantised:
                errors = (f"{c.max_error:.2e}", f"{c.max_error_original:.2e}", "-", "-")
                table.add_row(Text(name), entry.call, *errors, Text(f"off by {entry.relative:.2%}", "yellow"))
                continue
            rms = "0%" if c.rms_error == 0 else f"{c.rms_error / c.rms_allowed:.0%}" if c.rms_allowed > 0 else "-"
            table.add_row(
                Text(name),
                entry.call,
                f"{c.max_error:.2e}",
                f"{c.max_error_original:.2e}" + ("*" if entry.redrawn else ""),
                f"{c.max_allowed:.2e}",
                rms,
                Text("holds", "green") if entry.holds else Text("BROKEN", "bold red"),
            )
        lines: list[RenderableType] = [
            Text(f"{self.model}, {self.dtype} on {self.device}, {self.batch}"),
            Text(f"served by: {self.backend}"),
            *self._patched(),
            table,
        ]
        if any(entry.redrawn for entry in self.entries):
            lines.append(Text(f"* the original's largest error over {REDRAWS + 1} runs, weights one rounding apart"))
        lines += [Text(note) for note in self.notes]
        lines.append(Text(self._summary(), "green" if self.holds else "bold red"))
        if self.quantization is not None:
            lines.append(Text(self._quantised_summary(), "yellow"))
        return Group(*lines)

    def _patched(self) -> list[Text]:
        lines = [Text(f"patch replaced {len(self.patch_report.replaced)} modules")]
        reasons: dict[str, list[str]] = {}
        for item in self.patch_report.left:
            reasons.setdefault(item.reason, []).append(item.name)
        for reason, names in reasons.items():
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            lines.append(Text(f"patch left {listed}: {reason}"))
        return lines

    def _rows(self) -> Iterator[tuple[str, Entry]]:
        """Every output; of the gradients the worst of each layer."""
        groups: dict[str, list[Entry]] = {}
        for entry in self.entries:
            if entry.call != GRADIENT:
                yield entry.name, entry
            else:
                groups.setdefault(_layer_of(entry.name), []).append(entry)
        for group, members in groups.items():
            worst = max(members, key=lambda entry: entry.share)
            tail = worst.name[len(group) :].lstrip(".")
            yield (f"{group} (worst of {len(members)}: {tail})" if tail and len(members) > 1 else worst.name), worst

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=120, color_system=None).print(self)
        return text.getvalue().rstrip("\n")


def _layer_of(parameter: str) -> str:
    layer = re.match(r"(?:.*\.)?layer\.\d+(?=\.)", parameter)
    if layer is None:
        layer = re.match(r"(?:.*\.)?embeddings(?=\.)", parameter)
    return layer.group() if layer else parameter.rpartition(".")[0] or parameter


def verify(
    model: nn.Module,
    batch: Mapping[str, Any] | None = None,
    *,
    packed: bool | str = "auto",
    backend: str = "auto",
    prepack: bool = True,
    quantization: str | None = None,
    gradients: bool = False,
) -> VerificationReport:
    """Runs original and patched side by side against a float64 original, layer by layer, in eval mode.

    Args:
        model: any model that `patch` accepts, patched or not. It is copied; it and the random state stay as they are.
        batch: keyword arguments of a call, e.g. what a tokenizer returns. By default random token ids in sequences of
            mixed lengths, padded on the right, with labels where the task is known.
        packed, backend, prepack: as for `patch`.
        quantization: as for `patch`; None: what the model is patched with, if it is. The errors of quantised weights
            are reported beside the others, and not held to the promise.
        gradients: compares the gradient of every parameter too: of the loss, or, where the model returns none, of a
            fixed random projection of what it returns.

    Raises:
        VerificationError: patch finds nothing to replace, or a batch cannot be made for this model, or it cannot be
            quantised.
        BackendError: the backend asked for cannot serve this model.
    """
    notes: list[str] = []
    inner, path = _transformers_model(model)
    quantization = quantization or _quantization_of(inner)
    if path:
        notes.append(f"verified is {path}, the transformers model inside {type(model).__name__}")
    parameter = next((p for p in inner.parameters() if p.is_floating_point()), None)
    if parameter is None:
        raise VerificationError(f"{type(inner).__name__} has no floating-point parameters")
    devices = [parameter.device] if parameter.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        arguments = generated_batch(inner) if batch is None else dict(batch)
        arguments = {
            key: value.to(parameter.device) if isinstance(value, Tensor) else value
            for key, value in arguments.items()
            if key not in ("return_dict", "output_hidden_states", "output_attentions")
        }
        with backends.backend(backend if backend != "auto" else backends.current_backend()):
            served = backends.serving(parameter)
        work = _copy(inner)
        scale = _loss_scale(work) if gradients else None
        if scale not in (None, 1.0):
            notes.append(f"gradients are those of {scale:.0f} times the loss: float16 training scales it too")
        original = _run(work, arguments, scale)

        report = patch(work, packed=packed, backend=backend, prepack=prepack)
        if not report.replaced:
            left = report.left[0].reason if report.left else "it has no RoBERTa-like encoder"
            raise VerificationError(f"patch finds nothing to replace in {type(inner).__name__}: {left}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what patch warns about is in the notes
            ours = _run(work, arguments, scale, lambda: notes.extend(_detours(report)))
        rounded = {}
        if quantization is not None:
            rounded = _run_quantised(work, arguments, notes, packed=packed, backend=backend, quantization=quantization)
        unpatch(work)
        _float64_attention(work.double())
        exact = _run(work, _to_float64(arguments), scale)
        del work

        missing = [f"{call} {name}" for call, name in original if (call, name) not in ours]
        if missing:
            raise VerificationError(f"the patched model does not return {', '.join(missing)}, and the original does")
        entries = [
            Entry(key[0], tolerance.compare(ours[key], original[key], exact[key], name=key[1])) for key in original
        ]
        if any(not entry.holds and _one_draw(entry, exact) for entry in entries):
            entries = _redraw(inner, arguments, scale, entries, ours, exact)
        for key, tensor in rounded.items():
            call = str(quantization) + (", layerwise" if key[0] == LAYERWISE else "")
            comparison = tolerance.compare(tensor, original[key], exact[key], name=key[1])
            size = float(exact[key].double().square().mean().sqrt()) if exact[key].numel() else 0.0
            relative = comparison.rms_error / size if size > 0 else 0.0
            entries.append(Entry(call, comparison, quantised=True, relative=relative))
    return VerificationReport(
        model=type(inner).__name__,
        dtype=str(parameter.dtype).removeprefix("torch."),
        device=str(parameter.device),
        backend=f"{served} ({served.detail})",
        batch=_describe(arguments),
        entries=tuple(entries),
        patch_report=report,
        notes=tuple(notes),
        quantization=quantization,
    )


def _quantization_of(model: nn.Module) -> str | None:
    """What a patched model's weights are rounded to."""
    states = (module.__dict__.get("_rk_state") for module in model.modules())
    return next((state.quantization for state in states if state is not None), None)


def _run_quantised(
    model: nn.Module, arguments: dict[str, Any], notes: list[str], **options: Any
) -> dict[tuple[str, str], Tensor]:
    """_run with quantised weights; what did not use them goes to the notes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            report = patch(model, offload=False, **options)
        except ValueError as error:
            raise VerificationError(str(error)) from None
        ours = _run(model, arguments, None)
    notes += [f"{reason} ({calls} calls)" for reason, calls in report.fallbacks().items() if "float32" in reason]
    notes += [item.reason for item in report.left if "not quantised" in item.reason]
    return ours


def _one_draw(entry: Entry, exact: dict[tuple[str, str], Tensor]) -> bool:
    return entry.call == GRADIENT or exact[entry.call, entry.name].numel() < SMALL


def _redraw(
    model: nn.Module,
    arguments: dict[str, Any],
    scale: float | None,
    entries: list[Entry],
    ours: dict[tuple[str, str], Tensor],
    exact: dict[tuple[str, str], Tensor],
) -> list[Entry]:
    """Judges again what failed and is one draw of luck, by the largest error of several runs of the original."""
    for draw in range(REDRAWS):
        nudged = _copy(model)
        nudge(nudged, seed=draw)
        run = _run(nudged, arguments, scale)
        for i, entry in enumerate(entries):
            key = (entry.call, entry.name)
            if (entry.redrawn or not entry.holds) and _one_draw(entry, exact):
                again = tolerance.compare(ours[key], run[key], exact[key], name=entry.name)
                before = entry.comparison
                larger = dataclasses.replace(
                    before,
                    max_error_original=max(before.max_error_original, again.max_error_original),
                    max_allowed=max(before.max_allowed, again.max_allowed),
                    rms_error_original=max(before.rms_error_original, again.rms_error_original),
                    rms_allowed=max(before.rms_allowed, again.rms_allowed),
                )
                entries[i] = Entry(entry.call, larger, redrawn=True)
    return entries


@torch.no_grad()
def nudge(model: nn.Module, *, seed: int) -> None:
    """Moves every weight up or down by at most one rounding of its dtype."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            up = torch.randint(0, 2, parameter.shape, generator=generator).to(parameter.device, parameter.dtype)
            parameter.add_(parameter * (2 * up - 1), alpha=torch.finfo(parameter.dtype).eps / 2)


# -- the runs ----------------------------------------------------------------------------------------------------------


def _run(
    model: nn.Module,
    arguments: dict[str, Any],
    scale: float | None,
    after_call: Callable[[], None] | None = None,
) -> dict[tuple[str, str], Tensor]:
    """(call, name) -> what the model returned, at real positions; with a loss scale, the gradients too."""
    model.eval()
    model.zero_grad(set_to_none=True)
    masks = _masks(arguments)
    found: dict[tuple[str, str], Tensor] = {}
    with torch.no_grad():
        for name, tensor in _outputs(_call(model, arguments), masks):
            found[ORDINARY, name] = tensor
        if after_call is not None:
            after_call()
        for name, tensor in _outputs(_call(model, arguments, output_hidden_states=True), masks):
            found[LAYERWISE, name] = tensor
    if scale is not None:
        with torch.enable_grad():
            output = _call(model, arguments)
            loss = output.get("loss")
            if loss is None:
                loss = _projection(_outputs(output, masks))
            (loss * scale).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[GRADIENT, name] = parameter.grad.detach()
        model.zero_grad(set_to_none=True)
    return found


def _detours(report: PatchReport) -> Iterator[str]:
    """What the call so far did not run packed and fused, and why."""
    for reason, calls in report.fallbacks().items():
        yield f"as called, the original code ran {calls} times: {reason}"
    for reason in report.padded():
        yield f"as called, it ran padded: {reason}"


def _loss_scale(model: nn.Module) -> float:
    """float16 gradients underflow without the scaling that float16 training uses; a power of two adds no error."""
    return 1024.0 if any(p.dtype == torch.float16 for p in model.parameters()) else 1.0


def _call(model: nn.Module, arguments: dict[str, Any], **extra: Any) -> Any:
    output = model(**arguments, **extra, return_dict=True)
    if not isinstance(output, Mapping):
        raise VerificationError(f"{type(model).__name__} returns {type(output).__name__}, expected a ModelOutput")
    return output


def _outputs(output: Mapping[str, Any], masks: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for key, value in output.items():
        mask = masks.get("encoder" if key.startswith("encoder") else "main")
        if isinstance(value, Tensor):
            if value.is_floating_point():
                yield key, _at_real_positions(key, value, mask)
        elif key.endswith("hidden_states") and isinstance(value, tuple):
            side = key.removesuffix("hidden_states").replace("_", " ")
            for i, state in enumerate(value):
                name = f"{side}embeddings" if i == 0 else f"{side}layer {i - 1}"
                yield name, _at_real_positions(key, state, mask)


def _at_real_positions(key: str, tensor: Tensor, mask: Tensor | None) -> Tensor:
    """`[B, S, ...]` -> `[real tokens, ...]`; what has no positions stays whole (a `[B, S]` is scores of positions only
    where its name says so: with S labels it could be anything)."""
    positional = tensor.dim() == 3 or key in ("start_logits", "end_logits")
    if mask is not None and positional and tensor.shape[:2] == mask.shape:
        return tensor[mask]
    return tensor


def _masks(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Which positions are real, flat `[sequences, positions]`: of the model, and of an encoder-decoder's encoder."""

    def flat(name: str) -> Tensor | None:
        mask = arguments.get(name)
        return mask.reshape(-1, mask.shape[-1]).bool() if isinstance(mask, Tensor) and mask.dim() in (2, 3) else None

    sides = {"main": flat("attention_mask")}
    if "decoder_input_ids" in arguments:
        sides = {"main": flat("decoder_attention_mask"), "encoder": flat("attention_mask")}
    return {side: mask for side, mask in sides.items() if mask is not None}


def _projection(outputs: Iterator[tuple[str, Tensor]]) -> Tensor:
    """One number that every output moves, the same function in every run: each output's product with fixed noise."""
    generator = torch.Generator().manual_seed(0)
    terms = []
    for _, tensor in outputs:
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.device)
        wide = tensor if tensor.dtype == torch.float64 else tensor.float()
        terms.append((wide * noise.to(wide.dtype)).sum() / tensor.numel() ** 0.5)
    return torch.stack(terms).sum()


def _to_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in arguments.items()
    }


def _float64_attention(model: nn.Module) -> None:
    """FlashAttention has no float64; the plain implementations compute the same function."""
    config = getattr(model, "config", None)
    choose: Any = getattr(model, "set_attn_implementation", None)
    if choose is not None and getattr(config, "_attn_implementation", "sdpa") not in ("sdpa", "eager"):
        choose("sdpa")


# -- models ------------------------------------------------------------------------------------------------------------


def _transformers_model(model: nn.Module) -> tuple[nn.Module, str]:
    """The model that takes a tokenizer's batch, and where in `model` it was found ("" for the model itself)."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel) or hasattr(model, "get_base_model"):  # the second: PEFT's wrapper
        return model, ""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not any(name.startswith(f"{outer}.") for outer, _ in found):
            found.append((name, module))
    if len(found) != 1:
        raise VerificationError(
            f"{type(model).__name__} is not a transformers model and contains {len(found)} of them; "
            "verify each on its own"
        )
    return found[0][1], found[0][0]


def _copy(model: nn.Module) -> nn.Module:
    try:
        work = copy.deepcopy(model)
    except Exception as error:
        raise VerificationError(f"{type(model).__name__} cannot be copied: {error}") from error
    unpatch(work)  # of a FastRoberta* model it makes its namesake
    return work.eval()


# -- batches -----------------------------------------------------------------------------------------------------------


def generated_batch(model: nn.Module) -> dict[str, Any]:
    """Random token ids in sequences of mixed lengths, padded on the right, with what else the model's task asks for."""
    config: Any = getattr(model, "config", None)
    source = getattr(config, "encoder", None) or config
    vocabulary, positions = getattr(source, "vocab_size", None), getattr(source, "max_position_embeddings", None)
    if not isinstance(vocabulary, int) or not isinstance(positions, int):
        raise VerificationError(
            f"no batch can be made up for {type(model).__name__}: its configuration has no vocab_size or "
            "max_position_embeddings; pass a batch"
        )
    pad = _id(source, "pad_token_id", 1)
    longest = max(1, min(_LENGTHS[0], positions - pad - 1))
    lengths = sorted({max(1, length * longest // _LENGTHS[0]) for length in _LENGTHS}, reverse=True)
    generator = torch.Generator().manual_seed(0)
    first, last = _id(source, "bos_token_id", 0), _id(source, "eos_token_id", 2)
    words = torch.tensor([i for i in range(vocabulary) if i not in (pad, first, last)] or [first])
    ids = torch.full((len(lengths), longest), pad)
    for row, length in enumerate(lengths):
        ids[row, :length] = words[torch.randint(len(words), (length,), generator=generator)]
        ids[row, length - 1] = last
        ids[row, 0] = first
    mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    batch = complete_batch(model, ids, mask.long())
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        batch |= {"decoder_input_ids": ids.flip(0), "decoder_attention_mask": mask.flip(0).long()}
        batch.pop("labels", None)
    return batch


def complete_batch(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
    """The two, `[B, S]`, as this model's task takes them, with labels where the task is known."""
    unwrap: Any = getattr(model, "get_base_model", None)
    base: Any = unwrap() if unwrap is not None else model
    task = re.search(r"For([A-Za-z]+)$", type(base).__name__)
    known = task.group(1) if task else ""
    config = base.config
    generator = torch.Generator().manual_seed(1)
    batch: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    rows, labels = len(input_ids), max(1, getattr(config, "num_labels", 2))
    real = attention_mask.bool()
    if known in ("MaskedLM", "CausalLM"):
        batch["labels"] = input_ids.masked_fill(~real, -100)
    elif known == "TokenClassification":
        batch["labels"] = torch.randint(labels, input_ids.shape, generator=generator).masked_fill(~real, -100)
    elif known == "SequenceClassification":
        kind = getattr(config, "problem_type", None) or ("regression" if labels == 1 else "single_label_classification")
        if kind == "single_label_classification":
            batch["labels"] = torch.randint(labels, (rows,), generator=generator)
        else:
            dtype = next(base.parameters()).dtype
            shape = (rows,) if kind == "regression" and labels == 1 else (rows, labels)
            batch["labels"] = torch.rand(shape, generator=generator).round().to(dtype)
    elif known == "QuestionAnswering":
        ends = attention_mask.sum(1) - 1
        batch |= {"start_positions": ends // 2, "end_positions": ends}
    elif known == "MultipleChoice":
        pairs = rows // 2 * 2
        if pairs == 0:
            raise VerificationError("a multiple-choice model needs two sequences or more")
        batch = {key: value[:pairs].reshape(pairs // 2, 2, -1) for key, value in batch.items()}
        batch["labels"] = torch.randint(2, (pairs // 2,), generator=generator)
    return batch


def _id(config: Any, name: str, default: int) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value >= 0 else default


def _describe(arguments: dict[str, Any]) -> str:
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() in (2, 3):
        rows = mask.numel() // mask.shape[-1]
        return f"{rows} sequences, {int(mask.bool().sum())} real tokens of {mask.numel()}"
    tensor = next((v for v in arguments.values() if isinstance(v, Tensor)), None)
    return f"a batch of shape {list(tensor.shape)}" if tensor is not None else "an empty batch"
