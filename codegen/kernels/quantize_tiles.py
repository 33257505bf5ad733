"""How a matrix is cut up for the quantize kernels: which elements a lane reads, which units a program holds, how many programs run.

Plain arithmetic on shapes and strides, so that a plan is made once a shape.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final

import torch

from fp4compile.codegen.formats import round_up
from fp4compile.codegen.target import processors_of

ELEMENTS: Final = 0
QUADS: Final = 1
PAIRS: Final = 2  # the numbers of `_tile_load.py`


@dataclass(frozen=True, kw_only=True)
class View:
    """A tensor seen as (batch, rows, k), k being the quantized axis: sizes, strides in elements, and how lanes read it."""

    batch: int
    rows: int
    k: int
    stride_b: int
    stride_r: int
    stride_k: int
    element_size: int
    aligned: bool  # at 16 bytes

    @classmethod
    def of(cls, shape: torch.Size, strides: tuple[int, ...], element_size: int, aligned: bool, axis: int) -> View:
        """Of a tensor with two or three dimensions."""
        row, k = (-2, -1) if axis == -1 else (-1, -2)
        batch = shape[0] if len(shape) == 3 else 1
        return cls(
            batch=batch, rows=shape[row], k=shape[k], stride_b=strides[0] if batch > 1 else 0, stride_r=strides[row], stride_k=strides[k],
            element_size=element_size, aligned=aligned,
        )  # fmt: skip

    @property
    def across(self) -> bool:
        """Whether memory runs along the rows, so that neighbouring lanes take neighbouring rows."""
        return self.stride_r == 1 and self.stride_k != 1 and self.rows > 1

    def access(self, unit: int) -> int:
        whole = self.aligned and not self.k % unit
        if self.across:
            even = not (self.rows % 2 or self.stride_k % 2 or self.stride_b % 2)
            return PAIRS if whole and even and self.element_size == 2 and unit <= 32 else ELEMENTS
        quad = 16 // self.element_size
        return QUADS if whole and self.stride_k == 1 and not (self.stride_r % quad or self.stride_b % quad) else ELEMENTS

    def strides(self, access: int) -> tuple[int, int, int]:
        """(batch, row, k) as the kernels take them: rows of QUADS in 16 bytes."""
        row = self.stride_r * self.element_size // 16 if access == QUADS else self.stride_r
        return self.stride_b, row, self.stride_k

    def constant_stride(self, access: int) -> int:
        """That of k for PAIRS, in words: it is the width of a layer, of which a model has few."""
        return self.stride_k // 2 if access == PAIRS else 1


@dataclass(frozen=True, kw_only=True)
class Tile:
    """`a` x `b` units of one program: rows x units, or units x rows where lanes run across."""

    a: int
    b: int
    warps: int
    programs: int = 8  # that one multiprocessor starts with; each takes tile after tile


def tile_of(
    view: View, unit: int, rows: int, units: int, *, is_tile: bool, elements: int = 4096, warps: int | None = None
) -> Tile:  # fmt: skip
    """About `elements` of a matrix of `rows` x `units` units of `unit` elements: wide along memory, whole 16x16 blocks where `is_tile`.

    A block a lane, two where lanes take pairs of rows: more would take registers from other warps, and loads are what must overlap.
    The sizes are those of a sweep over 8192x8192 (H100 80GB HBM3, Triton 3.6, 2026-11-22).
    """
    warps = warps or (4 if unit >= 64 or view.across else 8)
    if view.across:
        b = max(16, 64 if unit <= 32 else 128)
        lanes = 64 * warps if view.access(unit) == PAIRS else 32 * warps
        a = max(1, max(elements, lanes * unit) // (b * unit))
        return Tile(a=min(a, power_of_two(units)), b=b, warps=warps)
    lanes = max(elements // unit, 32 * warps)
    b = _even_split(units, lanes // 16 if is_tile else lanes)
    a = max(16 if is_tile else 1, min(lanes // b, power_of_two(rows)))
    return Tile(a=a, b=b, warps=warps, programs=8 if warps == 8 else 16)


def tile_of_rows(view: View, unit: int, rows: int, units: int) -> Tile:
    """Whole rows where four warps hold them in registers, else steps that a program takes along them."""
    whole = power_of_two(units)
    if whole * 4 <= units * 5 and whole * unit <= 8192:
        return Tile(a=min(max(4096 // (whole * unit), 1), power_of_two(rows)), b=whole, warps=4)
    return tile_of(view, unit, rows, units, is_tile=False, elements=2048, warps=4)


def _even_split(count: int, most: int) -> int:
    """The largest power of two up to `most` that covers `count` with at most a ninth of waste."""
    size = min(power_of_two(count), power_of_two(most))
    while size > 8 and round_up(count, size) * 8 > count * 9:
        size //= 2
    return size


def power_of_two(value: int) -> int:
    """The least one that is at least `value`."""
    return 1 << max(value - 1, 0).bit_length()


def steps(a_tiles: int, b_tiles: int, batch: int, programs: int) -> int:
    """How many programs share a column of tiles, `programs` being about what runs at a time."""
    return max(1, min(a_tiles, programs // (b_tiles * batch)))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many this GPU has; on the CPU, where the interpreter runs kernels, few, so that programs take several tiles."""
    return processors_of(device) if device.type == "cuda" else 2
