"""Makes Triton's interpreter compute bfloat16 as a GPU does.

Up to 3.9 it rounds float32 to bfloat16 half up without carrying into the exponent, and `tl.dot` multiplies the bit patterns (triton
issue 11584). The kernels are right on hardware; only this stand-in for it needs correcting.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def teach_bfloat16() -> None:
    """Replace the two faulty functions of `triton.runtime.interpreter`, once a process."""
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert_float(data, source, target, rounding_mode):
        if source == tl.bfloat16 and target == tl.float32:
            return (data.view(np.uint16).astype(np.uint32) << 16).view(np.uint32)
        if source == tl.float32 and target == tl.bfloat16:
            return _round_to_bfloat16(np.ascontiguousarray(data))
        return convert(data, source, target, rounding_mode)

    def create_dot(self, a, b, d, *options):
        return dot(self, _widened(a), _widened(b), d, *options)

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot


def _round_to_bfloat16(data: np.ndarray) -> np.ndarray:
    bits = data.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(data.view(np.float32)), np.uint16(0x7FC0), rounded)


def _widened(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
