"""Memory layouts of a quantized matrix, to and from the plain one: codes (..., R, Kp/2) and scales (..., R, Kp/block).

swizzled: codes plain; scales flat, (..., 512 ceil(R/128) ceil(C/4)), see `swizzle_ref`.
tiled: codes (..., T, C, 1024) and scales (..., T, C, 128) of T tiles of 16 rows and C chunks of 128 columns, zero-padded. Byte
512 h + 64 g + 16 t + i of a tile's codes is byte 16 t + i of the chunk in row 8 h + g, but that bits are permuted within every 8 bytes, see
`permute_words`; byte 16 g + 4 t + 2 h + i of its scales is byte 2 t + i. NVFP4 only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4compile.codegen.formats import BLOCK_OF_SCALES, Layout, round_up
from fp4compile.codegen.reference.swizzle import swizzle_ref, unswizzle_ref
from fp4compile.codegen.reference.tiled_words import permute_words, restore_words


def laid_out_shapes(rows: int, code_bytes: int, blocks: int, layout: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the codes and scales of one matrix whose plain shapes are (rows, code_bytes) and (rows, blocks)."""
    if layout == Layout.SWIZZLED:
        return (rows, code_bytes), (round_up(rows, 128) * round_up(blocks, 4),)
    if layout == Layout.TILED:
        tiles, chunks = round_up(rows, 16) // 16, round_up(code_bytes, 64) // 64
        return (tiles, chunks, 1024), (tiles, chunks, 128)
    return (rows, code_bytes), (rows, blocks)


def suits_tiles(rows: int, k: int) -> bool:
    """Whether a weight (`rows`, `k`) is worth tiling: it fills its tiles of rows, and padding costs at most an eighth of its memory."""
    return rows % 16 == 0 and 8 * round_up(k, 128) <= 9 * k


def rows_of(codes: Tensor, layout: str) -> int:
    """Rows of a matrix by its codes; a tiled one counts whole tiles, so only multiples of 16 rows are tiled in a graph."""
    return 16 * codes.shape[-3] if layout == Layout.TILED else codes.shape[-2]


def lay_out_ref(codes: Tensor, scales: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Plain codes uint8 and scales (float8_e4m3fn or float8_e8m0fnu) in `layout`."""
    if layout == Layout.SWIZZLED:
        return codes, _each_matrix(scales, swizzle_ref)
    return _tile(codes, scales) if layout == Layout.TILED else (codes, scales)


def plain_ref(codes: Tensor, scales: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """The inverse, but for the padding of a tiled matrix: whole tiles of 16 rows and chunks of 128 columns remain."""
    if layout == Layout.SWIZZLED:
        columns = 2 * codes.shape[-1] // BLOCK_OF_SCALES[scales.dtype]
        return codes, _each_matrix(scales[..., None, :], lambda flat: unswizzle_ref(flat[0], codes.shape[-2], columns))
    return _untile(codes, scales) if layout == Layout.TILED else (codes, scales)


def _each_matrix(scales: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    if scales.ndim == 2:
        return change(scales)
    changed = [change(each) for each in scales.flatten(0, -3)]
    return torch.stack(changed).unflatten(0, scales.shape[:-2])


def _tile(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    (*batch, rows, half_k), bytes_ = codes.shape, scales.view(torch.uint8)
    more_rows, chunks = round_up(rows, 16) - rows, round_up(half_k, 64) // 64
    codes = F.pad(codes, (0, 64 * chunks - half_k, 0, more_rows))
    bytes_ = F.pad(bytes_, (0, 8 * chunks - bytes_.shape[-1], 0, more_rows))
    codes = codes.view(-1, 2, 8, chunks, 64).permute(0, 3, 1, 2, 4).reshape(*batch, -1, chunks, 1024)
    codes = permute_words(codes)
    bytes_ = bytes_.view(-1, 2, 8, chunks, 4, 2).permute(0, 3, 2, 4, 1, 5).reshape(*batch, -1, chunks, 128)
    return codes, bytes_.view(scales.dtype)


def _untile(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    *batch, tiles, chunks, _ = codes.shape
    plain = restore_words(codes).reshape(-1, chunks, 2, 8, 64).permute(0, 2, 3, 1, 4).reshape(*batch, 16 * tiles, 64 * chunks)
    bytes_ = scales.view(torch.uint8).reshape(-1, chunks, 8, 4, 2, 2).permute(0, 4, 2, 1, 3, 5)
    return plain, bytes_.reshape(*batch, 16 * tiles, 8 * chunks).view(scales.dtype)
