"""Weights put in the order in which the CPU kernels read them, ahead of time, and an encoder run from them as one op
call (docs/design.md, section 9).

    copies.py        the prepacked copies of one layer
    encoder_call.py  one op call through some layers
    offloading.py    the originals, moved out of memory
"""

from roberta_kernels.prepacked.copies import KINDS, QUANTIZATIONS, LayerCopies, LayerTensors, trim, unavailable
from roberta_kernels.prepacked.encoder_call import EncoderCall, LayerSettings

__all__ = [
    "KINDS",
    "QUANTIZATIONS",
    "EncoderCall",
    "LayerCopies",
    "LayerSettings",
    "LayerTensors",
    "trim",
    "unavailable",
]
