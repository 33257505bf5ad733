"""Host side of the native block-scaled products: operands as TMA sees them, tile, launches.

TMA wants contiguous rows at multiples of 16 bytes, and scales swizzled. Whatever comes otherwise is brought into that form by a copy first:
codes whose rows are no multiple of 32 columns of k or that are strided otherwise, an odd k, plain scales of a side that fills whole
tiles. A few rows of A (one tile of at most 64) are read in either layout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fp4compile.codegen import tuning
from fp4compile.codegen.formats import BLOCK_OF_SCALES, FORMATS, Layout, round_up
from fp4compile.codegen.kernels.native_mm import native_mm_kernel
from fp4compile.codegen.kernels.native_tiles import Architecture, Plan, architecture_of, plan
from fp4compile.codegen.kernels.sum_splits import sum_splits_kernel
from fp4compile.codegen.reference.layout import lay_out_ref
from fp4compile.codegen.tuning import TuningKey

_HARDWARE_SCALES = {f.scale_dtype for f in FORMATS.values() if f.in_hardware}


def serves(a_scales: Tensor | None, b_scales: Tensor | None, layouts: tuple[str, str], k: int, capability: int) -> bool:
    """Whether a device of `capability` multiplies operands with these scales itself. An empty sum is left to others."""
    if a_scales is None or b_scales is None or Layout.TILED in layouts or not k or architecture_of(capability) is None:
        return False
    return a_scales.dtype == b_scales.dtype and a_scales.dtype in _HARDWARE_SCALES


@dataclass(frozen=True, kw_only=True)
class Winner:
    """A `Plan` as a search records it: the tile by its name."""

    name: str
    splits: int

    @classmethod
    def of(cls, plan: Plan) -> Winner:
        return cls(name=plan.tile.name, splits=plan.splits)

    def plan(self, architecture: Architecture) -> Plan:
        return Plan(tile=architecture.named(self.name), splits=self.splits)


def key_of(m: int, n: int, k: int, block: int) -> TuningKey:
    """Under which the winner for (m, k) and (n, k) with scales for `block` columns is kept."""
    return TuningKey(family=f"native {block}", m=m, n=n, k=k)


@dataclass(frozen=True, kw_only=True)
class NativeOperand:
    """One side: `codes` (matrices * rows, bytes) with a row stride of whole 16 bytes; scales in `layout`, one matrix each, as given."""

    codes: Tensor
    scales: Tensor
    layout: str
    global_scale: Tensor | None  # (matrices of the product, 1 or rows)
    rows: int
    matrices: int  # 1 where one serves the whole batch
    block: int

    @classmethod
    def of(cls, codes: Tensor, scales: Tensor, global_scale: Tensor | None, layout: str, batch: torch.Size, k: int) -> NativeOperand:
        """`codes` (..., R, Kp/2), `scales` plain or swizzled, `global_scale` (...) or (..., R), of a product over `batch`."""
        rows, shared = codes.shape[-2], codes.ndim == 2
        if global_scale is not None:
            per_row = global_scale.ndim == codes.ndim - 1 and global_scale.ndim > 0
            global_scale = global_scale if per_row else global_scale[..., None]
            global_scale = global_scale.expand(*batch, global_scale.shape[-1]).reshape(batch.numel(), -1)
        matrices = 1 if shared else batch.numel()
        if not shared:
            codes = codes.expand(*batch, *codes.shape[-2:])
            scales = scales.expand(*batch, *scales.shape[-1 if layout == Layout.SWIZZLED else -2 :])
        kept = 1 if layout == Layout.SWIZZLED else 2
        return cls(
            codes=_for_tma(codes.reshape(matrices, rows, -1), k),
            scales=scales.reshape(matrices, *scales.shape[scales.ndim - kept :]),
            layout=layout, global_scale=global_scale, rows=rows, matrices=matrices, block=BLOCK_OF_SCALES[scales.dtype],
        )  # fmt: skip

    def codes_descriptor(self, block_r: int, block_k: int, k: int) -> TensorDescriptor:
        return TensorDescriptor(self.codes, [self.codes.shape[0], -(-k // 2)], [self.codes.stride(0), 1], [block_r, block_k // 2])

    def scales_descriptor(self, block_r: int, block_k: int) -> TensorDescriptor:
        """(matrices, R/128, C/4, 2, 256) bytes: the last two are 512 that belong together, in pieces that TMA can take."""
        scales = self._swizzled()
        columns = scales.numel() // (self.matrices * round_up(self.rows, 128) * 4)
        shape = [self.matrices, -(-self.rows // 128), columns, 2, 256]
        strides = [shape[1] * columns * 512, columns * 512, 512, 256, 1]
        return TensorDescriptor(_as_triton(scales), shape, strides, [1, block_r // 128, block_k // self.block // 4, 2, 256])

    def scales_pointer(self) -> tuple[Tensor, int, int, int, int]:
        """Scales, their strides as `tile_sum` takes them, and how many of a row there are."""
        if self.layout == Layout.SWIZZLED:
            columns = self.scales.shape[1] // (round_up(self.rows, 128) * 4)
            return _as_triton(self.scales), self._step(self.scales.stride(0)), columns, 1, 4 * columns
        b, r, c = self.scales.stride()
        return _as_triton(self.scales), self._step(b), r, c, self.scales.shape[2]

    def _step(self, stride: int) -> int:
        return stride if self.matrices > 1 else 0

    def _swizzled(self) -> Tensor:
        scales = self.scales
        if self.layout != Layout.SWIZZLED:
            _, scales = lay_out_ref(scales, scales, Layout.SWIZZLED)
        scales = scales.contiguous()
        return scales if scales.data_ptr() % 16 == 0 else scales.clone()


def scaled_mm(
    a: Tensor,
    a_scales: Tensor,
    a_global: Tensor | None,
    b: Tensor,
    b_scales: Tensor,
    b_global: Tensor | None,
    bias: Tensor | None,
    k: int,
    out_dtype: torch.dtype,
    *,
    a_layout: str = Layout.PLAIN,
    b_layout: str = Layout.PLAIN,
    capability: int,
    processors: int = 0,
    chosen: Plan | None = None,
) -> Tensor:
    """`fp4::scaled_mm` of what `serves` accepts, on a device of `capability` with `processors` SMs, 0 for as many as its generation has.

    `chosen` overrides what a search has found and what `plan` says.
    """
    architecture = architecture_of(capability)
    assert architecture is not None, "ask `serves` first"
    out = a.new_empty((*a.shape[:-1], b.shape[-2]), dtype=out_dtype)
    if not out.numel():
        return out
    batch = a.shape[:-2]
    if b.ndim == 2 and a.ndim > 2 and a_layout == Layout.PLAIN and (a_global is None or a_global.ndim == a.ndim - 1):
        # One B for all: the rows of every matrix of A are alike, and fill tiles better as one matrix.
        a, a_scales, a_global = a.flatten(0, -2), a_scales.flatten(0, -2), None if a_global is None else a_global.flatten()
        batch = torch.Size(())
    left = NativeOperand.of(a, a_scales, a_global, a_layout, batch, k)
    right = NativeOperand.of(b, b_scales, b_global, b_layout, batch, k)
    flat = out.view(batch.numel(), left.rows, right.rows)
    bias = None if bias is None else _spread(bias.expand(out.shape).reshape(flat.shape))
    chosen = chosen or _planned(architecture, left, right, bias, k, flat.shape[0], processors)
    sms = processors or architecture.processors
    if chosen.splits == 1:
        _launch(left, right, bias, flat, k, chosen, sms)
        return out
    partial = flat.new_empty((chosen.splits, *flat.shape), dtype=torch.float32)
    _launch(left, right, None, partial, k, chosen, sms)
    _sum_splits(partial, left.global_scale, right.global_scale, bias, flat)
    return out


def _planned(
    architecture: Architecture, left: NativeOperand, right: NativeOperand, bias: Tensor | None, k: int, batch: int, processors: int
) -> Plan:
    # The kernel that sums the parts knows one matrix, and a bias that its rows share.
    may_split = batch == 1 and (bias is None or bias.stride(1) == 0)
    if batch == 1 and left.codes.is_cuda:
        found = tuning.lookup(left.codes.device, key_of(left.rows, right.rows, k, left.block), (Winner,))
        known = found is not None and found.name in {tile.name for tile in architecture.tiles}
        if known and (may_split or found.splits == 1):
            return found.plan(architecture)
    return plan(architecture, left.rows, right.rows, k, batch=batch, processors=processors, may_split=may_split)


def _launch(left: NativeOperand, right: NativeOperand, bias: Tensor | None, out: Tensor, k: int, plan: Plan, processors: int) -> None:
    """`out` is (batch, M, N), or (splits, 1, M, N) for parts without scales."""
    tile, parts = plan.tile, out.ndim == 4
    batch, m, n = out.shape[-3:]
    rows, columns, sizes = (right, left, (n, m)) if tile.swapped else (left, right, (m, n))
    tiles = batch * triton.cdiv(sizes[0], tile.block_r) * triton.cdiv(sizes[1], tile.block_c)
    by_descriptor = not tile.swapped and not parts and n * out.element_size() % 16 == 0
    block = [1, tile.block_r, tile.block_c // tile.parts]
    whole_blocks = tile.block_c % 128 == 0
    if whole_blocks:
        column_scales, strides, groups, kind = columns.scales_descriptor(tile.block_c, tile.block_k), (0, 0, 0), 0, "descriptor"
    else:
        column_scales, *strides, groups = columns.scales_pointer()
        kind = str(columns.layout)
    globals_ = [None if parts else side.global_scale for side in (rows, columns)]
    native_mm_kernel[(min(tiles, processors) if tile.persistent else tiles, plan.splits)](
        rows.codes_descriptor(tile.block_r, tile.block_k, k), rows.scales_descriptor(tile.block_r, tile.block_k),
        columns.codes_descriptor(tile.block_c, tile.block_k, k), column_scales, *globals_, bias, out,
        TensorDescriptor.from_tensor(out, block) if by_descriptor else None,
        batch, *sizes, triton.cdiv(k, tile.block_k), groups, int(rows.matrices > 1), int(columns.matrices > 1), *strides,
        *_strides(globals_[0], 2), *_strides(globals_[1], 2), *_swap(_strides(bias, 3), tile.swapped),
        out.stride(0) if parts else 0, *_swap(out.stride()[-3:], tile.swapped),
        BLOCK=left.block, COLUMN_SCALES=kind, EACH_ROW=is_vector(globals_[0]), EACH_COLUMN=is_vector(globals_[1]),
        BIAS=_bias_kind(bias, tile.swapped), **tile.options(),
    )  # fmt: skip


def _sum_splits(partial: Tensor, a_global: Tensor | None, b_global: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
    _, m, n = out.shape
    strides = [0 if each is None else int(is_vector(each)) * each.stride(1) for each in (a_global, b_global)]
    sum_splits_kernel[(triton.cdiv(m * n, 1024),)](
        partial, a_global, b_global, None if bias is None else bias[0, 0].contiguous(), out, n, m * n, *strides,
        SPLITS=partial.shape[0], BLOCK=1024, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def _for_tma(codes: Tensor, k: int) -> Tensor:
    """Codes (matrices, R, bytes) as (matrices * R, bytes), the bytes contiguous and the rows at whole 16 bytes, the last one clean."""
    matrices, rows, bytes_ = codes.shape
    flat = codes.stride(0) == rows * codes.stride(1) or matrices == 1
    if flat and codes.stride(2) == 1 and codes.stride(1) % 16 == 0 and codes.data_ptr() % 16 == 0 and k % 2 == 0:
        return codes.as_strided((matrices * rows, bytes_), codes.stride()[1:])
    used = -(-k // 2)
    copy = codes.new_zeros((matrices, rows, round_up(used, 16)))
    copy[..., :used] = codes[..., :used]
    if k % 2:
        copy[..., used - 1] &= 0xF  # the high nibble is column k, and a product ends before it
    return copy.view(matrices * rows, -1)


def _as_triton(scales: Tensor) -> Tensor:
    """`tl.dot_scaled` takes e8m0 scales as bytes."""
    return scales.view(torch.uint8) if scales.dtype == torch.float8_e8m0fnu else scales


def is_vector(global_scale: Tensor | None) -> bool:
    return global_scale is not None and global_scale.shape[1] > 1


def _spread(bias: Tensor) -> Tensor:
    """`bias` with stride 0 wherever one element serves a dimension; torch gives a dimension of one element any stride."""
    return bias.as_strided(bias.shape, [0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True)])


def _bias_kind(bias: Tensor | None, swapped: bool) -> str:
    """Which side of the tile a bias (batch, M, N) follows."""
    if bias is None:
        return "none"
    if bias.stride(1) and bias.stride(2):
        return "matrix"
    return "row" if (bias.stride(1) != 0) != swapped else "column"


def _strides(x: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if x is None else x.stride()


def _swap(strides: tuple[int, ...], swapped: bool) -> tuple[int, ...]:
    """Strides (batch, M, N) as (batch, rows, columns)."""
    batch, m, n = strides
    return (batch, n, m) if swapped else (batch, m, n)
