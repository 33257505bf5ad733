"""How a matrix is cut up for the quantize kernels: which elements a lane reads, which units a program holds, how many programs run.

Plain arithmetic on shapes and strides, so that a plan is made once a shape.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final

import torch

from fp4compile.codegen.formats import round_up

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
        if self.across:
            even = not (self.rows % 2 or self.stride_k % 2 or self.stride_b % 2)
            return PAIRS if even and self.aligned and self.element_size == 2 else ELEMENTS
        quad = 16 // self.element_size
        whole = not (self.k % unit or self.stride_r % quad or self.stride_b % quad)
        return QUADS if whole and self.aligned and self.stride_k == 1 else ELEMENTS

    def strides(self, access: int) -> tuple[int, int, int]:
        """(batch, row, k) as the kernels count them: rows of quads in 16 bytes, k of pairs in words."""
        if access == QUADS:
            return self.stride_b, self.stride_r * self.element_size // 16, 1
        return self.stride_b, self.stride_r, self.stride_k // 2 if access == PAIRS else self.stride_k


@dataclass(frozen=True, kw_only=True)
class Tile:
    """`a` x `b` units of one program: rows x units, or units x rows where lanes run across."""

    a: int
    b: int
    warps: int


def tile_of(view: View, unit: int, rows: int, units: int, *, is_tile: bool, elements: int = 4096, warps: int = 4) -> Tile:
    """About `elements` of a matrix of `rows` x `units` units of `unit` elements: wide along memory, whole 16x16 blocks where `is_tile`."""
    lanes = max(elements // unit, 32)
    if view.across:
        a = min(max(128 // unit, 1), power_of_two(units))
        return Tile(a=a, b=min(max(lanes // a, 16), max(power_of_two(rows), 16)), warps=warps)
    b = _even_split(units, lanes // 16 if is_tile else lanes)
    return Tile(a=max(16 if is_tile else 1, min(lanes // b, power_of_two(rows))), b=b, warps=warps)


def _even_split(count: int, most: int) -> int:
    """The largest power of two up to `most` that covers `count` with at most a ninth of waste."""
    size = min(power_of_two(count), power_of_two(most))
    while size > 8 and round_up(count, size) * 8 > count * 9:
        size //= 2
    return size


def power_of_two(value: int) -> int:
    """The least one that is at least `value`."""
    return 1 << max(value - 1, 0).bit_length()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many this GPU has; on the CPU, where the interpreter runs kernels, few, so that programs take several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
