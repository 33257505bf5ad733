"""Prints what the compiler made of the native Blackwell products: `python tests/perf/sass_report.py [--format mxfp4] [--capability 103]`.

No GPU is needed: kernels are compiled for one and their machine code is read. The loop is the one that multiplies; where warps are
specialized, other warps load for it. A turn of it must wait for the tensor core and, on tiles for few rows, for the weights from memory:
"turn" is how many clocks by data-sheet rates, and "issue" the share of them in which the busiest scheduler issues. Both are estimates;
below 100%, instructions are not what the loop waits for.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import pytest
import triton
from tabulate import tabulate

from fp4compile.codegen.formats import FORMATS
from fp4compile.codegen.kernels.native_tiles import ARCHITECTURES, TCGEN05, Architecture, NativeTile
from tests.codegen.kernels.cross_compiled import launches_of
from tests.codegen.kernels.native_cases import USUAL, native_product
from tests.codegen.kernels.sass import MachineCode, machine_code, multiplications

HEADERS = (
    "target", "tile", "format", "block", "warps", "regs", "stack", "smem KB", "tmem", "loop", "MMA", "scale copies", "smem reads",
    "MMA/loop", "turn (est.)", "issue (est.)",
)  # fmt: skip


def row(architecture: Architecture, tile: NativeTile, fmt: str, capability: int, code: MachineCode) -> tuple[object, ...]:
    loop = code.main_loop()
    mma, total = multiplications(loop), loop.total()
    # A warp of tcgen05 issues for the whole program; under mma.sync each of four schedulers issues for a quarter of the warps.
    schedulers_share = 1 if architecture is TCGEN05 else code.warps / 4
    products = mma * (tile.block_r * tile.block_c * 64 if architecture is TCGEN05 else code.warps * 16 * 8 * 64)
    streamed = tile.block_r * tile.block_k * FORMATS[fmt].bits_per_value / 8 / architecture.bytes_from_memory if tile.swapped else 0
    turn = max(products / architecture.multiply_adds, streamed)
    return (
        f"sm_{capability}", tile.name, fmt, f"{tile.block_r}x{tile.block_c}x{tile.block_k}", code.warps, code.registers, code.stack,
        f"{code.shared / 1024:.0f}", code.tensor_memory or "", total, mma, loop["UTCCP"] or "", loop["LDSM"] + loop["LDS"] or "",
        f"{mma / total:.0%}", f"{turn:.0f}", f"{total * schedulers_share / turn:.0%}",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--format", choices=("nvfp4", "mxfp4"), default="nvfp4")
    parser.add_argument("--capability", type=int, help="only this target; otherwise the first of each generation")
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for architecture in ARCHITECTURES:
            capability = asked.capability or architecture.capabilities[0]
            if capability not in architecture.capabilities:
                continue
            for tile in architecture.tiles:
                launch = launches_of(native_product(architecture, tile, asked.format, USUAL), patch)[0]
                rows.append(row(architecture, tile, asked.format, capability, machine_code(launch.compile(capability), Path(folder))))
    sys.stdout.write(f"Triton {triton.__version__}\n{tabulate(rows, HEADERS, tablefmt='github')}\n")


if __name__ == "__main__":
    main()
