"""The Hopper kernel that decodes in registers, compiled for sm_90: it fits, spills nothing, and no register is written while it is read."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from fp4compile.codegen.kernels.hopper_tiles import REGISTER_TILES, RegisterTile, choose_register_tile
from fp4compile.codegen.kernels.launch_register import multiply_register
from fp4compile.codegen.kernels.register_mm import register_mm_kernel
from tests.codegen.kernels.cross_compiled import launches_of
from tests.codegen.kernels.sass import Instruction, MachineCode, machine_code

SHARED_MEMORY, REGISTERS = 227 * 1024, 65536
N, K = 512, 512
KINDS = ["bfloat16", "float16", "scaled"]


def compiled(kind: str, tile: RegisterTile, monkeypatch: pytest.MonkeyPatch, folder: Path, k: int = K) -> MachineCode:
    dtype = torch.float16 if kind == "float16" else torch.bfloat16
    codes = torch.zeros(N // 16, k // 128, 1024, dtype=torch.uint8)
    scales = torch.zeros(N // 16, k // 128, 128, dtype=torch.uint8).view(torch.float8_e4m3fn)
    x, out = torch.zeros(300, k, dtype=dtype), torch.zeros(300, N, dtype=torch.float32 if kind == "scaled" else dtype)
    last = (torch.ones(300), torch.ones(N), torch.zeros(N)) if kind == "scaled" else (None, torch.ones(()), None)
    launches = launches_of(lambda: multiply_register(x, codes, scales, *last, out, tile), monkeypatch)
    return machine_code(next(each for each in launches if each.kernel is register_mm_kernel).compile(90), folder)


def written_in_flight(code: MachineCode) -> list[Instruction]:
    """Instructions that write a register which a `wgmma` not yet waited for reads (https://github.com/triton-lang/triton/issues/9433)."""
    reading: set[int] = set()
    found = []
    for each in code.instructions:
        if not isinstance(each, Instruction):
            continue
        if each.base == "HGMMA":
            left = re.match(r"R(\d+)", each.operands.split(",")[1].strip())
            assert left, "the left operand comes from registers"
            reading |= set(range(int(left[1]), int(left[1]) + 4))
        elif each.name.startswith("WARPGROUP.DEPBAR"):
            reading.clear()
        elif reading and not each.base.startswith(("ST", "BAR", "SYNCS", "BRA", "UTMA")):
            to = re.match(r"\s*(?:P\d+\s*,\s*)?R(\d+)", each.operands)
            width = 4 if ".128" in each.name else 2 if ".64" in each.name or "WIDE" in each.name else 1
            if to and reading & set(range(int(to[1]), int(to[1]) + width)):
                found.append(each)
    return found


@pytest.mark.parametrize(("tile", "kind"), [(tile, KINDS[i % 3]) for i, tile in enumerate(REGISTER_TILES)], ids=str)
def test_fits_spills_nothing_and_writes_no_register_in_flight(
    tile: RegisterTile, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code = compiled(kind, tile, monkeypatch, tmp_path)
    assert code.local == 0 and code.stack <= 8  # two numbers that are computed once may wait there
    assert code.shared <= SHARED_MEMORY
    assert not written_in_flight(code)
    loop = code.main_loop()
    assert loop["HGMMA"] == 8 and loop["STS"] == loop["SHFL"] == loop["LDL"] == loop["STL"] == 0  # nothing decoded moves between threads
    assert loop.total() <= (260 if kind == "float16" else 200)  # for the 64 codes of a thread; float16 has its own place for a magnitude


def test_splits_of_k_spill_nothing_either(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The wgrad of a narrow layer: few tiles, many tokens."""
    tile = choose_register_tile(640, 640, 65536, 132)
    code = compiled("bfloat16", tile, monkeypatch, tmp_path, k=512 * tile.splits)
    assert tile.splits == 8 and code.local == 0 and code.stack <= 32 and code.shared <= SHARED_MEMORY
    assert not written_in_flight(code)


def test_the_check_finds_a_register_that_is_written_too_early() -> None:
    def code(*lines: tuple[str, str]) -> MachineCode:
        instructions = tuple(Instruction(name=name, operands=operands) for name, operands in lines)
        return MachineCode(registers=1, stack=0, local=0, shared=0, tensor_memory=0, warps=4, instructions=instructions)

    product, wait = ("HGMMA.64x64x16.F32.BF16", " R24, R64, gdesc[UR12], R24, gsb0"), ("WARPGROUP.DEPBAR.LE", " gsb0, 0x0")
    late, early = ("LOP3.LUT", " R66, R1, R2, R3, 0xc0, !PT"), ("LDS.128", " R60, [R8]")
    assert not written_in_flight(code(product, wait, late))
    assert not written_in_flight(code(product, early, wait))
    assert len(written_in_flight(code(product, late, wait))) == 1
    assert len(written_in_flight(code(product, ("LDS.128", " R61, [R8]"), wait))) == 1
