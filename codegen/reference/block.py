"""Block quantization, bit for bit.

NVFP4 follows TransformerEngine's order of operations: with A = max|x|, S = 2688 / A and m = S * (1/6), a block maximum b gives the
stored scale s = e4m3(min(b m, 448)), and an element the code e2m1(x * (1 / (s * (1 / S)))). Every line is one float32 rounding;
another order gives other bits at ties. A non-finite element makes its block's scale NaN, so that the product is NaN as it would be
in bf16; A is taken over the finite values. MXFP4 is OCP Microscaling 1.0 with a floor exponent.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4compile.codegen.formats import GlobalScale, QuantConfig, Rounding, ScaleRule, round_up
from fp4compile.codegen.reference.block_kinds import decode_blocks_ref
from fp4compile.codegen.reference.block_scales import (
    ONE_SIXTH,
    Encoder,
    block_error,
    by_matrix,
    each_element,
    encode_blocks,
    encode_scale_of,
    nearest_e4m3,
    spread_over_tiles,
    stored_scales,
)
from fp4compile.codegen.reference.e2m1 import encode_nearest_ref, encode_stochastic_ref, pack_ref, unpack_ref
from fp4compile.codegen.reference.eden import EDEN_SIXTH, eden_scales_ref
from fp4compile.codegen.reference.hadamard import hadamard_ref
from fp4compile.codegen.reference.philox import philox_bytes_ref
from fp4compile.codegen.reference.runs import rows_as_runs, runs_as_rows
from fp4compile.codegen.reference.scale_search import quantize_by_search_ref
from fp4compile.codegen.reference.soar import quantize_soar_ref


def quantize_ref(x: Tensor, config: QuantConfig, *, axis: int = -1, seed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize `x` (..., R, C) in blocks along `axis`, -1 or -2, which becomes the last dimension K of the result.

    Returns codes (..., R', Kp/2) uint8, scales (..., R', Kp/block) and the decode multiplier (...) float32, or (..., R') where
    `config.global_scale` is `row`, or (..., R', Kp/128) where it is `1x128`; R' is the other dimension and Kp is K padded with zeros. Each
    leading index is a matrix of its own. `seed`, an int64 scalar tensor, is needed where `config.draws`.
    """
    if config.by_runs:
        of_rows = quantize_ref(runs_as_rows(x, axis), replace(config, global_scale=GlobalScale.ROW), seed=seed)
        return rows_as_runs(*of_rows, x, axis)
    x = x if axis == -1 else x.mT
    x = F.pad(x, (0, round_up(x.shape[-1], config.k_multiple) - x.shape[-1]))
    if config.hadamard:
        x = hadamard_ref(x, config.hadamard)
    x = x.float()
    assert not config.needs_moments, "what a calibration chooses is chosen in `codegen/statistics.py`"
    if config.is_offline:
        search = quantize_soar_ref if config.scale_rule.startswith("soar") else quantize_by_search_ref
        codes, scales, global_scale = search(x, config)
    else:
        assert seed is not None or not config.draws, f"{config.rounding} rounding draws from a seed"
        encode = _encoder(config, x, seed)
        if config.fmt.has_global_scale:
            codes, scales, global_scale = _quantize_nvfp4(x, config, encode, seed)
        else:
            codes, scales, global_scale = _quantize_mxfp4(x, config, encode)
    return pack_ref(codes), scales, global_scale


def dequantize_ref(codes: Tensor, scales: Tensor, global_scale: Tensor | None = None) -> Tensor:
    """(..., R, Kp) float32 values of packed `codes`. The dtype of `scales` names the format.

    Without `global_scale` they are exact, in bf16 too (NVFP4 has 6 significant bits, integers of MixFP4 have 7), but for IF4's 9 bits.
    """
    values = decode_blocks_ref(unpack_ref(codes), scales)
    return values if global_scale is None else values * each_element(global_scale, values)


def _encoder(config: QuantConfig, x: Tensor, seed: Tensor | None) -> Encoder:
    if config.rounding is not Rounding.STOCHASTIC or seed is None:
        return encode_nearest_ref
    random_byte = philox_bytes_ref(seed, x.numel() // 16).view(x.shape)
    return lambda y: encode_stochastic_ref(y, random_byte)


def _quantize_nvfp4(x: Tensor, config: QuantConfig, encode: Encoder, seed: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    encode_scale = finite_encode_scale(x, config)
    return *nvfp4_blocks(x, encode_scale, config, encode, seed), 1 / encode_scale


def finite_encode_scale(x: Tensor, config: QuantConfig) -> Tensor:
    """S of `x` by its finite values."""
    return encode_scale_of(torch.where(torch.isfinite(x), x.abs(), 0.0), config)


def nvfp4_blocks(
    x: Tensor, encode_scale: Tensor, config: QuantConfig, encode: Encoder, seed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes, one an element, and scales of float32 `x` (..., R, Kp) whose S is `encode_scale`."""
    by_block = by_matrix(encode_scale, x.ndim)
    decode_by_block = 1 / by_block

    block_max = spread_over_tiles(x.abs().unflatten(-1, (-1, 16)).amax(-1), config, torch.amax)  # b
    target = block_max * (by_block * (EDEN_SIXTH if config.rounding is Rounding.EDEN else ONE_SIXTH))
    if config.scale_rule is ScaleRule.AMAX_17_16:
        target = target * (17 / 16)
    scale = nearest_e4m3(target)
    codes = encode_blocks(x, scale, decode_by_block, encode)
    if config.scale_rule.tries_two:
        scale_4 = nearest_e4m3(target * 1.5)
        codes_4 = encode_blocks(x, scale_4, decode_by_block, encode)
        error_6 = block_error(x * by_block, codes, scale, config)
        error_4 = block_error(x * by_block, codes_4, scale_4, config)
        take_4 = error_4 < error_6
        scale = torch.where(take_4, scale_4, scale)
        codes = torch.where(take_4.repeat_interleave(16, -1), codes_4, codes)

    if config.rounding is Rounding.EDEN and seed is not None:
        scale = eden_scales_ref(x * by_block, codes, scale, seed)

    # A NaN in the block maximum is any non-finite element of the block: amax keeps NaN, and Inf is caught here.
    return codes, stored_scales(scale, torch.isfinite(block_max), torch.float8_e4m3fn)


def _quantize_mxfp4(x: Tensor, config: QuantConfig, encode: Encoder) -> tuple[Tensor, Tensor, Tensor]:
    return *mxfp4_blocks(x, encode), torch.ones(x.shape[:-2], device=x.device)


def mxfp4_blocks(x: Tensor, encode: Encoder) -> tuple[Tensor, Tensor]:
    """Codes, one an element, and scales of float32 `x` (..., R, Kp)."""
    blocks = x.unflatten(-1, (-1, 32))
    block_max = blocks.abs().amax(-1)
    exponent_byte = block_max.view(torch.int32) >> 23 & 0xFF
    byte = (exponent_byte - 2).clamp(min=0)  # e2m1's own largest exponent is 2
    multiplier = (254 - byte << 23).view(torch.float32)  # 2^(127 - byte), from its bits: pow on CUDA is not exact by contract
    codes = encode((blocks * multiplier[..., None]).flatten(-2))
    finite = torch.isfinite(block_max)
    scales = torch.where(finite, byte, 0xFF).to(torch.uint8).view(torch.float8_e8m0fnu)
    return codes, scales
