"""Sums over the rows of one activation value, batch after batch: all that is ever kept of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4compile.calibration.histogram import BINS, count_magnitudes
from fp4compile.calibration.record import LayerStatistics
from fp4compile.codegen.formats import round_up
from fp4compile.codegen.reference.hadamard import hadamard_ref

_ROWS_AT_ONCE: Final = 4096


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is collected beyond the usual: E[x x^T] as a whole, and the amax after rotations of these sizes."""

    moments: bool = False
    rotations: tuple[int, ...] = ()


@dataclass(kw_only=True)
class Sums:
    """Of the rows (tokens, K) of one value. Tensors lie where the value does."""

    tokens: int
    not_finite: Tensor  # int64: elements that are NaN or Inf
    channel_amax: Tensor  # float32 (K,)
    channel_squares: Tensor  # float64 (K,)
    block_products: Tensor  # float64 (ceil(K/16), 16, 16)
    histogram: Tensor  # int64 (BINS,)
    token_histogram: Tensor  # int64 (BINS,)
    rotated_amax: dict[int, Tensor] = field(default_factory=dict)  # float32 by size of the rotation
    products: Tensor | None = None  # float32 (K, K)

    @classmethod
    def empty(cls, k: int, wanted: Wanted, device: torch.device) -> Sums:
        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            tokens=0,
            not_finite=zeros(dtype=torch.int64),
            channel_amax=zeros(k, dtype=torch.float32),
            channel_squares=zeros(k, dtype=torch.float64),
            block_products=zeros(round_up(k, 16) // 16, 16, 16, dtype=torch.float64),
            histogram=zeros(BINS, dtype=torch.int64),
            token_histogram=zeros(BINS, dtype=torch.int64),
            rotated_amax={size: zeros(dtype=torch.float32) for size in wanted.rotations},
            products=zeros(k, k, dtype=torch.float32) if wanted.moments else None,
        )

    @property
    def k(self) -> int:
        return self.channel_amax.shape[0]

    def add(self, rows: Tensor) -> None:
        """`rows` (..., K) in any float dtype."""
        rows = rows.detach().reshape(-1, self.k)
        for piece in rows.split(_ROWS_AT_ONCE) if len(rows) else ():
            self._add(piece.float())

    def _add(self, x: Tensor) -> None:
        magnitude = x.abs()
        self.tokens += len(x)
        self.not_finite += (~torch.isfinite(x)).sum()
        self.channel_amax = torch.maximum(self.channel_amax, magnitude.amax(0))
        self.channel_squares += x.square().sum(0, dtype=torch.float64)
        blocks = F.pad(x, (0, -self.k % 16)).unflatten(-1, (-1, 16)).movedim(1, 0)  # (K/16, tokens, 16)
        self.block_products += blocks.mT @ blocks
        self.histogram += count_magnitudes(x)
        largest = magnitude.amax(-1, keepdim=True)
        self.token_histogram += count_magnitudes(torch.where(largest > 0, magnitude / largest, 0.0))
        for size, amax in self.rotated_amax.items():
            self.rotated_amax[size] = torch.maximum(amax, hadamard_ref(F.pad(x, (0, -self.k % size)), size).abs().amax())
        if self.products is not None:
            self.products.addmm_(x.mT, x)

    def statistics(self, sites: tuple[str, ...]) -> LayerStatistics:
        count = max(self.tokens, 1)
        return LayerStatistics(
            sites=sites,
            k=self.k,
            tokens=self.tokens,
            amax=self.channel_amax.amax().item(),
            channel_amax=self.channel_amax.cpu(),
            channel_mean_square=(self.channel_squares / count).float().cpu(),
            block_moments=(self.block_products / count).float().cpu(),
            histogram=self.histogram.cpu(),
            token_histogram=self.token_histogram.cpu(),
            rotated_amax={size: amax.item() for size, amax in self.rotated_amax.items()},
            moments=None if self.products is None else (self.products / count).cpu(),
        )

    def plain(self) -> dict[str, Any]:
        """For a file."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any], device: torch.device) -> Sums:
        """Copies: what a file is mapped to is not to be written to."""

        def copy(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: copy(inner) for key, inner in value.items()}
            return value.to(device, copy=True) if isinstance(value, Tensor) else value

        return cls(**{name: copy(value) for name, value in plain.items()})
