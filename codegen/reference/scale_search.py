"""Block scales by search: of the candidates of a block, scale and kind of its elements, the one with the least error.

A sweep tries the e4m3 scales up to 8 bytes from the usual one, half of it to twice. That is exhaustive in practice: twice a scale that
clips nothing has a coarser grid inside the finer one's, so nothing above it can win; at half of it the largest element alone, clipped
to half, costs more than rounding costs a whole block (tests compare with all 126). The global scale aims at 256: at 448 the blocks
nearest to the tensor's maximum could not choose a larger scale. Two kinds of block: MixFP4 (arXiv 2605.31035), IF4 (arXiv
2603.28765).

Ordinary quantized tensors come out. It runs once a weight, in plain PyTorch, row by row in pieces: every operation is one float32
rounding and sums have a fixed order, so that a CPU and a GPU choose the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4compile.codegen.formats import QuantConfig, ScaleRule, round_up
from fp4compile.codegen.reference.block_kinds import (
    E2M1,
    FLAG,
    IF4_INTEGER,
    INTEGER,
    Kind,
    magnitude_of,
    stored_global_scale,
)
from fp4compile.codegen.reference.block_scales import (
    ONE_SIXTH,
    by_matrix,
    e4m3_bytes,
    encode_scale_of,
    multiplier_of,
    spread_over_tiles,
    sum_over_tiles,
)

RADIUS: Final = 8
LARGEST_BYTE: Final = 0x7E
_ONE_SEVENTH: Final = torch.tensor(1 / 7, dtype=torch.float32).item()
_AT_ONCE: Final = {"cpu": 1 << 18}  # elements: a piece and its temporaries stay in a CPU's cache; on a GPU they only have to fit
_AT_ONCE_ON_A_GPU: Final = 1 << 25

# Loss of each block (R, B) of element differences (16, R, B) in units of the block's scale, which it may overwrite.
Metric = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Scales e4m3(block maximum * reciprocal * factor), moved by each of `offsets` bytes. Earlier ones win ties."""

    kind: Kind
    reciprocal: float = ONE_SIXTH
    factor: float = 1.0
    offsets: tuple[int, ...] = (0,)


def around(radius: int) -> tuple[int, ...]:
    """0, 1, -1, 2, -2, ...: of equal losses the scale nearest to the usual one is taken."""
    return (0, *(sign * step for step in range(1, radius + 1) for sign in (1, -1)))


def candidates_of(config: QuantConfig, radius: int = RADIUS) -> tuple[Candidates, ...]:
    """What `config` chooses from. MixFP4 takes integers at a tie, IF4 e2m1."""
    sweeps = config.scale_rule in (ScaleRule.SWEEP, ScaleRule.LOCAL_HESSIAN)
    offsets = around(radius) if sweeps else (0,)
    floats = Candidates(kind=E2M1, offsets=offsets)
    wider = (Candidates(kind=E2M1, factor=1.5),) if config.scale_rule is ScaleRule.FOUR_OVER_SIX else ()
    integers = Candidates(kind=INTEGER, reciprocal=_ONE_SEVENTH, offsets=offsets)
    if config.format == "mixfp4":
        return (integers, floats, *wider)
    if config.format == "nvint4":
        return (integers,)
    if config.format == "if4":
        return (floats, Candidates(kind=IF4_INTEGER, offsets=offsets))
    return (floats, *wider)


def quantize_by_search_ref(
    x: Tensor, config: QuantConfig, *, candidates: tuple[Candidates, ...] | None = None, metric: Metric | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (uint8, one an element), scales and global scale of float32 `x` (..., R, Kp), Kp a multiple of 16."""
    finite = torch.isfinite(x)
    encode_scale = encode_scale_of(torch.where(finite, x.abs(), 0.0), config)
    decode_scale = 1 / encode_scale
    rows = x.shape[-2]
    padded = round_up(rows, 16) if config.is_tile else rows  # so that a tile never reaches into the next matrix
    flat = F.pad(x, (0, 0, 0, padded - rows)).flatten(0, -2)
    flat_scale = by_matrix(encode_scale, x.ndim).expand(*x.shape[:-2], padded, 1).flatten(0, -2)
    chosen = candidates or candidates_of(config)
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=x.device)
    bytes_ = torch.empty((flat.shape[0], flat.shape[1] // 16), dtype=torch.uint8, device=x.device)
    for piece in pieces(flat):
        codes[piece], bytes_[piece] = _choose(flat[piece], flat_scale[piece], config, chosen, metric or sum_of_squares)
    codes, bytes_ = (t.view(*x.shape[:-2], padded, t.shape[-1])[..., :rows, :] for t in (codes, bytes_))
    return codes.contiguous(), bytes_.contiguous().view(config.fmt.scale_dtype), stored_global_scale(decode_scale, config.fmt)


def pieces(x: Tensor) -> Iterator[slice]:
    """Slices of the rows of `x` (R, K), multiples of 16 rows each."""
    at_once = _AT_ONCE.get(x.device.type, _AT_ONCE_ON_A_GPU)
    step = max(16, at_once // max(x.shape[-1], 1) // 16 * 16)
    return (slice(first, first + step) for first in range(0, x.shape[0], step))


def sum_of_squares(difference: Tensor) -> Tensor:
    """Sum over the first dimension (16), in place."""
    return sum_over_elements(difference.mul_(difference))


def sum_over_elements(total: Tensor) -> Tensor:
    """Sum over the first dimension (16) as a tree of adjacent pairs, in place."""
    while total.shape[0] > 1:
        total = total[0::2].add_(total[1::2])
    return total[0].clone()


def _choose(x: Tensor, encode_scale: Tensor, config: QuantConfig, candidates: tuple[Candidates, ...], metric: Metric) -> tuple[Tensor, ...]:
    """Codes (R, K) and scale bytes (R, K/16) of rows whose S is `encode_scale` (R, 1)."""
    blocks = x.unflatten(-1, (-1, 16)).movedim(-1, 0).contiguous()  # elements first: every sum and product below runs along memory
    decode_scale = 1 / encode_scale
    block_max = spread_over_tiles(blocks.abs().amax(0), config, torch.amax)
    lost = sum_over_tiles(metric(blocks * encode_scale), config)
    best = torch.zeros_like(block_max, dtype=torch.uint8)
    least = torch.full_like(block_max, torch.inf)
    memory = (torch.empty_like(blocks), torch.empty_like(blocks), torch.empty_like(blocks))
    loss_of = _Losses(blocks=blocks, decode_scale=decode_scale, config=config, metric=metric, memory=memory)
    for each in candidates:
        usual = e4m3_bytes(block_max * (encode_scale * each.reciprocal) * each.factor)
        for offset in each.offsets:
            byte = (usual.int() + offset).clamp(0, LARGEST_BYTE).to(torch.uint8)
            # Losses are those of x S. Under a scale of zero all of a block is lost.
            loss = torch.where(byte == 0, lost, loss_of(each.kind, magnitude_of(byte)))
            better = loss < least
            least = torch.where(better, loss, least)
            best = torch.where(better, byte | FLAG if each.kind.flagged else byte, best)
    codes = _codes(blocks, best, decode_scale, candidates).movedim(0, -1).flatten(-2)
    return codes, torch.where(torch.isfinite(block_max), best, 0x7F).to(torch.uint8)


@dataclass(frozen=True, kw_only=True)
class _Losses:
    """What each block (16, R, B) loses under a kind and scales (R, B). All calls share memory: new pages cost more than the sums."""

    blocks: Tensor
    decode_scale: Tensor
    config: QuantConfig
    metric: Metric
    memory: tuple[Tensor, Tensor, Tensor]

    def __call__(self, kind: Kind, scale: Tensor) -> Tensor:
        y, out, scratch = self.memory
        torch.mul(self.blocks, multiplier_of(scale, self.decode_scale), out=y)
        difference = kind.rounded(y, out=out, scratch=scratch).sub_(y)
        return sum_over_tiles(self.metric(difference).mul_(scale).mul_(scale), self.config)


def _codes(blocks: Tensor, bytes_: Tensor, decode_scale: Tensor, candidates: tuple[Candidates, ...]) -> Tensor:
    """Codes (16, R, B) of elements under the scales and kinds that `bytes_` (R, B) say."""
    y = blocks * multiplier_of(magnitude_of(bytes_), decode_scale)
    by_flag = {each.kind.flagged: each.kind.codes(y) for each in candidates}
    if len(by_flag) == 1:
        return next(iter(by_flag.values()))
    return torch.where(bytes_ >= FLAG, by_flag[True], by_flag[False])
