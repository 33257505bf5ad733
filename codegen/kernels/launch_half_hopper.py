"""Host side of `half_hopper_mm`."""

from __future__ import annotations

import functools
from typing import Final

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fp4compile.codegen.kernels.half_hopper_mm import half_hopper_mm_kernel
from fp4compile.codegen.kernels.hopper_tiles import HalfTile
from fp4compile.codegen.kernels.kernel_call import KernelCall, kinds_of
from fp4compile.codegen.kernels.launch_hopper import stride_of, x_descriptor
from fp4compile.codegen.target import processors_of

_PIECE: Final = 64


def multiply_halves_hopper(
    a: Tensor, b: Tensor, a_global: Tensor | None, b_global: Tensor | None, bias: Tensor | None, out: Tensor, tile: HalfTile
) -> None:
    """out (M, N) contiguous = A (M, K) times B (N, K) transposed, of one half type, times the global scales, plus `bias` (N).

    A global scale is float32, a number or one a row of A or of B. Products are exact, sums float32 in a fixed order; one rounding.
    """
    m, n = out.shape
    tiles = tile.count(m, n)
    programs = min(tiles, processors_of(a.device)) if a.is_cuda else tiles
    pieces, pointers = _out_descriptor(out, tile.block_m // 2), (a_global, b_global, bias, out)
    product = _product(
        tile, programs, (m, n, a.shape[1], stride_of(a_global), stride_of(b_global)), a.dtype, pieces is None, a.device, kinds_of(*pointers)
    )
    product(x_descriptor(a, tile.block_m), x_descriptor(b, tile.block_n), pieces, *pointers)


@functools.lru_cache(maxsize=4096)
def _product(
    tile: HalfTile, programs: int, numbers: tuple[int, int, int, int, int], dtype: torch.dtype, whole: bool, device: torch.device,
    kinds: tuple[object, ...],
) -> KernelCall:  # fmt: skip
    """The kernel on descriptors of A and B, of `dtype`, and of the output unless it leaves `whole`, and on tensors of `kinds`."""
    m, n, k, a_stride, b_stride = numbers
    return KernelCall(half_hopper_mm_kernel, (programs,), tile.options(), m=m, n=n, k=k, a_global_stride=a_stride, b_global_stride=b_stride)


def _out_descriptor(out: Tensor, rows: int) -> TensorDescriptor | None:
    """Pieces of `out`, or None where its rows do not begin at multiples of 16 bytes, or are of float32, for which there is no room."""
    if out.dtype is torch.float32 or out.shape[1] * out.element_size() % 16 or out.data_ptr() % 16:
        return None
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16)
    return TensorDescriptor(out, list(out.shape), [out.shape[1], 1], [rows, _PIECE], layout)
