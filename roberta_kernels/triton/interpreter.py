"""Makes Triton's interpreter (TRITON_INTERPRET=1) compute what the hardware does. Compiled kernels never come here.

As of Triton 3.6 the interpreter keeps bfloat16 in numpy's uint16: `tl.dot` multiplies those bit patterns as
integers, and the cast from float32 cuts the low bits off instead of rounding to nearest even. And a loop bound, an
array of one element there, no longer converts to an int with numpy 2.4. `repair` replaces the three.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _widen(data: np.ndarray) -> np.ndarray:
    return (data.astype(np.uint32) << 16).view(np.float32)


def _narrow(data: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(data).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)


def repair() -> None:
    """Replaces the interpreter's bfloat16 casts, its products and its loop bounds; harmless when repeated."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "repaired", False):
        return
    original_cast, original_fp_to_fp, original_dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot

    def convert(source: Any, target: Any) -> Any:
        """The converted handle; None where the interpreter's own conversion is right."""
        types = (source.dtype.scalar, target.scalar)
        if types == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(_widen(source.data), tl.float32)
        if types == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(_narrow(source.data), tl.bfloat16)
        return None

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        converted = convert(source, target)
        return original_cast(self, source, target) if converted is None else converted

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        converted = convert(source, target)
        return original_fp_to_fp(self, source, target, rounding_mode) if converted is None else converted

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        def operand(handle: Any) -> Any:
            if handle.dtype.scalar == tl.bfloat16:
                return interpreter.TensorHandle(_widen(handle.data), tl.float32)
            return handle

        return original_dot(self, operand(a), operand(b), d, input_precision, max_num_imprecise_acc)

    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp
    builder.create_dot = create_dot
    builder.repaired = True

    original_patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        original_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor
