"""The 128x4 blocked scale layout that cuBLAS, CUTLASS and `tcgen05` read (torch: SWIZZLE_32_4_4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4compile.codegen.formats import round_up


def swizzle_ref(scales: Tensor) -> Tensor:
    """(R, C) block scales to the flat blocked layout, rows padded to 128 and columns to 4 with zero bytes.

    Scale (r, c) lands at ((r div 128) ceil(C/4) + c div 4) 512 + (r mod 32) 16 + ((r mod 128) div 32) 4 + c mod 4.
    """
    rows, cols = scales.shape
    # Byte view: F.pad has no float8 kernel.
    padded = F.pad(scales.view(torch.uint8), (0, round_up(cols, 4) - cols, 0, round_up(rows, 128) - rows))
    blocks = padded.view(padded.shape[0] // 128, 4, 32, padded.shape[1] // 4, 4).permute(0, 3, 2, 1, 4)
    return blocks.reshape(-1).view(scales.dtype)


def unswizzle_ref(flat: Tensor, rows: int, cols: int) -> Tensor:
    """The inverse: (R, C) scales without their padding."""
    padded_rows, padded_cols = round_up(rows, 128), round_up(cols, 4)
    blocks = flat.view(torch.uint8).view(padded_rows // 128, padded_cols // 4, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return blocks.reshape(padded_rows, padded_cols)[:rows, :cols].contiguous().view(flat.dtype)
