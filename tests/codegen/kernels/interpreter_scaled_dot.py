"""Makes Triton's interpreter read e4m3 scales of `tl.dot_scaled`: 3.9 takes their bits for an exponent, as if they were e8m0."""

from __future__ import annotations

import numpy as np
import torch
from triton.runtime import interpreter


def teach_e4m3_scales() -> None:
    """Replace the faulty function of `triton.runtime.interpreter`, once a process. Before 3.9 there is no scaled dot to teach."""
    original = getattr(interpreter, "_dot_scaled_scale_to_f32", None)
    if original is None:
        return

    def scale_to_float32(scale_handle, compute_type):
        if scale_handle.dtype.is_int():
            return original(scale_handle, compute_type)
        return torch.from_numpy(np.ascontiguousarray(scale_handle.data).view(np.uint8)).view(torch.float8_e4m3fn).float().numpy()

    interpreter._dot_scaled_scale_to_f32 = scale_to_float32
