"""Outlier channels quantized twice (ARCQuant, arXiv 2601.07475), bit for bit.

The channels of an activation are put in an order, calibrated outliers last. What quantizing loses of those is quantized too, in blocks
with scales of their own under the same global scale, and each such residual block follows the block that it belongs to. The weight has its
columns in the same order, and each outlier block twice, so that one product of 4-bit matrices, wider by the outliers, computes
(Q(x) + Q(x - Q(x))) Q(w)^T there. The order of K is free as long as both operands have the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4compile.codegen.formats import QuantConfig, round_up
from fp4compile.codegen.reference.block import dequantize_ref, finite_encode_scale, mxfp4_blocks, nvfp4_blocks, quantize_ref
from fp4compile.codegen.reference.e2m1 import encode_nearest_ref, pack_ref


def quantize_residual_ref(
    x: Tensor, order: Tensor, outliers: int, config: QuantConfig, *, axis: int = -1
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Quantize `x` (..., R, C) along `axis` in the order given, the last `outliers` channels of it with their residuals.

    order: int32 (Kp,), a permutation of the channels, or (Kp/block,), one of whole blocks; Kp is K padded with zeros. Returns codes
    (..., R', (Kp + outliers)/2) uint8, scales (..., R', (Kp + outliers)/block) and decode multipliers as `quantize_ref` does. What is lost
    is computed in float32: the decoded value, as `dequantize_ref` has it, subtracted from x.
    """
    x = in_order_ref(x, order, config, axis=axis).float()
    codes, scales, decode = quantize_ref(x, config)
    return *with_residual_ref(x, codes, scales, decode, outliers, config), decode


def with_residual_ref(
    x: Tensor, codes: Tensor, scales: Tensor, decode: Tensor, outliers: int, config: QuantConfig
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes and scales of `x` (..., R, Kp) float32, already quantized to `codes`, `scales` and `decode`, with its residual blocks."""
    lost = residual_ref(x, codes, scales, decode, outliers, config)
    if config.fmt.has_global_scale:
        more_codes, more_scales = nvfp4_blocks(lost, finite_encode_scale(x, config), config, encode_nearest_ref)
    else:
        more_codes, more_scales = mxfp4_blocks(lost, encode_nearest_ref)
    return interleaved_ref(codes, pack_ref(more_codes), config.fmt.block // 2), interleaved_ref(scales, more_scales, 1)


def residual_ref(x: Tensor, codes: Tensor, scales: Tensor, decode: Tensor, outliers: int, config: QuantConfig) -> Tensor:
    """(..., R, outliers) float32: what quantizing lost of the last `outliers` channels of `x`."""
    first = x.shape[-1] - outliers
    kept = dequantize_ref(codes[..., first // 2 :], scales[..., first // config.fmt.block :], decode)
    return x[..., first:] - kept


def repeated_ref(codes: Tensor, scales: Tensor, outliers: int, config: QuantConfig) -> tuple[Tensor, Tensor]:
    """Plain codes and scales of a weight with each of its last `outliers` columns' blocks twice, the copy behind the block."""
    half, groups = config.fmt.block // 2, outliers // config.fmt.block
    more_codes, more_scales = codes[..., codes.shape[-1] - outliers // 2 :], scales[..., scales.shape[-1] - groups :]
    return interleaved_ref(codes, more_codes, half), interleaved_ref(scales, more_scales, 1)


def in_order_ref(x: Tensor, order: Tensor, config: QuantConfig, *, axis: int = -1) -> Tensor:
    """(..., R', Kp) of `x` with `axis`, zero-padded to whole blocks, last and in `order`, of channels or of blocks."""
    x = x if axis == -1 else x.mT
    block = config.fmt.block
    padded = F.pad(x, (0, round_up(x.shape[-1], block) - x.shape[-1]))
    if order.numel() == padded.shape[-1]:
        return padded.index_select(-1, order)
    return padded.unflatten(-1, (-1, block)).index_select(-2, order).flatten(-2)


def out_of_order_ref(values: Tensor, order: Tensor, outliers: int, config: QuantConfig) -> Tensor:
    """The inverse for decoded values (..., R, Kp + outliers) of a weight: (..., R, Kp) in the channels' own order, each once."""
    block = config.fmt.block
    blocks = values.unflatten(-1, (-1, block))
    plain = blocks.shape[-2] - 2 * outliers // block
    once = torch.cat([blocks[..., :plain, :], blocks[..., plain::2, :]], dim=-2)
    back = torch.argsort(order)
    return once.flatten(-2).index_select(-1, back) if order.numel() == once.shape[-2] * block else once.index_select(-2, back).flatten(-2)


def interleaved_ref(whole: Tensor, more: Tensor, size: int) -> Tensor:
    """`whole` (..., n) with each group of `size` of `more` (..., m) behind the group of its last m that it belongs to."""
    plain = whole.shape[-1] - more.shape[-1]
    kind, (whole, more) = whole.dtype, (t.view(torch.uint8) for t in (whole, more))
    pairs = torch.stack([whole[..., plain:].unflatten(-1, (-1, size)), more.unflatten(-1, (-1, size))], dim=-2)
    return torch.cat([whole[..., :plain], pairs.flatten(-3)], dim=-1).view(kind)
