"""Calls the C++ kernels with the signatures of the reference. Where they cannot be built the reference runs, and one warning says why.

A decoder makes some two hundred small products a token, so the way to the kernel is short: arguments are packed into one byte string
that C++ reads as a struct.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4compile.codegen.cpu import build
from fp4compile.codegen.formats import QuantConfig, Rounding, round_up
from fp4compile.codegen.reference.block import quantize_ref
from fp4compile.codegen.reference.hadamard import hadamard_ref
from fp4compile.codegen.reference.matmul import scaled_mm_ref
from fp4compile.codegen.reference.runs import is_by_runs, multiply_by_runs

_LOG: Final = logging.getLogger("fp4compile.codegen.cpu")

# The numbers of `Kind` in common.h; a scale's dtype names the format.
_KIND: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2, torch.float8_e8m0fnu: 3}
_DECODED: Final = _KIND | {torch.uint8: 4, torch.int8: 5}  # MixFP4 with NVINT4, and IF4: no product reads them, they are decoded for BLAS
_DENSE: Final = (torch.float32, torch.bfloat16)
_RULE: Final = {"amax": 0, "four_over_six": 1, "four_over_six_mae": 2, "four_over_six_absmax": 3, "amax_17_16": 4, "eden": 5}
_GRANULARITY: Final = {"tensor": 0, "row": 1, "static": 2}
_FEW_ROWS: Final = 8
_DECODED_AT_ONCE: Final = 1 << 21  # float32 weights handed to BLAS: 8 MiB, which stay in a cache
_pack_product: Final = struct.Struct("20q").pack
_pack_quantize: Final = struct.Struct("15qd").pack


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Entry points of one build. vector_level: 2 with bf16 dot products, 1 with other vectors, 0 plain C++."""

    scaled_mm: Callable[[bytes], int]
    quantize: Callable[[bytes], None]
    dequantize: Callable[..., None]
    hadamard: Callable[..., None]
    vector_level: int


def available() -> str | None:
    """None where the C++ kernels run, else why the slow reference does. The first call builds them."""
    found = _native()
    return found if isinstance(found, str) else None


def load(variant: build.Variant) -> Kernels:
    """The kernels of one build, on torch's threads. Raises `NoCompiler`, `BuildFailed` or `LoadFailed`."""
    library = build.load(variant)
    library.fp4_use_threads_of_torch(_parallel_for())
    for name, arguments, result in (
        ("fp4_scaled_mm", [ctypes.c_char_p], ctypes.c_int),
        ("fp4_quantize", [ctypes.c_char_p], None),
        ("fp4_dequantize", [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 4, ctypes.c_void_p], None),
        ("fp4_hadamard", [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 5], None),
    ):
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return Kernels(
        scaled_mm=library.fp4_scaled_mm,
        quantize=library.fp4_quantize,
        dequantize=library.fp4_dequantize,
        hadamard=library.fp4_hadamard,
        vector_level=library.fp4_vector_level(),
    )


def _parallel_for() -> ctypes.c_void_p:
    """torch's own `parallel_for` from its stable C interface: one pool, and `torch.set_num_threads` is obeyed."""
    core = next(iter(sorted((Path(torch.__path__[0]) / "lib").glob("*torch_cpu.*"))), None)
    symbol = getattr(ctypes.CDLL(str(core)), "torch_parallel_for", None) if core else None
    return ctypes.cast(symbol, ctypes.c_void_p) if symbol else ctypes.c_void_p(None)


@functools.cache
def _native() -> Kernels | str:
    _LOG.info("Building the CPU kernels for this machine, unless an earlier run left them.")
    try:
        return load(build.NATIVE)
    except (build.NoCompiler, build.BuildFailed, build.LoadFailed) as error:
        _LOG.warning("%s Until then fp4 operators on the CPU run their slow reference.", error)
        return str(error)


def scaled_mm(
    a: Tensor,
    a_scales: Tensor | None,
    a_global: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    b_global: Tensor | None,
    bias: Tensor | None,
    k: int,
    out_dtype: torch.dtype,
    *,
    kernels: Kernels | str | None = None,
) -> Tensor:
    """`scaled_mm_ref` up to the order of its float32 sums. `kernels`: another build than this machine's."""
    kernels = kernels or _native()
    if isinstance(kernels, str):
        return scaled_mm_ref(a, a_scales, a_global, b, b_scales, b_global, bias, k, out_dtype)
    if is_by_runs(a, a_global) or is_by_runs(b, b_global):
        each = functools.partial(scaled_mm, kernels=kernels)
        return multiply_by_runs(each, a, a_scales, a_global, b, b_scales, b_global, bias, k, out_dtype)
    known = all(scales is None or scales.dtype in _KIND for scales in (a_scales, b_scales))
    if not known or b_scales is None or b.ndim != 2 or a.ndim < 2 or not (bias is None or (bias.ndim == 1 and bias.dtype in _DENSE)):
        return _through_blas(kernels, a, a_scales, a_global, b, b_scales, b_global, bias, k, out_dtype)
    if a.ndim > 2:
        a_global = _rowwise(a_global, a)
        flat = None if a_scales is None else a_scales.reshape(-1, a_scales.shape[-1])
        rows = a.reshape(-1, a.shape[-1])
        out = scaled_mm(rows, flat, a_global, b, b_scales, b_global, bias, k, out_dtype, kernels=kernels)
        return out.view(*a.shape[:-1], b.shape[0])
    return _product(kernels, a, a_scales, a_global, b, b_scales, b_global, bias, k, out_dtype)


def _product(
    kernels: Kernels,
    a: Tensor,
    a_scales: Tensor | None,
    a_global: Tensor | None,
    b: Tensor,
    b_scales: Tensor,
    b_global: Tensor | None,
    bias: Tensor | None,
    k: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """Matrices only; the kernels write float32 or bf16."""
    if a_scales is None and (a.dtype not in _DENSE or a.stride(1) != 1):
        a = (a if a.dtype in _DENSE else a.float()).contiguous()
    m, n = a.shape[0], b.shape[0]
    a_kind = _KIND[a.dtype if a_scales is None else a_scales.dtype]
    if m > _FEW_ROWS and (kernels.vector_level < 2 or a_kind == 0):
        return _through_blas(kernels, a, a_scales, a_global, b, b_scales, b_global, bias, k, out_dtype)
    if a_scales is not None:
        a, a_scales = a.contiguous(), a_scales.contiguous()
    b, b_scales = b.contiguous(), b_scales.contiguous()
    a_global, b_global, bias = _contiguous(a_global), _contiguous(b_global), _contiguous(bias)
    out = a.new_empty((m, n), dtype=out_dtype if out_dtype in _DENSE else torch.float32)  # not torch.empty: a default device may be set
    kernels.scaled_mm(
        _pack_product(
            a.data_ptr(),
            0 if a_scales is None else a_scales.data_ptr(),
            0 if a_global is None else a_global.data_ptr(),
            b.data_ptr(),
            b_scales.data_ptr(),
            0 if b_global is None else b_global.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            a_kind,
            _KIND[b_scales.dtype],
            0 if bias is None else _KIND[bias.dtype],
            _KIND[out.dtype],
            m,
            n,
            k,
            2 * b.shape[1],
            a.stride(0) if a_scales is None else 2 * a.shape[1],
            a_global is not None and a_global.ndim == 1,
            b_global is not None and b_global.ndim == 1,
            torch.get_num_threads(),
        )
    )
    return out if out.dtype is out_dtype else out.to(out_dtype)


def scaled_grouped_mm(
    a: Tensor,
    a_scales: Tensor | None,
    a_global: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    b_global: Tensor | None,
    offs: Tensor,
    k: int,
    out_dtype: torch.dtype,
    *,
    kernels: Kernels | str | None = None,
) -> Tensor:
    """`scaled_grouped_mm_ref` up to the order of its float32 sums."""
    out = a.new_zeros((a.shape[0], b.shape[-2]), dtype=out_dtype)
    start = 0
    for group, end in enumerate(offs.tolist()):
        rows = slice(start, end)
        start = end
        if rows.start == rows.stop:
            continue
        out[rows] = scaled_mm(
            a[rows],
            None if a_scales is None else a_scales[rows],
            a_global if a_global is None or a_global.ndim == 0 else a_global[rows],
            b[group],
            None if b_scales is None else b_scales[group],
            None if b_global is None else b_global[group],
            None,
            k,
            out_dtype,
            kernels=kernels,
        )
    return out


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _rowwise(a_global: Tensor | None, a: Tensor) -> Tensor | None:
    """The scales of A (..., M, K) for its rows laid end to end: one number, or one a row."""
    if a_global is None or a_global.ndim == 0:
        return a_global
    per_row = a_global if a_global.ndim == a.ndim - 1 else a_global[..., None]
    return per_row.expand(a.shape[:-1]).reshape(-1)


def _through_blas(
    kernels: Kernels,
    a: Tensor,
    a_scales: Tensor | None,
    a_global: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    b_global: Tensor | None,
    bias: Tensor | None,
    k: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """The reference on operands that the kernels decoded: any batch, any bias, float32 throughout."""
    left = a.float() if a_scales is None else _dequantize(kernels, a, a_scales, k)
    if b_scales is None:
        return scaled_mm_ref(left, None, a_global, b, None, b_global, bias, k, out_dtype)
    step = max(1, _DECODED_AT_ONCE // max(k, 1)) if b.ndim == 2 else b.shape[-2]
    parts: list[Tensor] = []
    for rows in (slice(first, first + step) for first in range(0, b.shape[-2], step)):
        right = _dequantize(kernels, b[..., rows, :], b_scales[..., rows, :], k)
        per_row = b_global is not None and b_global.ndim == b.ndim - 1
        part_global = b_global[..., rows] if b_global is not None and per_row else b_global
        part_bias = None if bias is None else bias[..., rows]
        parts.append(scaled_mm_ref(left, None, a_global, right, None, part_global, part_bias, k, out_dtype))
    return torch.cat(parts, dim=-1) if parts else left.new_zeros((*left.shape[:-1], 0), dtype=out_dtype)


def _dequantize(kernels: Kernels, codes: Tensor, scales: Tensor, k: int) -> Tensor:
    """`dequantize_ref` without the global scale, first `k` columns."""
    codes, scales = codes.contiguous(), scales.contiguous()
    out = codes.new_empty((*codes.shape[:-1], k), dtype=torch.float32)
    rows = prod(codes.shape[:-1])
    kernels.dequantize(codes.data_ptr(), scales.data_ptr(), _DECODED[scales.dtype], rows, 2 * codes.shape[-1], k, out.data_ptr())
    return out


def quantize(
    x: Tensor,
    config: QuantConfig,
    *,
    axis: int = -1,
    seed: Tensor | None = None,
    kernels: Kernels | str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_ref`, bit for bit. `kernels`: another build than this machine's."""
    kernels = kernels or _native()
    if isinstance(kernels, str):
        return quantize_ref(x, config, axis=axis, seed=seed)
    if axis == -2:
        x = x.mT
    if config.hadamard:
        x = hadamard(x, config.hadamard, kernels=kernels)
    x = (x if x.dtype in _DENSE else x.float()).contiguous()
    (*batch, rows, k), fmt = x.shape, config.fmt
    padded = round_up(k, config.k_multiple)
    codes = x.new_empty((*batch, rows, padded // 2), dtype=torch.uint8)
    scales = x.new_empty((*batch, rows, padded // fmt.block), dtype=fmt.scale_dtype)
    decode = x.new_empty((*batch, rows) if config.global_scale == "row" else batch, dtype=torch.float32)
    kernels.quantize(
        _pack_quantize(
            x.data_ptr(),
            codes.data_ptr(),
            scales.data_ptr(),
            decode.data_ptr(),
            prod(batch),
            rows,
            k,
            padded,
            _KIND[x.dtype],
            _KIND[fmt.scale_dtype],
            _RULE["eden" if config.rounding is Rounding.EDEN else config.scale_rule],
            _GRANULARITY[config.global_scale],
            16 if config.is_tile else 1,
            config.rounding is Rounding.STOCHASTIC,
            0 if seed is None else int(seed),
            config.static_amax or 0.0,
        )
    )
    return codes, scales, decode


def hadamard(x: Tensor, size: int, *, kernels: Kernels | str | None = None) -> Tensor:
    """`hadamard_ref` of `x` (..., K), bit for bit, K padded with zeros to a multiple of `size`. `kernels`: as above."""
    kernels = kernels or _native()
    k = x.shape[-1]
    padded = round_up(k, size)
    if isinstance(kernels, str) or x.dtype not in _DENSE:
        return hadamard_ref(F.pad(x, (0, padded - k)), size)
    x = x.contiguous()
    out = x.new_empty((*x.shape[:-1], padded))
    kernels.hadamard(x.data_ptr(), out.data_ptr(), _KIND[x.dtype], prod(x.shape[:-1]), k, padded, size)
    return out
