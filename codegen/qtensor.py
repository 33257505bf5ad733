"""A quantized matrix as users hold it, and the public `quantize`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp4compile.codegen import ops
from fp4compile.codegen.errors import Fp4CompileError, UnsupportedDtype
from fp4compile.codegen.formats import FORMATS, QuantConfig
from fp4compile.codegen.reference.block import dequantize_ref
from fp4compile.codegen.reference.hadamard import hadamard_ref, signs
from fp4compile.codegen.reference.swizzle import swizzle_ref

QUANTIZABLE = (torch.float32, torch.bfloat16, torch.float16)


class ShapeTooSmall(Fp4CompileError, ValueError):
    template = "quantize: shape {found} has no matrix; at least two dimensions (..., R, C) are needed. Use x[None] for a vector."


class SeedMissing(Fp4CompileError, ValueError):
    template = "quantize: rounding = '{rounding}' draws from a seed. Pass seed=<int>; the same seed gives the same codes."


@dataclass(frozen=True, kw_only=True)
class QTensor:
    """Block-scaled 4-bit values of a tensor of `shape`, quantized along `axis`, its dimension K; R is the other of the last two.

    codes: uint8 (..., R, Kp/2), the even index in the low nibble; Kp is K padded with zeros to whole blocks.
    scales: float8_e4m3fn (..., R, Kp/16), or float8_e8m0fnu (..., R, Kp/32) for MXFP4; plain row-major. Formats with two kinds of blocks
    have uint8 (mixfp4, nvint4) or int8 (if4): an e4m3 magnitude, and in the sign bit whether the block holds integers.
    global_scale: float32, multiplies after decoding; one a matrix, one a row, or (..., R, Kp/128).
    """

    codes: Tensor
    scales: Tensor
    global_scale: Tensor
    config: QuantConfig
    shape: torch.Size
    axis: int = -1
    dtype: torch.dtype = torch.float32

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Values of the original shape in `dtype` (default: the source's), rotated back where a Hadamard was applied."""
        values = dequantize_ref(self.codes, self.scales, self.global_scale)
        if self.config.hadamard:
            values = _rotate_back(values, self.config.hadamard)
        values = values[..., : self.shape[self.axis]]
        return (values if self.axis == -1 else values.mT).to(dtype or self.dtype)

    def swizzled_scales(self) -> Tensor:
        """Flat scales in the 128x4 blocked layout of cuBLAS and `tcgen05`; 2-D tensors only."""
        return swizzle_ref(self.scales)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales, self.global_scale))


def quantize(
    x: Tensor,
    format: str = "nvfp4",
    *,
    block: str = "",
    scale_rule: str = "amax",
    global_scale: str = "tensor",
    rounding: str = "nearest",
    hadamard: int = 0,
    static_amax: float | None = None,
    axis: int = -1,
    seed: int | None = None,
) -> QTensor:
    """Quantize `x` (..., R, C; float32, bfloat16 or float16) to 4 bits along `axis`, -1 or -2.

    format: "nvfp4", "mxfp4", and for weights "mixfp4", "if4", "nvint4" (docs/methods.md).
    block: "1x16" or "16x16" for nvfp4, "1x32" for mxfp4 (default: the format's first).
    scale_rule: "amax", or "four_over_six" with "_mae" or "_absmax" (arXiv 2512.02010); searches for weights: "sweep", "soar",
    "soar_decoupled".
    global_scale: "tensor", "row", "1x128" (one each 128 values of a row), or "static" with `static_amax`.
    rounding: "nearest", or "stochastic" or "eden" (arXiv 2601.22813) with `seed`. hadamard: 0, or rotate groups of 16, 32, 64, 128 first.

    Raises `UnknownName`, `IllegalCombination`, `UnsupportedDtype`, `ShapeTooSmall` or `SeedMissing`.
    """
    config = QuantConfig(
        format=format, block=block, scale_rule=scale_rule, global_scale=global_scale,  # type: ignore[arg-type]
        rounding=rounding, hadamard=hadamard, static_amax=static_amax,  # type: ignore[arg-type]
    )  # fmt: skip
    if x.dtype not in QUANTIZABLE:
        raise UnsupportedDtype(where="quantize", found=x.dtype, fmt=FORMATS[format].name)
    if x.ndim < 2:
        raise ShapeTooSmall(found=tuple(x.shape))
    if config.draws and seed is None:
        raise SeedMissing(rounding=rounding)
    seed_tensor = None if seed is None else torch.tensor(seed, dtype=torch.int64, device=x.device)
    codes, scales, decode = ops.QUANTIZE(x, axis, *ops.quantize_args(config), seed_tensor)
    return QTensor(codes=codes, scales=scales, global_scale=decode, config=config, shape=x.shape, dtype=x.dtype, axis=axis)


def _rotate_back(values: Tensor, size: int) -> Tensor:
    """x = y H diag(sign) / sqrt(n): the transform undoes itself up to where the signs stand."""
    plain = hadamard_ref((values.unflatten(-1, (-1, size)) * signs(size, values.device)).flatten(-2), size)
    return (plain.unflatten(-1, (-1, size)) * signs(size, values.device)).flatten(-2)
