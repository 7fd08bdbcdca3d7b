"""Which layers can run as one op call, on their parameters or on quantised copies of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from roberta_kernels import backends
from roberta_kernels.encoder_call import EncoderCall, LayerSettings, LayerTensors
from roberta_kernels.hf.choice import LayerChoice
from roberta_kernels.hf.state import Options, memory_of, state_of
from roberta_kernels.hf.structure import attention_parts, feed_forward_parts
from roberta_kernels.ops.attention import supported_head_dim
from roberta_kernels.quantized import LayerCopies, QuantizedCall

GRADIENTS = "gradients are needed (torch.no_grad() was not set)"
NOT_QUANTISED = "the quantised weights are not used"
_TRAINING = "training mode"
_UNSETTLED = "they were changed, and are copied again once they are the same in two calls"


# What a layer is made of; its attention is another op where its scores have a bias.
_OPS = ("attention", "add_layer_norm", "gelu_ffn")
_BIASED_OPS = (backends.BIASED_ATTENTION, *_OPS[1:])


def op_backend(options: Options, like: Tensor, biased: bool) -> tuple[str | None, str | None]:
    """Whose op can run layers in such a call of the model, "cpu" or "cuda", and None; or None, and why none can.

    like: a tensor of the device and dtype of the hidden states. biased: whether the model has a bias on its scores.
    """
    if type(like) not in (Tensor, nn.Parameter) or like.device.type not in ("cpu", "cuda"):
        return None, "hidden states are neither on a CPU nor on a GPU"
    if options.quantization is not None and not like.is_cpu:
        return None, "hidden states are not on the CPU"
    backend = backends.serves_alone(like, _BIASED_OPS if biased else _OPS)
    if backend not in ("cpu", "cuda") or (backend == "cuda" and options.quantization is not None):
        return None, "a backend other than the compiled kernels is in use"
    reason = backends.missing_op(backend, "encoder")
    reason = reason or (_no_cpu_call(options, like) if backend == "cpu" else _no_cuda_call(like))
    return (backend, None) if reason is None else (None, reason)


def _no_cuda_call(like: Tensor) -> str | None:
    return "autocast" if torch.is_autocast_enabled(like.device.type) else None


def _no_cpu_call(options: Options, like: Tensor) -> str | None:
    if like.dtype != torch.float32 and (options.quantization is not None or not _bfloat16_call(like.dtype)):
        return f"hidden states are {like.dtype}"
    return "autocast" if torch.is_autocast_enabled("cpu") and not _autocast_call(options, like.dtype) else None


def _bfloat16_call(dtype: torch.dtype) -> bool:
    """Whether bfloat16 layers run as one call: faster than torch's products on tiles; elsewhere unmeasured."""
    return dtype == torch.bfloat16 and backends.cpu_isa() == "amx"


def _autocast_call(options: Options, dtype: torch.dtype) -> bool:
    """Whether layers run as one call under autocast: float32 ones where bfloat16 products of float32 rows are faster
    than torch's. Hidden states are float32 then, as in the original, whose last step in each half is a LayerNorm."""
    return (
        torch.get_autocast_dtype("cpu") == torch.bfloat16
        and dtype == torch.float32
        and options.quantization is None
        and backends.cpu_isa() == "amx"
    )


def no_layer_call(layer: Any, choice: LayerChoice, like: Tensor) -> str | None:
    """Why a layer cannot, whatever the call, or None. like: as op_backend's."""
    if any(module.training for module in layer.modules()):
        return _TRAINING
    attention, feed_forward = choice.attention, choice.feed_forward
    if choice.fused is not None:
        return choice.fused
    if attention.said or feed_forward.said:
        return "a product is not a plain nn.Linear (an adapter, a quantised weight)"
    first, second = attention_parts(layer), feed_forward_parts(layer)
    tensors = tensors_of(layer)
    if any(tensor is None for tensor in tensors):
        return "a product has no bias"
    if not all(_plain(tensor, like) for tensor in tensors):
        return "not all of its parameters are plain, contiguous tensors of the hidden states' dtype and device"
    if not _fit(tensors):
        return "its weights do not fit one another"
    if not supported_head_dim(first.core.head_dim):
        return f"head_dim {first.core.head_dim}"
    if feed_forward.gelu is None:
        return f"activation {type(second.activation).__name__}"
    if first.output.norm.eps != second.output.norm.eps:
        return "its LayerNorms differ in eps"
    return "a feed-forward in chunks" if second.chunk != 0 else None


def tensors_of(layer: Any) -> LayerTensors:
    first, second = attention_parts(layer), feed_forward_parts(layer)
    modules = (
        *(first.core.query, first.core.key, first.core.value, first.output.dense, first.output.norm),
        *(second.inner, second.output.dense, second.output.norm),
    )
    return LayerTensors(*(tensor for module in modules for tensor in (module.weight, module.bias)))


def _plain(tensor: Any, like: Tensor) -> bool:
    return (
        type(tensor) is nn.Parameter
        and tensor.device == like.device
        and tensor.dtype == like.dtype
        and tensor.is_contiguous()
        and not tensor.is_inference()  # whose edits are not counted
    )


def _fit(tensors: LayerTensors) -> bool:
    """Whether each product takes what is given to it: the op would refuse in words of its own, not the original's."""
    hidden, inner, wide = (len(w) for w in (tensors.attention_weight, tensors.query_weight, tensors.inner_weight))
    shapes = (
        *(((inner, hidden), (inner,)) * 3),
        *((hidden, inner), (hidden,), (hidden,), (hidden,)),
        *((wide, hidden), (wide,)),
        *((hidden, wide), (hidden,), (hidden,), (hidden,)),
    )
    return all(tensor.shape == shape for tensor, shape in zip(tensors, shapes, strict=True))


def _settings(layer: Any, choice: LayerChoice) -> LayerSettings:
    core = attention_parts(layer).core
    return LayerSettings(
        heads=core.query.weight.shape[0] // core.head_dim,
        scale=float(core.scale),
        eps=feed_forward_parts(layer).output.norm.eps,
        tanh=choice.feed_forward.gelu == "tanh",
    )


def encoder_call(
    layers: Sequence[Any], choices: Sequence[LayerChoice], options: Options, backend: str
) -> EncoderCall | QuantizedCall | None:
    """One call through layers that each could be one, or None where they differ in what the op takes of them. backend:
    whose op it is."""
    settings = {_settings(layer, choice) for layer, choice in zip(layers, choices, strict=True)}
    if len(settings) != 1 or len({attention_parts(layer).core.head_dim for layer in layers}) != 1:
        return None
    if options.quantization is None:
        return EncoderCall([tensors_of(layer) for layer in layers], settings.pop(), backend)
    places = []
    for layer in layers:
        memory = memory_of(layer)
        if memory.quantized is None:
            memory.quantized = LayerCopies()
        places.append((memory.quantized, tensors_of(layer)))

    def not_used() -> None:
        for layer in layers:
            state_of(layer).fell_back(layer, f"float32 weights: {_UNSETTLED}", NOT_QUANTISED)

    return QuantizedCall(places, settings.pop(), options.quantization, options.offloads, not_used)
