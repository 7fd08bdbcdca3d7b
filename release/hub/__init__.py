"""Fused, differentiable ops of RoBERTa-family encoders in Triton, over packed rows; and layers made of them."""

from . import layers
from .backends import available_backends, backend, set_backend
from .ops import (
    add_layer_norm,
    attention,
    draw_seeds,
    embedding_layer_norm,
    gelu_ffn,
    linear_cross_entropy,
)

__all__ = [
    "add_layer_norm",
    "attention",
    "available_backends",
    "backend",
    "draw_seeds",
    "embedding_layer_norm",
    "gelu_ffn",
    "layers",
    "linear_cross_entropy",
    "set_backend",
]
