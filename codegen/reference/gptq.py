"""GPTQ (arXiv 2210.17323) for block-scaled formats: columns are rounded one after another, each error is handed on to those that follow.

What is minimised is the error of the layer's output, the sum over rows of (w - q) H (w - q)^T with H = X^T X / n of the layer's input.
Scales, and kinds of blocks where the format has several, are those that the config's own rule gives the weight as it was: they stay while
codes are chosen, as MixFP4 and MR-GPTQ (arXiv 2509.23202) do it. So any order of columns is possible, and the result is an ordinary tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4compile.codegen.errors import Fp4CompileError
from fp4compile.codegen.formats import QuantConfig, Rounding, round_up
from fp4compile.codegen.reference.block import quantize_ref
from fp4compile.codegen.reference.block_kinds import E2M1, FLAG, IF4_INTEGER, INTEGER, Kind, magnitude_of
from fp4compile.codegen.reference.block_scales import multiplier_of
from fp4compile.codegen.reference.e2m1 import pack_ref
from fp4compile.codegen.reference.hadamard import hadamard_ref

_COLUMNS_AT_ONCE: Final = 64  # errors reach columns further on as one matrix product


class UnusableMoments(Fp4CompileError, ValueError):
    template = "{where}: the second moments {found}; {needed}. Calibrate again with inputs of this layer, finite and not all zero."


def gptq_ref(
    weight: Tensor,
    moments: Tensor,
    config: QuantConfig,
    *,
    damping: float = 0.01,
    by_activation: bool = True,
    quantized: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and global scale, as `quantize_ref` gives them, of `weight` (N, K) whose input has second `moments` (K, K).

    damping: share of the mean of the diagonal added to it. by_activation: columns with large inputs go first, while most others can still
    make up for their error; else in their own order. quantized: the weight as another rule quantized it, whose scales are kept, such as
    `local_hessian_ref`'s. Raises `UnusableMoments`.
    """
    assert weight.ndim == 2 and config.rounding is Rounding.NEAREST
    k = round_up(weight.shape[1], config.k_multiple)
    values = rotated(weight, k, config)
    h = rotated_moments(usable(moments, (weight.shape[1], weight.shape[1]), "gptq"), k, config).double()
    _, scales, decode = quantized or quantize_ref(weight, config)
    grid = _Grid.of(scales, decode, config)
    order = h.diagonal().argsort(descending=True, stable=True) if by_activation else torch.arange(k, device=h.device)
    pull = _error_propagation(h[order][:, order], damping).float()
    found = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    remaining = values[:, order]
    for first in range(0, k, _COLUMNS_AT_ONCE):
        columns = slice(first, min(first + _COLUMNS_AT_ONCE, k))
        columns_grid = grid.of_columns(order[columns], config.fmt.block)
        errors, found[:, order[columns]] = _round_columns(remaining[:, columns], pull[columns, columns], columns_grid)
        remaining[:, columns.stop :] -= errors @ pull[columns, columns.stop :]
    return pack_ref(found), scales, decode


def usable(moments: Tensor, shape: tuple[int, ...], where: str) -> Tensor:
    """`moments`, a matrix or several, as float32. Raises `UnusableMoments`."""
    if moments.shape != shape:
        raise UnusableMoments(where=where, found=f"have shape {tuple(moments.shape)}", needed=f"{shape} is needed")
    if not bool(torch.isfinite(moments).all()) or not bool((moments.diagonal(dim1=-2, dim2=-1) > 0).any()):
        raise UnusableMoments(where=where, found="hold NaN, Inf, or nothing but zeros", needed="E[x x^T] of the layer's input is needed")
    return moments.float()


def rotated_moments(moments: Tensor, k: int, config: QuantConfig) -> Tensor:
    """(k, k): padded with zeros and, where the config rotates, those of the rotated input."""
    once = rotated(F.pad(moments, (0, 0, 0, k - moments.shape[0])), k, config)
    return rotated(once.mT.contiguous(), k, config)


def rotated(x: Tensor, k: int, config: QuantConfig) -> Tensor:
    """`x` (..., K) as float32, padded with zeros to `k` columns and rotated as `quantize_ref` does it."""
    x = F.pad(x, (0, k - x.shape[-1]))
    return (hadamard_ref(x, config.hadamard) if config.hadamard else x).float()


def _error_propagation(h: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of damped `h` (K, K) float64, rows divided by their diagonal. Unused inputs count as one."""
    diagonal = h.diagonal()
    dead = diagonal <= 0
    added = damping * diagonal[~dead].mean() + torch.where(dead, 1.0, 0.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h + torch.diag(added)))
    upper = torch.linalg.cholesky(inverse, upper=True)
    return upper / upper.diagonal()[:, None]


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """How the elements of each column are rounded: what they are multiplied by, what undoes it, (N, columns); kinds of their blocks."""

    multiplier: Tensor
    unit: Tensor
    flagged: Tensor
    kinds: tuple[Kind, ...]

    @classmethod
    def of(cls, scales: Tensor, decode: Tensor, config: QuantConfig) -> _Grid:
        """One column a block."""
        fmt = config.fmt
        decode = (decode if decode.ndim else decode.expand(scales.shape[0]))[:, None] * fmt.values[2]
        bytes_ = scales.view(torch.uint8)
        flagged = (bytes_ >= FLAG) if fmt.flagged_values else torch.zeros_like(bytes_, dtype=torch.bool)
        scale = magnitude_of(bytes_) if fmt.has_global_scale else scales.float()
        kinds = (E2M1, IF4_INTEGER if config.format == "if4" else INTEGER) if fmt.flagged_values else (E2M1,)
        return cls(multiplier=multiplier_of(scale, decode), unit=scale * decode, flagged=flagged, kinds=kinds)

    def of_columns(self, columns: Tensor, block: int) -> _Grid:
        """One column an element, those of `columns` (int64)."""
        at = columns // block
        return _Grid(multiplier=self.multiplier[:, at], unit=self.unit[:, at], flagged=self.flagged[:, at], kinds=self.kinds)

    def rounded(self, y: Tensor, column: int) -> Tensor:
        """The values nearest to `y` (N,), in units of the blocks of `column`."""
        floats = self.kinds[0].rounded(y)
        return floats if len(self.kinds) == 1 else torch.where(self.flagged[:, column], self.kinds[1].rounded(y), floats)

    def codes(self, y: Tensor) -> Tensor:
        floats = self.kinds[0].codes(y)
        return floats if len(self.kinds) == 1 else torch.where(self.flagged, self.kinds[1].codes(y), floats)


def _round_columns(w: Tensor, pull: Tensor, grid: _Grid) -> tuple[Tensor, Tensor]:
    """Errors and codes of the columns `w` (N, c), each rounded after the errors before it have changed it."""
    rest = w.mT.contiguous()  # (c, N): a column lies in one piece
    y, errors = torch.empty_like(rest), torch.empty_like(rest)
    multiplier, unit = grid.multiplier.mT.contiguous(), grid.unit.mT.contiguous()
    for column in range(len(rest)):
        torch.mul(rest[column], multiplier[column], out=y[column])
        error = rest[column] - grid.rounded(y[column], column) * unit[column]
        errors[column] = torch.where(torch.isfinite(error), error, 0.0)  # a block that is not finite stays so, and spoils no other
        rest[column + 1 :].addr_(pull[column, column + 1 :], errors[column], alpha=-1)
    return errors.mT, grid.codes(y.mT)
