"""The fused ops as differentiable functions."""

from __future__ import annotations

from roberta_kernels.ops.add_layer_norm import add_layer_norm
from roberta_kernels.ops.attention import attention
from roberta_kernels.ops.embedding_layer_norm import embedding_layer_norm
from roberta_kernels.ops.gelu_ffn import gelu_ffn
from roberta_kernels.ops.linear_cross_entropy import linear_cross_entropy
from roberta_kernels.ops.linear_log1p_max import linear_log1p_max
from roberta_kernels.ops.seeds import draw_seeds

__all__ = [
    "add_layer_norm",
    "attention",
    "draw_seeds",
    "embedding_layer_norm",
    "gelu_ffn",
    "linear_cross_entropy",
    "linear_log1p_max",
]
