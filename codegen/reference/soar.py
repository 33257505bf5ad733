"""SOAR (arXiv 2605.12245): the scales of a weight in closed form, global and block scales in turns, and the decoupled search of scales.

With codes Q and block scales d held, the best global scale is sum(W Q d) / sum(Q^2 d^2); with it held, the best scale of a block is
sum(W Q) / (a sum(Q^2)), which is rounded to e4m3 before the codes are chosen anew. What a plain sweep lacks is the free global scale.

The decoupled search chooses codes by b times the scale that it stores, for b from 0.5 to 1.5. Under squared error b = 1 gives every element
its nearest value, so no other b can win, and the search is that of the two stored neighbours of the closed form (a test tries all b).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from fp4compile.codegen.formats import GlobalScale, QuantConfig, ScaleRule
from fp4compile.codegen.reference.block_kinds import E2M1, magnitude_of
from fp4compile.codegen.reference.block_scales import ONE_SIXTH, by_matrix, e4m3_bytes, encode_scale_of, multiplier_of, stored_scales
from fp4compile.codegen.reference.scale_search import LARGEST_BYTE, pieces, quantize_by_search_ref, sum_of_squares, sum_over_elements

ROUNDS: Final = 15


@dataclass(frozen=True, kw_only=True)
class _Scales:
    """Scale bytes (..., R, B), the global scale as a multiple of where it started (float64, (..., R or 1, 1)), and their loss."""

    bytes_: Tensor
    ratio: Tensor
    loss: Tensor

    def or_better(self, other: _Scales) -> _Scales:
        better = other.loss < self.loss
        return _Scales(
            bytes_=torch.where(better, other.bytes_, self.bytes_),
            ratio=torch.where(better, other.ratio, self.ratio),
            loss=torch.where(better, other.loss, self.loss),
        )


def quantize_soar_ref(x: Tensor, config: QuantConfig, *, rounds: int = ROUNDS, ratios: tuple[float, ...] = (1.0,)) -> tuple[Tensor, ...]:
    """Codes (uint8, one an element), scales and global scale of float32 `x` (..., R, Kp), Kp a multiple of 16.

    Runs all `rounds` and keeps the best, so that nothing waits for a device. `ratios` are those of the decoupled search.
    """
    if not x.numel():
        return quantize_by_search_ref(x, config)  # empty as well
    weight = _Weight.of(x, config)
    scales = weight.start()
    p, n = weight.sums(scales)
    best = scales = weight.judged(scales, p, n)
    for _ in range(rounds):
        scales = weight.closed_form(scales, p, n)
        p, n = weight.sums(scales)
        scales = weight.judged(scales, p, n)
        best = best.or_better(scales)
    if config.scale_rule is ScaleRule.SOAR_DECOUPLED:
        p, n = weight.sums(best)
        best = weight.better_neighbours(best, p, n, ratios)
    decode = weight.decode(best)
    stored = stored_scales(magnitude_of(best.bytes_), weight.finite, torch.float8_e4m3fn)
    return weight.codes(best), stored, decode.reshape(weight.encode_scale.shape)


@dataclass(frozen=True, kw_only=True)
class _Weight:
    """A weight with what every round needs. Sums are those of x S, so that no magnitude leaves float32's range."""

    x: Tensor  # (..., R, K)
    encode_scale: Tensor  # S, (...) or (..., R)
    finite: Tensor  # (..., R, B)
    energy: Tensor  # sum of squares of each block of x S
    dims: tuple[int, ...]  # what shares a global scale, of (..., R, B)

    @classmethod
    def of(cls, x: Tensor, config: QuantConfig) -> _Weight:
        encode_scale = encode_scale_of(torch.where(torch.isfinite(x), x.abs(), 0.0), config)
        finite = torch.isfinite(x.unflatten(-1, (-1, 16)).abs().amax(-1))
        dims = (-1,) if config.global_scale is GlobalScale.ROW else (-2, -1)
        weight = cls(x=x, encode_scale=encode_scale, finite=finite, energy=finite, dims=dims)
        (energy,) = weight.of_each_block(lambda piece: (sum_of_squares(piece.blocks * piece.encode),), weight.start())
        return replace(weight, energy=energy)

    def start(self) -> _Scales:
        """The scales of plain rounding."""
        s = by_matrix(self.encode_scale, self.x.ndim)
        block_max = self.x.unflatten(-1, (-1, 16)).abs().amax(-1)
        ratio = torch.ones_like(s, dtype=torch.float64)
        return _Scales(bytes_=e4m3_bytes(block_max * (s * ONE_SIXTH)), ratio=ratio, loss=ratio * torch.inf)

    def decode(self, scales: _Scales) -> Tensor:
        """The global scale (..., R or 1, 1), float32."""
        return (scales.ratio / by_matrix(self.encode_scale, self.x.ndim)).float()

    def of_each_block(self, compute: Callable[[_Piece], tuple[Tensor, ...]], scales: _Scales) -> tuple[Tensor, ...]:
        """What `compute` gives for each block, (..., R, B); 0 for blocks that are not finite."""
        parts = zip(*(compute(piece) for piece in self._pieces(scales)), strict=True)
        return tuple(torch.where(self.finite, torch.cat(part).view(self.finite.shape), 0.0) for part in parts)

    def _pieces(self, scales: _Scales) -> Iterator[_Piece]:
        shape = (*self.x.shape[:-1], 1)
        encode, decode = (t.expand(shape).reshape(-1, 1) for t in (by_matrix(self.encode_scale, self.x.ndim), self.decode(scales)))
        x, scale = self.x.flatten(0, -2), magnitude_of(scales.bytes_).flatten(0, -2)
        for rows in pieces(x):
            blocks = x[rows].unflatten(-1, (-1, 16)).movedim(-1, 0).contiguous()
            yield _Piece(blocks=blocks, encode=encode[rows], decode=decode[rows], scale=scale[rows])

    def sums(self, scales: _Scales) -> tuple[Tensor, ...]:
        """Sum of x S Q and of Q^2 over each block (..., R, B), Q the values of the nearest codes."""

        def products(piece: _Piece) -> tuple[Tensor, ...]:
            values = E2M1.nearest(piece.elements())
            return sum_over_elements(piece.blocks * piece.encode * values), sum_of_squares(values)

        return self.of_each_block(products, scales)

    def judged(self, scales: _Scales, p: Tensor, n: Tensor) -> _Scales:
        """With the loss of each global scale, from the sums under it."""
        scale = magnitude_of(scales.bytes_) * scales.ratio
        per_block = self.energy.double() - 2 * scale * p + scale * scale * n
        return _Scales(bytes_=scales.bytes_, ratio=scales.ratio, loss=per_block.sum(self.dims, keepdim=True))

    def closed_form(self, scales: _Scales, p: Tensor, n: Tensor) -> _Scales:
        d = magnitude_of(scales.bytes_).double()
        over, under = ((t.double()).sum(self.dims, keepdim=True) for t in (p * d, n * d * d))
        ratio = torch.where((over > 0) & (under > 0), over / under, scales.ratio)
        return _Scales(bytes_=self._projected(scales, ratio, p, n), ratio=ratio, loss=scales.loss)

    def _projected(self, scales: _Scales, ratio: Tensor, p: Tensor, n: Tensor) -> Tensor:
        usable = (n > 0) & (p > 0)
        wanted = (p / (ratio * torch.where(usable, n, 1.0))).float()
        return torch.where(usable, e4m3_bytes(wanted), scales.bytes_)

    def better_neighbours(self, scales: _Scales, p: Tensor, n: Tensor, ratios: tuple[float, ...]) -> _Scales:
        """Of the e4m3 neighbours of each block's closed form, and the scale it has, the one with the least loss."""
        nearest = self._projected(scales, scales.ratio, p, n)
        usable = (n > 0) & (p > 0)
        wanted = p / (scales.ratio * torch.where(usable, n, 1.0))
        step = torch.where(magnitude_of(nearest) <= wanted, 1, -1)
        other = torch.where(usable, (nearest.int() + step).clamp(0, LARGEST_BYTE), nearest.int()).to(torch.uint8)
        best, least = scales.bytes_, self._block_loss(scales, (1.0,))
        for bytes_ in (nearest, other):
            loss = self._block_loss(replace(scales, bytes_=bytes_), ratios)
            best, least = torch.where(loss < least, bytes_, best), torch.minimum(loss, least)
        return _Scales(bytes_=best, ratio=scales.ratio, loss=least.double().sum(self.dims, keepdim=True))

    def _block_loss(self, scales: _Scales, ratios: tuple[float, ...]) -> Tensor:
        """Of each block of x S: codes are chosen by a scale `ratios` times the stored one."""

        def loss(piece: _Piece) -> tuple[Tensor, ...]:
            y = piece.elements()
            of_each = [sum_of_squares(E2M1.nearest(y if b == 1.0 else y / y.new_full((), b)) - y) for b in ratios]
            unit = piece.scale * (piece.decode * piece.encode)
            lost = sum_of_squares(piece.blocks * piece.encode)
            return (torch.where(piece.scale == 0, lost, torch.stack(of_each).amin(0) * (unit * unit)),)

        return self.of_each_block(loss, scales)[0]

    def codes(self, scales: _Scales) -> Tensor:
        found = [E2M1.encode(piece.elements(least=0.0)).movedim(0, -1).flatten(-2) for piece in self._pieces(scales)]
        return torch.cat(found).view(self.x.shape)


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Some rows of a weight: blocks (16, r, B), the scales S and a of each row (r, 1), block scales (r, B)."""

    blocks: Tensor
    encode: Tensor
    decode: Tensor
    scale: Tensor

    def elements(self, least: float = 2.0**-9) -> Tensor:
        """In units of their scale. A scale of zero counts as the smallest, so that its block may have a scale again."""
        return self.blocks * multiplier_of(self.scale.clamp(min=least), self.decode)
