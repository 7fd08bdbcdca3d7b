"""The ops in plain torch: their definition, the oracle of the tests (in float64), and what serves when nothing else
can.

Internal arithmetic is float32 for float32, bfloat16 and float16 inputs and float64 for float64.
"""

from __future__ import annotations

from collections.abc import Callable

from roberta_kernels.reference.add_layer_norm import add_layer_norm_backward, add_layer_norm_forward
from roberta_kernels.reference.attention import attention_backward, attention_forward
from roberta_kernels.reference.embedding_layer_norm import embedding_layer_norm_backward, embedding_layer_norm_forward
from roberta_kernels.reference.gelu_ffn import gelu_ffn_backward, gelu_ffn_forward

KERNELS: dict[str, Callable] = {
    function.__name__: function
    for function in (
        add_layer_norm_backward,
        add_layer_norm_forward,
        attention_backward,
        attention_forward,
        embedding_layer_norm_backward,
        embedding_layer_norm_forward,
        gelu_ffn_backward,
        gelu_ffn_forward,
    )
}


def available() -> tuple[bool, str]:
    """(True, what serves): plain torch is always there."""
    return True, "plain torch"
