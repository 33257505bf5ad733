"""The kinds of blocks that NVFP4 and its relatives choose from: e2m1 elements, integers, and IF4's integers, which share e2m1's scale.

A flagged format (MixFP4, IF4, NVINT4) marks integer blocks by the sign bit of their scale byte; codes are sign and magnitude in all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fp4compile.codegen.formats import FORMATS, BlockFormat
from fp4compile.codegen.reference.e2m1 import encode_nearest_ref

INTEGER_MAX: Final = 7.0
FLAG: Final = 0x80
# NVINT4 and MixFP4 share a dtype and its meaning.
FORMAT_OF_SCALES: Final = {f.scale_dtype: f for f in FORMATS.values()}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """An element y, in units of its block's scale, stands for `unit` times the grid's value nearest to y / unit; ties to the even code."""

    name: str
    flagged: bool
    unit: float
    nearest: Callable[..., Tensor]  # float32 values to the grid's values; takes `out` and `scratch`, tensors to write to
    encode: Callable[[Tensor], Tensor]  # float32 values to codes (uint8)

    def rounded(self, y: Tensor, *, out: Tensor | None = None, scratch: Tensor | None = None) -> Tensor:
        if self.unit == 1.0:
            return self.nearest(y, out=out, scratch=scratch)
        return self.nearest(torch.mul(y, 1 / self.unit, out=scratch), out=out).mul_(self.unit)

    def codes(self, y: Tensor) -> Tensor:
        return self.encode(y if self.unit == 1.0 else y * (1 / self.unit))


def nearest_e2m1_ref(y: Tensor, *, out: Tensor | None = None, scratch: Tensor | None = None) -> Tensor:
    """The e2m1 value nearest to each `y` (float32): `encode_nearest_ref` without the codes, with the same ties.

    A search rounds every weight dozens of times: with the step from the exponent's bits, and no new memory, in a fraction of the time.
    """
    bits = None if scratch is None else scratch.view(torch.int32)
    power_of_two = torch.bitwise_and(y.view(torch.int32), 0x7F800000, out=bits).view(torch.float32)
    step = power_of_two.clamp_(1.0, 4.0).mul_(0.5)
    return torch.div(y, step, out=out).round_().mul_(step).clamp_(-6.0, 6.0)


def nearest_integer_ref(y: Tensor, *, out: Tensor | None = None, scratch: Tensor | None = None) -> Tensor:
    return torch.round(y, out=out).clamp_(-INTEGER_MAX, INTEGER_MAX)


def encode_integer_ref(y: Tensor) -> Tensor:
    """Codes (uint8) of `y`: sign in bit 3, magnitude 0 to 7, ties to even. NaN becomes +7, as e2m1's becomes +6."""
    nan = torch.isnan(y)
    magnitude = nearest_integer_ref(y.abs()).masked_fill(nan, INTEGER_MAX).to(torch.uint8)
    return magnitude | (torch.signbit(y) & ~nan).to(torch.uint8) << 3


E2M1: Final = Kind(name="e2m1", flagged=False, unit=1.0, nearest=nearest_e2m1_ref, encode=encode_nearest_ref)
INTEGER: Final = Kind(name="integer", flagged=True, unit=1.0, nearest=nearest_integer_ref, encode=encode_integer_ref)
IF4_INTEGER: Final = Kind(name="if4 integer", flagged=True, unit=6 / 7, nearest=nearest_integer_ref, encode=encode_integer_ref)


def decode_blocks_ref(codes: Tensor, scales: Tensor) -> Tensor:
    """(..., R, Kp) float32 of one code (uint8) an element and the scales (..., R, Kp/block) of any format, which their dtype names."""
    fmt = FORMAT_OF_SCALES[scales.dtype]
    each = codes.unflatten(-1, (-1, fmt.block))
    if not fmt.flagged_values:
        return (_table(fmt.values, codes)[each.int()] * scales.float()[..., None]).flatten(-2)
    bytes_ = scales.view(torch.uint8)
    chosen = each.int() + (bytes_ >> 7).int()[..., None] * 16
    table = torch.cat((_table(fmt.values, codes), _table(fmt.flagged_values, codes)))
    return (table[chosen] * magnitude_of(bytes_)[..., None]).flatten(-2)


def magnitude_of(scale_bytes: Tensor) -> Tensor:
    """float32 scales of flagged bytes (uint8), without the flag."""
    return (scale_bytes & 0x7F).view(torch.float8_e4m3fn).float()


def stored_global_scale(decode_scale: Tensor, fmt: BlockFormat) -> Tensor:
    """What multiplies decoded values. IF4 decodes them 7 times too large. A tensor below the bar: CUDA multiplies by 1/7 otherwise."""
    unit = fmt.values[2]  # of the code that stands for 1
    return decode_scale if unit == 1.0 else decode_scale / decode_scale.new_full((), unit)


def _table(magnitudes: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor([*magnitudes, *(-v for v in magnitudes)], dtype=torch.float32, device=like.device)
