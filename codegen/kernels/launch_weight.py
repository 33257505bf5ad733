"""Products with NVFP4 weights that `decode_mm` serves: what they need is brought into the form that it takes.

A quantized operand A is dequantized first, which is exact and small beside the product; its global scale goes to the epilogue.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp4compile.codegen.formats import Layout
from fp4compile.codegen.kernels.decode_mm import decode_mm, supports
from fp4compile.codegen.kernels.hopper_tiles import choose_hopper_tile, gluon_launcher
from fp4compile.codegen.kernels.launch_dequantize import EXACT_IN_BFLOAT16, dequantize, tile_on_device
from fp4compile.codegen.reference.layout import rows_of
from fp4compile.codegen.target import processors_of

_HALVES = (torch.bfloat16, torch.float16)


def serves_weight(
    a: Tensor, a_scales: Tensor | None, b: Tensor, b_scales: Tensor | None, layouts: tuple[str, str], k: int, capability: int,
    *, groups: bool = False,
) -> bool:  # fmt: skip
    """Whether `multiply_weight`, or with `groups` `multiply_expert_weights`, computes this product."""
    if b_scales is None or b_scales.dtype != torch.float8_e4m3fn or capability < 80:
        return False
    if layouts[0] != Layout.PLAIN or layouts[1] == Layout.SWIZZLED or (a_scales is not None and a_scales.dtype not in EXACT_IN_BFLOAT16):
        return False
    dtype = a.dtype if a_scales is None else torch.bfloat16
    matrix = 3 if layouts[1] == Layout.TILED else 2
    if groups:
        return capability == 90 and dtype in _HALVES and a.shape[0] > 0 and b.shape[0] > 0 and b.ndim == matrix + 1
    return b.ndim == matrix and supports(a.shape[:-1].numel(), rows_of(b, layouts[1]), k, dtype, capability) is None


def multiply_weight(
    a: Tensor, a_scales: Tensor | None, a_global: Tensor | None, codes: Tensor, scales: Tensor, b_global: Tensor | None,
    bias: Tensor | None, k: int, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """(..., M, N): A (..., M, K) times one weight, plain or tiled, times the global scales, plus `bias` broadcast; one rounding."""
    shape = a.shape[:-1]
    n = 16 * codes.shape[0] if codes.ndim == 3 else codes.shape[0]
    if a_global is not None:
        a_global = _by_row(a_global, shape)
    x = (a if a_scales is None else dequantize(a, a_scales, k, torch.bfloat16)).flatten(0, -2)
    if bias is None or (bias.ndim and bias.shape[-1] == bias.numel() == n):
        vector = None if bias is None else bias.reshape(n).contiguous()
        return decode_mm(x, codes, scales, b_global, vector, out_dtype, n=n, a_global=a_global).view(*shape, n)
    out = decode_mm(x, codes, scales, b_global, None, torch.float32, n=n, a_global=a_global).view(*shape, n)
    return (out + bias.float()).to(out_dtype)


def multiply_expert_weights(
    a: Tensor, a_scales: Tensor | None, a_global: Tensor | None, codes: Tensor, scales: Tensor, b_global: Tensor | None,
    offs: Tensor, k: int, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """(T, N): rows of A (T, K) times the weight of (G, ...) that `offs` gives them, plain or tiled; on sm_90."""
    x = a if a_scales is None else dequantize(a, a_scales, k, torch.bfloat16)
    n = 16 * codes.shape[1] if codes.ndim == 4 else codes.shape[1]
    if codes.ndim == 3:
        codes, scales = tile_on_device(codes, scales)
    if a_global is not None:
        a_global = _by_row(a_global, a.shape[:-1])
    if b_global is not None and b_global.ndim == 0:
        b_global = b_global.expand(codes.shape[0])
    out = a.new_zeros((a.shape[0], n), dtype=out_dtype)
    tile = choose_hopper_tile(-(-a.shape[0] // codes.shape[0]), n * codes.shape[0], 128 * codes.shape[2], processors_of(a.device))
    b_global = None if b_global is None else b_global.contiguous()
    launcher = gluon_launcher("launch_hopper")
    launcher.multiply_groups_hopper(x, codes.contiguous(), scales.contiguous(), a_global, b_global, offs, out, tile)
    return out


def _by_row(a_global: Tensor, rows: torch.Size) -> Tensor:
    """One number, or one a row of the flattened A."""
    if a_global.numel() == 1:
        return a_global
    if a_global.ndim == len(rows) - 1:
        a_global = a_global[..., None]
    return a_global.expand(rows).reshape(-1)
