"""Tiles of the sm_90 kernels written in Gluon, and the door to their launchers: Gluon is experimental, so only a launch imports it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import triton

from fp4compile.codegen.errors import Fp4CompileError


class GluonMissing(Fp4CompileError, ImportError):
    template = (
        "{where}: the kernels for sm_90 are written in Gluon, which Triton {found} does not have as they need it ({missing}). "
        "Install a Triton from 3.6 to 3.9."
    )


def gluon_launcher(name: Literal["launch_hopper", "launch_register", "launch_half_hopper"]) -> Any:
    """The module of that name beside this one. Raises `GluonMissing` where this Triton's Gluon is another one."""
    try:
        return importlib.import_module(f"fp4compile.codegen.kernels.{name}")
    except ImportError as error:
        raise GluonMissing(where=name, found=triton.__version__, missing=error) from error


@dataclass(frozen=True, kw_only=True)
class HopperTile:
    """`block_n` rows of the weight by `block_m` rows of x: stages of shared memory, warps that multiply and warps that decode.

    `registers` of each decoding thread, of `most_registers` a thread on average, which decodes a chunk in `parts`; k goes in `splits`.
    """

    block_n: int
    block_m: int
    x_stages: int
    code_stages: int
    warps: int
    decode_warps: int
    registers: int
    parts: int = 1
    most_registers: int | None = None
    w_stages: int = 2
    splits: int = 1

    def count(self, m: int, n: int) -> int:
        """How many of it an output (`m`, `n`) takes."""
        return -(-m // self.block_m) * -(-n // self.block_n)

    def options(self) -> dict[str, Any]:
        return {
            "BLOCK_N": self.block_n, "BLOCK_M": self.block_m, "X_STAGES": self.x_stages, "W_STAGES": self.w_stages,
            "CODE_STAGES": self.code_stages, "DECODE_WARPS": self.decode_warps, "DECODE_REGISTERS": self.registers, "PARTS": self.parts,
            "BAND": max(1, 2048 // self.block_m), "num_warps": self.warps, "maxnreg": self.most_registers, "enable_fp_fusion": False,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RegisterTile:
    """`groups` warpgroups of 64 rows of the weight by `block_m` rows of x: stages of shared memory, splits of k.

    `registers` of each thread that multiplies, of `most_registers` a thread on average. `early`: it starts while x is still permuted.
    """

    groups: int
    block_m: int
    stages: int
    registers: int
    most_registers: int | None = None
    splits: int = 1
    early: bool = True

    def count(self, m: int, n: int) -> int:
        """How many of it an output (`m`, `n`) takes."""
        return -(-m // self.block_m) * -(-n // (64 * self.groups))

    @property
    def programs_a_processor(self) -> int:
        """How many of its registers a multiprocessor has room for."""
        threads = 32 * 4 * (self.groups + 1)
        return 1 if self.most_registers is None else 65536 // (threads * self.most_registers)

    def options(self) -> dict[str, Any]:
        return {
            "BLOCK_M": self.block_m, "GROUPS": self.groups, "STAGES": self.stages, "MULTIPLY_REGISTERS": self.registers,
            "LOAD_REGISTERS": 24, "BAND": max(1, 2048 // self.block_m), "PDL": self.early, "num_warps": 4, "maxnreg": self.most_registers,
            "enable_fp_fusion": False,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class HalfTile:
    """`block_m` rows of A by `block_n` of B: stages of shared memory, registers of each thread that multiplies, rows that run together."""

    block_m: int = 128
    block_n: int = 256
    stages: int = 4
    registers: int = 232
    band: int = 2048

    def count(self, m: int, n: int) -> int:
        """How many of it an output (`m`, `n`) takes."""
        return -(-m // self.block_m) * -(-n // self.block_n)

    def options(self) -> dict[str, Any]:
        return {
            "BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "STAGES": self.stages, "MULTIPLY_REGISTERS": self.registers,
            "LOAD_REGISTERS": 24, "BAND": max(1, self.band // self.block_m), "num_warps": 4, "enable_fp_fusion": False,
        }  # fmt: skip


# The stages that fit into shared memory, and registers that neither kind of warp spills. `_SHORT_NARROW` fits twice.
_SHORT_NARROW: Final = HopperTile(
    block_m=64, block_n=128, x_stages=3, code_stages=2, warps=4, decode_warps=4, registers=112, most_registers=128
)  # fmt: skip
_SHORT: Final = HopperTile(block_m=64, block_n=256, x_stages=4, code_stages=2, warps=4, decode_warps=8, registers=160)
_TALL: Final = HopperTile(block_m=128, block_n=256, x_stages=3, code_stages=2, warps=8, decode_warps=4, registers=128, parts=2)
_LARGE: Final = HopperTile(block_m=256, block_n=128, x_stages=4, code_stages=2, warps=8, decode_warps=4, registers=128)
_MIDDLE: Final = HopperTile(block_m=128, block_n=128, x_stages=4, code_stages=4, warps=8, decode_warps=4, registers=128)
TILES: Final = (_SHORT_NARROW, _SHORT, _MIDDLE, _TALL, _LARGE)

# By rows of x: for weights of many rows, a whole multiprocessor to four warpgroups; for others, two or four smaller programs to each.
_WIDE_16: Final = RegisterTile(groups=4, block_m=16, stages=8, registers=112)
_WIDE_32: Final = RegisterTile(groups=4, block_m=32, stages=6, registers=112)
_WIDE_64: Final = RegisterTile(groups=4, block_m=64, stages=4, registers=112)
_WIDE_128: Final = RegisterTile(groups=4, block_m=128, stages=4, registers=112)
_SLIM_16: Final = RegisterTile(groups=1, block_m=16, stages=6, registers=104, most_registers=64)
_SLIM_32: Final = RegisterTile(groups=1, block_m=32, stages=4, registers=104, most_registers=64)
_SLIM_64: Final = RegisterTile(groups=2, block_m=64, stages=4, registers=104, most_registers=80)
_SLIM_128: Final = RegisterTile(groups=2, block_m=128, stages=5, registers=216)
_WIDE: Final = (_WIDE_16, _WIDE_32, _WIDE_64, _WIDE_128)
_SLIM: Final = (_SLIM_16, _SLIM_32, _SLIM_64, _SLIM_128)
REGISTER_TILES: Final = (*_WIDE, *_SLIM)
HALF_TILES: Final = (HalfTile(),)


def choose_hopper_tile(m: int, n: int, padded_k: int, processors: int) -> HopperTile:
    """The tile for `m` rows of x: what is decoded once should meet many, and splits of k where tiles are too few for `processors`."""
    many = n >= 100 * processors
    if m <= 64:
        tile = _SHORT if many else _SHORT_NARROW
    else:
        tile = _LARGE if m > 128 else _TALL if many else _MIDDLE
    return replace(tile, splits=_splits(tile.count(m, n), processors, padded_k))


def choose_register_tile(m: int, n: int, padded_k: int, processors: int) -> RegisterTile:
    """The tile for `m` rows of x, and splits of k where tiles are too few for `processors`.

    Sweeps over 28672x8192, 14336x4096 and 4096x4096 on an H100 80GB HBM3 (2026-11-22, Triton 3.6).
    """
    size = 0 if m <= 16 else 1 if m <= 32 else 2 if m <= 64 else 3
    tile = (_WIDE if n >= 155 * processors or m > 128 else _SLIM)[size]
    return replace(tile, splits=_splits(tile.count(m, n), processors * (2 if tile.groups == 1 else 1), padded_k))


def _splits(tiles: int, room: int, padded_k: int) -> int:
    """Of k, at least 512 of it each, so that `tiles` come near to filling `room`."""
    splits = 1
    while 2 * tiles * splits <= room and padded_k // (2 * splits) >= 512:
        splits *= 2
    return splits
