"""Tiles of the native block-scaled products as rows of a table, and the choice among them by shape.

Every row is compiled for its targets by the tests, which read the machine code: no spills, block-scaled MMA, TMA. None was timed: no such
GPU was at hand. `docs/blackwell.md` shows what the compiler made of each. The model behind the choice knows rates from data sheets only.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True, kw_only=True)
class NativeTile:
    """One way to launch `native_mm_kernel`. "Rows" fill the side of the MMA that has 128 of them, "columns" may be few."""

    name: str
    block_r: int
    block_c: int
    block_k: int
    warps: int
    stages: int
    parts: int = 1  # steps in which a tile is scaled and stored, so that float32 sums fit into registers
    persistent: bool = False
    specialized: bool = False  # other warps load and issue; adds warps. All loads of the k loop must then be TMA (triton issue 8311)
    one_sum: bool = True  # no second accumulator: 2 x 256 columns would fill the tensor memory
    swapped: bool = False  # rows are B, columns are A: few rows of A then cost no work on 128

    def options(self) -> dict[str, Any]:
        """Keyword arguments of a launch. Without FMA, for the epilogue multiplies and adds in two roundings."""
        return {
            "BLOCK_R": self.block_r, "BLOCK_C": self.block_c, "BLOCK_K": self.block_k, "STAGES": self.stages, "PARTS": self.parts,
            "PERSISTENT": self.persistent, "SPECIALIZED": self.specialized, "ONE_SUM": self.one_sum,
            "num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False,
        }  # fmt: skip

    def grouped_options(self) -> dict[str, Any]:
        """The same for `native_grouped_mm_kernel`, whose programs each compute one tile in one go."""
        fixed = ("PERSISTENT", "SPECIALIZED", "ONE_SUM")
        return {name: value for name, value in self.options().items() if name not in fixed}


@dataclass(frozen=True, kw_only=True, eq=False)  # compared and hashed as the one row it is, for every launch looks its plan up
class Architecture:
    """A generation with its tiles, and per SM and clock: multiply-adds, bytes that an SM takes in, bytes from memory. Estimates."""

    capabilities: tuple[int, ...]
    tiles: tuple[NativeTile, ...]
    multiply_adds: int
    bytes_in: int
    bytes_from_memory: int
    processors: int  # of its usual board, where none is asked
    shared_memory: int  # bytes a program may have

    def named(self, name: str) -> NativeTile:
        return next(tile for tile in self.tiles if tile.name == name)


# B200: 9 PFLOP/s dense FP4, 8 TB/s, 148 SMs at 1.85 GHz.
TCGEN05: Final = Architecture(
    capabilities=(100, 103), multiply_adds=16384, bytes_in=64, bytes_from_memory=29, processors=148, shared_memory=232_448,
    tiles=(
        NativeTile(
            name="128x256", block_r=128, block_c=256, block_k=256, warps=8, stages=3, parts=4, persistent=True, specialized=True,
        ),
        NativeTile(
            name="128x128", block_r=128, block_c=128, block_k=256, warps=8, stages=4, parts=2, persistent=True, specialized=True,
            one_sum=False,
        ),
        NativeTile(name="128x256 plain", block_r=128, block_c=256, block_k=256, warps=8, stages=4, parts=4),
        NativeTile(name="128x128 split", block_r=128, block_c=128, block_k=256, warps=8, stages=4, parts=2),
        NativeTile(name="128 rows", block_r=128, block_c=128, block_k=256, warps=8, stages=4, parts=2, swapped=True),
        NativeTile(name="64 rows", block_r=128, block_c=64, block_k=256, warps=4, stages=4, swapped=True),
        NativeTile(name="32 rows", block_r=128, block_c=32, block_k=256, warps=4, stages=5, swapped=True),
        NativeTile(name="16 rows", block_r=128, block_c=16, block_k=256, warps=4, stages=5, swapped=True),
        NativeTile(name="16 rows deep", block_r=128, block_c=16, block_k=512, warps=4, stages=4, swapped=True),
    ),
)  # fmt: skip
# RTX 5090: 1.68 PFLOP/s dense FP4, 1.8 TB/s, 170 SMs at 2.4 GHz.
MMA_SYNC: Final = Architecture(
    capabilities=(120, 121), multiply_adds=2048, bytes_in=32, bytes_from_memory=4, processors=170, shared_memory=101_376,
    tiles=(
        NativeTile(name="128x128", block_r=128, block_c=128, block_k=256, warps=8, stages=3),
        NativeTile(name="128 rows", block_r=128, block_c=128, block_k=256, warps=8, stages=3, swapped=True),
        NativeTile(name="64 rows", block_r=128, block_c=64, block_k=256, warps=8, stages=4, swapped=True),
        NativeTile(name="32 rows", block_r=128, block_c=32, block_k=256, warps=4, stages=4, swapped=True),
        NativeTile(name="16 rows", block_r=128, block_c=16, block_k=256, warps=4, stages=4, swapped=True),
        NativeTile(name="8 rows", block_r=128, block_c=8, block_k=256, warps=4, stages=4, swapped=True),
    ),
)  # fmt: skip
ARCHITECTURES: Final = (TCGEN05, MMA_SYNC)

_PROGRAM_CLOCKS: Final = 2000  # start, first loads, end of a program: an estimate
_TURN_CLOCKS: Final = 300  # waits of a turn where the warps that multiply also load: an estimate
_SPLIT_CLOCKS: Final = 4000  # second launch that sums the parts: an estimate
_MOST_SPLITS: Final = 16
FEW_ROWS: Final = 64


def architecture_of(capability: int) -> Architecture | None:
    """The generation with FP4 tensor cores that `capability` (10 * major + minor) belongs to."""
    return next((a for a in ARCHITECTURES if capability in a.capabilities), None)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A tile for one product, and into how many parts its k is split."""

    tile: NativeTile
    splits: int


@functools.lru_cache(maxsize=4096)
def plan(architecture: Architecture, m: int, n: int, k: int, *, batch: int = 1, processors: int = 0, may_split: bool = True) -> Plan:
    """The plan of least estimated time for `batch` products of (m, k) and (n, k) on `processors` SMs; of equal ones that which loads least.

    Few rows never fill the side of 128: that saves no time while weights stream from memory, but shared memory and energy.
    """
    sms = processors or architecture.processors
    plans = [
        Plan(tile=tile, splits=splits)
        for tile in architecture.tiles
        if tile.swapped or m > FEW_ROWS
        for splits in range(1, 1 + (_MOST_SPLITS if may_split and not tile.persistent else 1))
        if splits == 1 or splits <= -(-k // tile.block_k)
    ]
    return min(plans, key=lambda p: (clocks(architecture, p, m, n, k, batch, sms), _loaded_rows(p.tile, m, n), p.splits))


def _loaded_rows(tile: NativeTile, m: int, n: int) -> int:
    """Rows of both operands that all programs load together."""
    rows, columns = (n, m) if tile.swapped else (m, n)
    return -(-rows // tile.block_r) * -(-columns // tile.block_c) * (tile.block_r + tile.block_c)


def clocks(architecture: Architecture, plan: Plan, m: int, n: int, k: int, batch: int, processors: int) -> float:
    """Estimated clocks: waves of programs, or the bytes of both operands from memory, whichever takes longer."""
    tile = plan.tile
    rows, columns = (n, m) if tile.swapped else (m, n)
    tiles = batch * -(-rows // tile.block_r) * -(-columns // tile.block_c)
    turns = -(-k // (tile.block_k * plan.splits))
    multiply = tile.block_r * tile.block_c * tile.block_k / architecture.multiply_adds
    load = (tile.block_r + tile.block_c) * tile.block_k * 0.5625 / architecture.bytes_in
    waves = -(-tiles * plan.splits // processors)
    started = 1 if tile.persistent else waves
    turn = max(multiply, load) + (0 if tile.specialized else _TURN_CLOCKS)
    compute = waves * turns * turn + started * _PROGRAM_CLOCKS
    memory = batch * (m + n) * k * 0.5625 / (architecture.bytes_from_memory * processors) + _PROGRAM_CLOCKS
    if plan.splits > 1:
        # float32 parts are written and read once.
        memory += 8 * plan.splits * batch * m * n / (architecture.bytes_from_memory * processors)
    return max(compute, memory) + (_SPLIT_CLOCKS if plan.splits > 1 else 0)
