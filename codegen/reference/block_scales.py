"""Scale arithmetic that every NVFP4-like quantizer shares: the global scale, e4m3 rounding, the error of a block, the stored bytes.

Each line is one float32 rounding, in the order that `block.py` describes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4compile.codegen.formats import E4M3_MAX, FP32_MAX, RUN, GlobalScale, QuantConfig, ScaleRule, round_up
from fp4compile.codegen.reference.e2m1 import decode_ref

Encoder = Callable[[Tensor], Tensor]

ONE_SIXTH = torch.tensor(1 / 6, dtype=torch.float32).item()
_NAN_BYTE = {torch.float8_e4m3fn: 0x7F, torch.float8_e8m0fnu: 0xFF}


def encode_scale_of(finite_magnitude: Tensor, config: QuantConfig) -> Tensor:
    """S of each matrix (...), or of each row (..., R) where `config.global_scale` is `row`."""
    bound = config.encode_bound
    if config.global_scale is GlobalScale.STATIC:
        amax = torch.full(finite_magnitude.shape[:-2], config.static_amax or 0.0, device=finite_magnitude.device)
    else:
        dims = (-1,) if config.global_scale is GlobalScale.ROW else (-2, -1)
        amax = _amax_or_zero(finite_magnitude, dims)
    # A tensor above the bar: torch computes `number / tensor` as a reciprocal and a product, which rounds twice.
    quotient = amax.new_full((), bound) / amax
    # Below A = 7.9e-36 the quotient would be Inf; the cap keeps it finite.
    return torch.where(amax == 0, 1.0, quotient.clamp(max=FP32_MAX))


def _amax_or_zero(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    kept = [s for i, s in enumerate(x.shape) if i - x.ndim not in dims]
    return x.amax(dims) if x.numel() else x.new_zeros(kept)


def by_matrix(per_matrix: Tensor, ndim: int) -> Tensor:
    """A global scale (...) or (..., R) with dimensions of one element behind, up to `ndim`."""
    return per_matrix.reshape(*per_matrix.shape, *(1,) * (ndim - per_matrix.ndim))


def each_element(global_scale: Tensor, values: Tensor) -> Tensor:
    """What broadcasts over `values` (..., R, K): a global scale (...), (..., R) or, by runs of 128 columns, (..., R, runs)."""
    if global_scale.ndim == values.ndim:
        return global_scale.repeat_interleave(RUN, -1)[..., : values.shape[-1]]
    return by_matrix(global_scale, values.ndim)


def nearest_e4m3(target: Tensor) -> Tensor:
    """float32 holding e4m3 values. The clamp comes first: the cast's own behaviour above 448 changed between torch versions."""
    return target.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float()


def e4m3_bytes(target: Tensor) -> Tensor:
    """The bytes (uint8) of `nearest_e4m3`."""
    return target.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def multiplier_of(scale: Tensor, decode_scale: Tensor) -> Tensor:
    """What an element is multiplied by before it is rounded to a code."""
    return (1 / (scale * decode_scale)).clamp(max=FP32_MAX)


def encode_blocks(x: Tensor, scale: Tensor, decode_scale: Tensor, encode: Encoder) -> Tensor:
    return encode((x.unflatten(-1, (-1, 16)) * multiplier_of(scale, decode_scale)[..., None]).flatten(-2))


def block_error(x_encoded: Tensor, codes: Tensor, scale: Tensor, config: QuantConfig) -> Tensor:
    """Error of each block against `x_encoded` = x S, so that neither tiny nor huge tensors leave float32's range when squared."""
    difference = x_encoded.unflatten(-1, (-1, 16)) - decode_ref(codes).unflatten(-1, (-1, 16)) * scale[..., None]
    if config.scale_rule is ScaleRule.FOUR_OVER_SIX_ABSMAX:
        return spread_over_tiles(difference.abs().amax(-1), config, torch.amax)
    each = difference.abs() if config.scale_rule is ScaleRule.FOUR_OVER_SIX_MAE else difference * difference
    return sum_over_tiles(sum_adjacent(each), config)


def sum_adjacent(x: Tensor) -> Tensor:
    """Sum over the last dimension (16) as a tree of adjacent pairs: one fixed order, the same in every kernel."""
    while x.shape[-1] > 1:
        x = x[..., 0::2] + x[..., 1::2]
    return x[..., 0]


def sum_over_tiles(per_block: Tensor, config: QuantConfig) -> Tensor:
    return spread_over_tiles(per_block, config, lambda t, dim: sum_adjacent(t.movedim(dim, -1)))


def spread_over_tiles(per_block: Tensor, config: QuantConfig, reduce: Callable[..., Tensor]) -> Tensor:
    """For 16x16 blocks: reduce (..., R, K/16) over groups of 16 rows and repeat the result on each of them."""
    if not config.is_tile:
        return per_block
    rows = per_block.shape[-2]
    tiles = F.pad(per_block, (0, 0, 0, round_up(rows, 16) - rows)).unflatten(-2, (-1, 16))
    return reduce(tiles, dim=-2).repeat_interleave(16, -2)[..., :rows, :]


def stored_scales(scale: Tensor, finite: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale bytes; NaN is written as the positive NaN byte, because x86 makes negative ones."""
    stored = scale.to(dtype).view(torch.uint8)
    return torch.where(finite, stored, _NAN_BYTE[dtype]).to(torch.uint8).view(dtype)
