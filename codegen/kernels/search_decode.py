"""Search over the tiles of products with an NVFP4 weight, for `mode="max-autotune"`: the fastest that is right is recorded."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Final

import torch
import triton
from torch import Tensor

from fp4compile.codegen import tuning
from fp4compile.codegen.formats import Layout, round_up
from fp4compile.codegen.kernel_spec import KernelSpec
from fp4compile.codegen.kernels.decode_mm import KINDS, DecodeTile, NarrowTile, WideTile, choose_tile, decode_mm, key_of, supports
from fp4compile.codegen.kernels.hopper_tiles import HALF_TILES, REGISTER_TILES, TILES
from fp4compile.codegen.reference.layout import lay_out_ref, suits_tiles
from fp4compile.codegen.target import processors_of
from fp4compile.codegen.timing import QUICK, copies_for, microseconds

_SHARED_MEMORY: Final = 225_000  # bytes that a wide tile may have


def search(spec: KernelSpec, m: int, n: int, k: int, device: torch.device) -> None:
    """Try every tile for x (m, k) and an NVFP4 weight of `n` rows, both random, and record the fastest that is right."""
    dtype = spec.dtype if spec.lhs is None else torch.bfloat16  # a quantized operand is decoded to bfloat16 before
    major, minor = torch.cuda.get_device_capability(device)
    capability, processors = 10 * major + minor, processors_of(device)
    tiled = suits_tiles(n, k)
    padded_k = round_up(k, 128 if tiled else 16)
    key = key_of(m, n, padded_k, dtype, tiled)
    if supports(m, n, k, dtype, capability) is not None or tuning.lookup(device, key, KINDS) is not None:
        return
    layout = Layout.TILED if tiled else Layout.PLAIN
    copies = copies_for(n * padded_k * 9 // 16, device)
    weights = [lay_out_ref(*_random_weight(n, padded_k, device, seed), layout) for seed in range(copies)]
    x = torch.randn(m, padded_k, device=device, generator=torch.Generator(device).manual_seed(m)).to(dtype)  # not the user's numbers
    chosen = choose_tile(m, n, padded_k, tiled, capability, processors)
    expected = decode_mm(x, *weights[0], None, None, torch.float32, n=n, tile=chosen)

    def time(tile: DecodeTile) -> float:
        found = decode_mm(x, *weights[0], None, None, torch.float32, n=n, tile=tile)
        tuning.refuse_another_product(found, expected, tile)
        return microseconds([partial(decode_mm, x, *w, None, None, dtype, n=n, tile=tile) for w in weights], device, QUICK)

    every = dict.fromkeys((chosen, *candidates(m, padded_k, capability)))
    tuning.search(device, key, every, time, (triton.TritonError, RuntimeError, ValueError))


def candidates(m: int, padded_k: int, capability: int) -> Iterator[DecodeTile]:
    """Tiles worth trying for `m` rows of x: about twenty, for each takes seconds to compile."""
    if m <= 16:
        yield from _narrow(m)
    if 8 <= m <= 128 and capability == 80:  # on sm_90 it would leave a dot in flight with its left operand in registers
        yield from _wide(m)
    if m >= 8 and capability == 90:
        for tile, splits in itertools.product((*REGISTER_TILES, *(TILES if m > 32 else ())), (1, 2, 4)):
            suits = tile.block_m < max(2 * m, 17) and (m <= 4 * tile.block_m or tile.block_m >= 128)
            if suits and (splits == 1 or padded_k // splits >= 512):
                yield replace(tile, splits=splits)
        if m >= 512:
            yield from HALF_TILES


def _narrow(m: int) -> Iterator[NarrowTile]:
    steps_and_rows, warps = ((1, 1), (1, 2), (2, 1)), ((1, 4), (1, 8), (2, 2), (2, 4))
    for (steps, rows), (warps_r, warps_k) in itertools.product(steps_and_rows, warps):
        if (steps, warps_r) != (2, 2) and (rows, warps_k) != (2, 8):
            yield NarrowTile(steps=steps, row_tiles=rows, column_tiles=-(-m // 8), warps_r=warps_r, warps_k=warps_k)


def _wide(m: int) -> Iterator[WideTile]:
    rows = min(max(16, 1 << (m - 1).bit_length()), 128)
    for (block_n, warps), (stages, chunks) in itertools.product(((64, 4), (128, 4), (128, 8)), ((3, 1), (4, 1), (3, 2), (4, 2))):
        spills = rows >= 64 and (block_n, warps) == (128, 4)
        if stages * chunks * (block_n * 72 + rows * 256) <= _SHARED_MEMORY and not spills and not (rows == 128 and chunks > 1):
            yield WideTile(block_n=block_n, block_m=rows, chunks=chunks, stages=stages, warps=warps)


def _random_weight(n: int, k: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """Any codes (n, k/2), and scales (n, k/16) from 2^-5 to 240."""
    generator = torch.Generator(device).manual_seed(seed)
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device, generator=generator)
    scales = torch.randint(16, 120, (n, k // 16), dtype=torch.uint8, device=device, generator=generator)
    return codes, scales.view(torch.float8_e4m3fn)
