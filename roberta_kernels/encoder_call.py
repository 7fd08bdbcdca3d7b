"""One op call through some layers, on their parameters as they are (docs/design.md, section 9)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from roberta_kernels.ops import matmul_precision
from roberta_kernels.unpadding import Sequences


class LayerTensors(NamedTuple):
    """The parameters of a layer, in the order in which the op `encoder` takes them.

    Weights are `[N, K]` (K: input), everything else is `[N]`; H: hidden size, F: feed-forward size.
    """

    query_weight: Tensor  # [H, H], as the next two
    query_bias: Tensor
    key_weight: Tensor
    key_bias: Tensor
    value_weight: Tensor
    value_bias: Tensor
    attention_weight: Tensor  # [H, H]: attention.output.dense
    attention_bias: Tensor
    attention_norm_weight: Tensor
    attention_norm_bias: Tensor
    inner_weight: Tensor  # [F, H]: intermediate.dense
    inner_bias: Tensor
    output_weight: Tensor  # [H, F]: output.dense
    output_bias: Tensor
    output_norm_weight: Tensor
    output_norm_bias: Tensor

    def weights(self) -> tuple[Tensor, ...]:
        """Of the six products."""
        return (
            *(self.query_weight, self.key_weight, self.value_weight),
            *(self.attention_weight, self.inner_weight, self.output_weight),
        )


class LayerSettings(NamedTuple):
    """What the op takes of layers beside their tensors; layers that differ in it cannot share a call."""

    heads: int
    scale: float
    eps: float
    tanh: bool


class EncoderCall:
    """A call through layers. It holds the parameters themselves: what is done to their values needs no notice, and that
    they are the model's own is seen to by whoever keeps this (hf/watch.py).

    backend: whose op it is, "cpu" or "cuda".
    """

    def __init__(self, layers: Sequence[LayerTensors], settings: LayerSettings, backend: str = "cpu") -> None:
        self.layer_count = len(layers)
        self._settings = settings
        self._tensors = [tensor for layer in layers for tensor in layer]
        self._on_cpu = backend == "cpu"
        self._op = getattr(torch.ops, f"roberta_kernels_{backend}").encoder.default

    def run(self, hidden_states: Tensor, sequences: Sequences) -> Tensor:
        """`[..., H]` of the parameters' dtype -> `[..., H]`, through all layers. Under autocast products are of numbers
        rounded to bfloat16; what lies between them stays float32, where autocast would round it too."""
        args = (self._op, self._tensors, self._settings, hidden_states, sequences)
        if not self._on_cpu:
            return run_encoder(*args)
        if torch.is_autocast_enabled("cpu"):
            return matmul_precision.call_in_parts(1, run_encoder, *args)
        return matmul_precision.call(run_encoder, *args)


def run_encoder(
    op: Callable[..., Tensor],
    tensors: list[Tensor],
    settings: LayerSettings,
    hidden_states: Tensor,
    sequences: Sequences,
) -> Tensor:
    """Calls an op of the form of `encoder`."""
    rows = hidden_states.reshape(-1, hidden_states.shape[-1]).contiguous()
    out = op(
        rows,
        tensors,
        sequences.cu_seqlens,
        sequences.max_seqlen,
        sequences.key_mask,
        sequences.causal,
        settings.heads,
        settings.scale,
        settings.eps,
        settings.tanh,
        sequences.bias,
    )
    return out.view(hidden_states.shape)
