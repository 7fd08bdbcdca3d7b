"""One run of a model over a batch: what it returns at real positions, what its layers return, and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from roberta_kernels.patching import PatchReport
from roberta_kernels.verification.report import GRADIENT, LAYERWISE, ORDINARY
from roberta_kernels.verification.subject import Subject, transformers_models

Found = dict[tuple[str, str], Tensor]  # (call, name) -> what a run made, at real positions


def run(
    subject: Subject,
    model: nn.Module,
    arguments: dict[str, Any],
    scale: float | None,
    after_call: Callable[[], None] | None = None,
) -> Found:
    """(call, name) -> what the model returned, at real positions; with a loss scale, the gradients too."""
    model.eval()
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        output = subject.call(model, arguments)
        if after_call is not None:
            after_call()
        layers, given = subject.layers(model, arguments)
    masks = _masks(arguments) or _masks(given)  # the second: a module around the model may make the mask itself
    found: Found = {(ORDINARY, name): tensor for name, tensor in _outputs(output, masks)}
    found |= {(LAYERWISE, name): tensor for name, tensor in _outputs(layers, _masks(given))}
    if scale is not None:
        with torch.enable_grad():
            output = subject.call(model, arguments)
            loss = output.get("loss")
            if loss is None:
                loss = _projection(_outputs(output, masks))
            (loss * scale).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[GRADIENT, name] = parameter.grad.detach()
        model.zero_grad(set_to_none=True)
    return found


def detours(report: PatchReport) -> Iterator[str]:
    """What the call so far did not run packed and fused, and why."""
    for reason, calls in report.fallbacks().items():
        yield f"as called, the original code ran {calls} times: {reason}"
    for reason in report.padded():
        yield f"as called, it ran padded: {reason}"


def loss_scale(model: nn.Module) -> float:
    """float16 gradients underflow without the scaling that float16 training uses; a power of two adds no error."""
    return 1024.0 if any(p.dtype == torch.float16 for p in model.parameters()) else 1.0


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


def to_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in arguments.items()
    }


def float64_attention(model: nn.Module) -> None:
    """FlashAttention has no float64; the plain implementations compute the same function."""
    for _, inner in transformers_models(model):
        config = getattr(inner, "config", None)
        choose: Any = getattr(inner, "set_attn_implementation", None)
        if choose is not None and getattr(config, "_attn_implementation", "sdpa") not in ("sdpa", "eager"):
            choose("sdpa")
