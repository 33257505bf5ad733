"""Search over the tiles of weight-only products with few rows of x, for `mode="max-autotune"`: what is right and fastest is recorded."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch
import triton
from torch import Tensor

from fp4compile.codegen import tuning
from fp4compile.codegen.errors import Fp4CompileError
from fp4compile.codegen.kernel_spec import KernelSpec
from fp4compile.codegen.kernels.decode_mm import NarrowTile, WideTile, choose_tile, decode_mm, supports, tile_weight
from fp4compile.codegen.timing import QUICK, copies_for, microseconds
from fp4compile.codegen.tuning import TuningKey

Tile = NarrowTile | WideTile
KINDS: tuple[type[NarrowTile], type[WideTile]] = (NarrowTile, WideTile)
_SHARED_MEMORY = 225_000  # bytes of an H100 that a wide tile may have
# float32 sums in another order differ by 2^-24 a term of random sign; another product differs by more than this.
_SAME = 1e-3


class WrongTile(Fp4CompileError, RuntimeError):
    template = "a tile gave another product: {tile}. It is not taken."


def key_of(m: int, n: int, padded_k: int, dtype: torch.dtype, tiled: bool) -> TuningKey:
    """What a launch asks for before it chooses by itself."""
    layout = "tiled" if tiled else "plain"
    return TuningKey(family=f"decode_mm {str(dtype).removeprefix('torch.')} {layout}", m=m, n=n, k=padded_k)


def search(spec: KernelSpec, m: int, n: int, k: int, device: torch.device) -> None:
    """Try every tile for x (m, k) and a tiled NVFP4 weight of `n` rows, both random, and record the fastest that is right."""
    major, minor = torch.cuda.get_device_capability(device)
    padded_k = -(-k // 128) * 128
    key = key_of(m, n, padded_k, spec.dtype, tiled=True)
    if supports(m, n, k, spec.dtype, 10 * major + minor) is not None or tuning.lookup(device, key, KINDS) is not None:
        return
    copies = copies_for(n * padded_k * 9 // 16, device)
    weights = [tile_weight(*_random_weight(n, padded_k, device, seed)) for seed in range(copies)]
    x = torch.randn(m, padded_k, device=device, generator=torch.Generator(device).manual_seed(m)).to(spec.dtype)  # not the user's numbers
    chosen = choose_tile(m, n, padded_k, True)
    expected = decode_mm(x, *weights[0], None, None, torch.float32, n=n, tile=chosen)

    def time(tile: Tile) -> float:
        found = decode_mm(x, *weights[0], None, None, torch.float32, n=n, tile=tile)
        if not (found - expected).norm() <= _SAME * expected.norm():
            raise WrongTile(tile=tile)
        return microseconds([partial(decode_mm, x, *w, None, None, spec.dtype, n=n, tile=tile) for w in weights], device, QUICK)

    failures = (triton.TritonError, RuntimeError, ValueError)
    tuning.search(device, key, dict.fromkeys((chosen, *candidates(m))), time, failures)


def candidates(m: int) -> Iterator[Tile]:
    """Tiles worth trying for `m` rows of x, a few dozen."""
    if m <= 16:
        columns = -(-m // 8)
        inner = ((1, 1), (2, 1), (1, 2))
        for (steps, rows), (warps_r, warps_k) in itertools.product(inner, ((2, 2), (1, 4), (1, 8), (1, 2), (2, 4))):
            yield NarrowTile(steps=steps, row_tiles=rows, column_tiles=columns, warps_r=warps_r, warps_k=warps_k)
    if m <= 4:
        return
    for block_m in sorted({min(max(16, 1 << (m - 1).bit_length()), most) for most in (64, 128)}):
        for (block_n, warps), stages, chunks in itertools.product(((64, 4), (128, 4), (128, 8), (256, 8)), (3, 4), (1, 2, 4)):
            spills = block_m >= 64 and (chunks == 4 or (block_n, warps) == (128, 4))
            if stages * chunks * (block_n * 72 + block_m * 256) <= _SHARED_MEMORY and not spills and not (block_m == 128 and chunks > 1):
                yield WideTile(block_n=block_n, block_m=block_m, chunks=chunks, stages=stages, warps=warps)


def _random_weight(n: int, k: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device, generator=generator)
    scales = torch.randint(16, 120, (n, k // 16), dtype=torch.uint8, device=device, generator=generator)
    return codes, scales.view(torch.float8_e4m3fn)
