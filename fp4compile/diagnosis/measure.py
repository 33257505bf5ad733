"""What quantization does to one operand of one matmul, as sums that add up over calls, and the numbers they stand for."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4compile.codegen import ops
from fp4compile.codegen.formats import QuantConfig, Signs, Source, round_up
from fp4compile.codegen.reference.block import dequantize_ref

Packed = tuple[Tensor, Tensor, Tensor]  # codes, scales, global scale
_ONE_ROUNDING = 2.0**-20  # a maximum that its scale represents exactly is not clipped, though 6 s g may round below it
_LARGEST_CODES = 0x77  # two codes of the largest magnitude, whatever the format


@dataclass(frozen=True, kw_only=True)
class OperandSums:
    """Sums over the elements and blocks of an operand; two calls of one graph add. Elements that are not finite count nowhere else."""

    calls: int
    elements: float
    not_finite: float
    nonzero: float
    underflowed: float  # nonzero elements that became zero
    saturated: float  # elements beyond the largest value of their block
    blocks: float  # with a nonzero element
    clipped: float  # blocks whose largest element is beyond their largest value
    clipped_away: float  # relative loss of the largest element, summed over such blocks
    flushed: float  # blocks that became zero altogether
    signal: float  # sum of squares
    noise: float  # sum of squared errors of the first draw
    magnitude: float  # sum of magnitudes
    drift: float  # sum of errors, mean over draws
    gain: float  # scalar product of errors and elements, mean over draws
    gain_square: float  # its sample variance over the draws, of their mean
    amax: float

    def __add__(self, other: OperandSums) -> OperandSums:
        total = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return OperandSums(**{**total, "amax": max(self.amax, other.amax)})

    @property
    def underflow(self) -> float:
        """Share of the nonzero elements that become zero."""
        return self.underflowed / max(self.nonzero, 1)

    @property
    def saturation(self) -> float:
        """Share of the elements that are clipped to their block's largest value."""
        return self.saturated / max(self.elements, 1)

    @property
    def clipped_maxima(self) -> float:
        """Share of the blocks whose maximum is clipped: their scale was rounded down."""
        return self.clipped / max(self.blocks, 1)

    @property
    def clipped_by(self) -> float:
        """Mean relative loss of such a maximum."""
        return self.clipped_away / max(self.clipped, 1)

    @property
    def flushed_blocks(self) -> float:
        """Share of the blocks whose scale is so small against the tensor's that all elements become zero."""
        return self.flushed / max(self.blocks, 1)

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise of one draw, in decibels."""
        return decibels(self.signal, self.noise)

    @property
    def bias(self) -> float:
        """Mean over elements and draws of quantized minus source, in units of the mean magnitude."""
        return self.drift / self.magnitude if self.magnitude else 0.0

    @property
    def gain_bias(self) -> float:
        """<x, E q> / <x, x> - 1: how much of the operand's length is lost (negative) or added on average over draws."""
        return self.gain / self.signal if self.signal else 0.0

    @property
    def gain_error(self) -> float:
        """Standard error of `gain_bias` from the finite number of draws; 0 for nearest rounding."""
        return math.sqrt(max(self.gain_square, 0.0)) / self.signal if self.signal else 0.0


def decibels(signal: float, noise: float) -> float:
    if not signal:
        return math.nan
    return 10 * math.log10(signal / noise) if noise else math.inf


def measure(x: Tensor, config: QuantConfig, *, axis: int, draws: int, signs: Tensor | None = None) -> tuple[Packed, OperandSums]:
    """Quantize `x` (..., R, C) along `axis` as a compiled graph would, and sum up what that did.

    The rotation, where `config` has one, comes first: the numbers are about the rotated values, which are those that are rounded. `signs`,
    one for each element along `axis`, multiply before it. Stochastic rounding is drawn `draws` times, from torch's generator; the codes of
    the first draw are returned.
    """
    source, rest = rotated(x, config, axis, signs)
    stochastic = config.draws
    seeds = torch.randint(2**62, (max(draws, 1),), device=x.device).unbind() if stochastic else (None,)
    packed = _calibrated(x, config, axis) if config.needs_moments else ops.QUANTIZE(source, -1, *ops.quantize_args(rest), seeds[0])
    first = _values(packed, source)
    further = [_values(ops.QUANTIZE(source, -1, *ops.quantize_args(rest), seed), source) for seed in seeds[1:]]
    return packed, _sums(source.float(), first, further, packed, rest)


def _calibrated(x: Tensor, config: QuantConfig, axis: int) -> Packed:
    """Statistics are of values that are not rotated yet: the operator rotates both."""
    return ops.QUANTIZE(x, axis, *ops.quantize_args(config), None, **ops.quantize_keywords(config))


def rotated(x: Tensor, config: QuantConfig, axis: int, signs: Tensor | None) -> tuple[Tensor, QuantConfig]:
    """What is rounded, contraction dimension last, and the config without its rotation.

    What is to come from the forward's codes is measured on the original values: what a second rounding does, not the sum of both.
    """
    x = x if axis == -1 else x.mT
    config = replace(config, source=Source.ORIGINAL)
    if not config.hadamard:
        return x, config
    if signs is not None:
        x = x * signs.to(x.dtype)
    return ops.HADAMARD(x, -1, config.hadamard), replace(config, hadamard=0, signs=Signs.FIXED)


def _values(packed: Packed, source: Tensor) -> Tensor:
    return dequantize_ref(*packed)[..., : source.shape[-1]]


def _sums(x: Tensor, y: Tensor, further: list[Tensor], packed: Packed, config: QuantConfig) -> OperandSums:
    codes, scales, decode = packed
    limit = dequantize_ref(torch.full_like(codes, _LARGEST_CODES), scales, decode)[..., : x.shape[-1]]
    finite = x.isfinite() & y.isfinite()
    bad = (~finite).sum()
    x, y, limit = (torch.where(finite, t, 0.0) for t in (x, y, limit))
    limit = limit * (1 + _ONE_ROUNDING)
    beyond = x.abs() > limit
    drawn = [y, *(torch.where(finite, t, 0.0) for t in further)]
    gains = torch.stack([_total((t - x) * x) for t in drawn])
    drift = torch.stack([_total(t - x) for t in drawn]).mean()
    spread = gains.var() / len(drawn) if further else gains.new_zeros(())
    block_max, block_limit, block_left = (_by_block(t, config) for t in (x.abs(), limit, y.abs()))
    live, clipped = block_max > 0, block_max > block_limit
    away = torch.where(clipped, 1 - block_limit / block_max.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
    counts = (finite, x != 0, (x != 0) & (y == 0), beyond, live, clipped, live & (block_left == 0))
    elements, nonzero, underflowed, saturated, blocks, clipped_blocks, flushed = (c.sum().double() for c in counts)
    sums = (_total(away), _total(x * x), _total((y - x) ** 2), _total(x.abs()), drift, gains.mean(), spread)
    amax = x.abs().amax() if x.numel() else x.new_zeros(())
    row = torch.stack([elements, bad.double(), nonzero, underflowed, saturated, blocks, clipped_blocks, flushed, *sums, amax.double()])
    named = ("elements", "not_finite", "nonzero", "underflowed", "saturated", "blocks", "clipped", "flushed", "clipped_away",
             "signal", "noise", "magnitude", "drift", "gain", "gain_square", "amax")  # fmt: skip
    return OperandSums(calls=1, **dict(zip(named, row.tolist(), strict=True)))


def _total(x: Tensor) -> Tensor:
    return x.sum(dtype=torch.float64)


def _by_block(magnitude: Tensor, config: QuantConfig) -> Tensor:
    """The largest of each block, which for 16x16 scales is a whole tile."""
    block = config.fmt.block
    rows = 16 if config.is_tile else 1
    length, height = magnitude.shape[-1], magnitude.shape[-2]
    whole = F.pad(magnitude, (0, round_up(length, block) - length, 0, round_up(height, rows) - height))
    return whole.unflatten(-1, (-1, block)).unflatten(-3, (-1, rows)).amax((-1, -3))
