"""GPTQ of many matrices at once: the arithmetic of `codegen/reference/gptq.py`, column by column, but for all blocks of a model together.

Thirty blocks one after another launch a million tiny kernels. On a GPU the columns of one chunk are one CUDA graph as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fp4compile.codegen.formats import FORMATS, QuantConfig
from fp4compile.codegen.reference.block_kinds import E2M1, FLAG, IF4_INTEGER, INTEGER, magnitude_of
from fp4compile.codegen.reference.block_scales import multiplier_of

_COLUMNS: Final = 64
_DAMPING: Final = 0.01
_Chunk = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How elements are rounded: (L, N, K) what they are multiplied by, what undoes it, whether their block holds integers."""

    multiplier: Tensor
    unit: Tensor
    flagged: Tensor

    @classmethod
    def of(cls, scales: Tensor, decode: Tensor, config: QuantConfig) -> Grid:
        """`scales` (L, N, B) as quantizing gives them, `decode` (L, N)."""
        decode = decode[..., None] * config.fmt.values[2]
        bytes_ = scales.view(torch.uint8)
        scale = magnitude_of(bytes_)
        each = [multiplier_of(scale, decode), scale * decode, bytes_ >= FLAG]
        multiplier, unit, flagged = (x.repeat_interleave(config.fmt.block, -1) for x in each)
        return cls(multiplier=multiplier, unit=unit, flagged=flagged)

    def in_order(self, order: Tensor) -> Grid:
        each = (self.multiplier, self.unit, self.flagged)
        multiplier, unit, flagged = (torch.take_along_dim(x, order[:, None], -1) for x in each)
        return Grid(multiplier=multiplier, unit=unit, flagged=flagged)

    def columns(self, at: slice) -> tuple[Tensor, ...]:
        """Each (columns, L, N), so that a column lies in one piece."""
        return tuple(x[..., at].movedim(-1, 0).contiguous() for x in (self.multiplier, self.unit, self.flagged))


def gptq_together(weights: Tensor, moments: Tensor, scales: Tensor, decode: Tensor, config: QuantConfig) -> Tensor:
    """Values of `weights` (L, N, K), K whole blocks, under given scales; `moments` (L, K, K) of each one's inputs."""
    order = moments.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    h = torch.take_along_dim(torch.take_along_dim(moments.double(), order[..., None], -2), order[:, None], -1)
    pull = _error_propagation(h).float()
    rest, grid = torch.take_along_dim(weights, order[:, None], -1), Grid.of(scales, decode, config).in_order(order)
    values = torch.empty_like(rest)
    round_columns = _rounder(config.format, graphed=weights.is_cuda and len(weights) == 1)
    k = weights.shape[-1]
    for first in range(0, k, _COLUMNS):
        columns = slice(first, min(first + _COLUMNS, k))
        own = rest[..., columns].movedim(-1, 0).contiguous()
        errors, found = round_columns(own, pull[:, columns, columns].permute(1, 2, 0).contiguous(), *grid.columns(columns))
        values[..., columns] = found.movedim(0, -1)
        rest[..., columns.stop :] -= errors.movedim(0, -1) @ pull[:, columns, columns.stop :]
    return torch.take_along_dim(values, order.argsort(-1)[:, None], -1)


def _error_propagation(h: Tensor) -> Tensor:
    """Upper Cholesky factors of the inverses of damped `h`, rows divided by their diagonals."""
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    dead = diagonal <= 0
    added = _DAMPING * diagonal.sum(-1, keepdim=True) / (~dead).sum(-1, keepdim=True) + torch.where(dead, 1.0, 0.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h + torch.diag_embed(added)))
    upper = torch.linalg.cholesky(inverse, upper=True)
    return upper / upper.diagonal(dim1=-2, dim2=-1)[..., None]


@functools.cache
def _rounder(fmt: str, *, graphed: bool) -> Callable[..., _Chunk]:
    """For all calls, so that a graph is captured once a shape."""
    kinds = (E2M1, IF4_INTEGER if fmt == "if4" else INTEGER) if FORMATS[fmt].flagged_values else (E2M1,)

    def rounded(y: Tensor, flagged: Tensor) -> Tensor:
        floats = kinds[0].rounded(y)
        return floats if len(kinds) == 1 else torch.where(flagged, kinds[1].rounded(y), floats)

    return (_graphed if graphed else _plain)(rounded)


def _plain(rounded: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., _Chunk]:
    def round_columns(rest: Tensor, pull: Tensor, multiplier: Tensor, unit: Tensor, flagged: Tensor) -> _Chunk:
        """Errors and values (columns, L, N); `pull` (columns, columns, L)."""
        rest, errors, values = rest.clone(), torch.empty_like(rest), torch.empty_like(rest)
        for c in range(len(rest)):
            torch.mul(rounded(rest[c] * multiplier[c], flagged[c]), unit[c], out=values[c])
            torch.sub(rest[c], values[c], out=errors[c])
            rest[c + 1 :].addcmul_(pull[c, c + 1 :, :, None], errors[c], value=-1)
        return errors, values

    return round_columns


def _graphed(rounded: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., _Chunk]:
    """One capture for each shape; its inputs are copied in and its results out."""
    plain, graphs = _plain(rounded), dict[torch.Size, tuple[torch.cuda.CUDAGraph, list[Tensor], _Chunk]]()

    def round_columns(*inputs: Tensor) -> _Chunk:
        shape = inputs[0].shape
        if shape not in graphs:
            held = [x.clone() for x in inputs]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                plain(*held)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results = plain(*held)
            graphs[shape] = graph, held, results
        graph, held, results = graphs[shape]
        for into, x in zip(held, inputs, strict=True):
            into.copy_(x)
        graph.replay()
        return results[0].clone(), results[1].clone()

    return round_columns
