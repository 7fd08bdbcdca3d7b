"""Weights rounded to fewer bits, kept in the order in which the CPU kernels read them, and an encoder run from such
copies as one op call (docs/design.md, section 9). These are the only copies of weights that this package makes.

    copies.py          the copies of one layer
    quantized_call.py  one op call through some layers
    offloading.py      the originals, moved out of memory
"""

from roberta_kernels.quantized.copies import QUANTIZATIONS, LayerCopies, trim
from roberta_kernels.quantized.quantized_call import QuantizedCall

__all__ = ["QUANTIZATIONS", "LayerCopies", "QuantizedCall", "trim"]
