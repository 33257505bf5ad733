"""Machine code of a compiled kernel, as `nvdisasm` prints it: what it uses, which instructions it has, what its multiplying loop does."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MMA = re.compile(r"UTC[A-Z]*MMA|OMMA|QMMA|[HI]G?MMA")
_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][A-Z0-9_.]*)(.*?);", re.MULTILINE)
_LABEL = re.compile(r"^(\.L_x_\d+):")


@dataclass(frozen=True, kw_only=True)
class Instruction:
    name: str  # with its modifiers
    operands: str

    @property
    def base(self) -> str:
        return self.name.split(".")[0]


@dataclass(frozen=True, kw_only=True)
class MachineCode:
    """A cubin read back. `shared` and `tensor_memory` are what Triton asks for; the latter in columns of 512."""

    registers: int
    stack: int
    local: int
    shared: int
    tensor_memory: int
    warps: int
    instructions: tuple[Instruction | str, ...]  # a string is a label

    def count(self, base: str) -> int:
        return sum(isinstance(i, Instruction) and i.base == base for i in self.instructions)

    def main_loop(self) -> Counter[str]:
        """Instructions by base name of the smallest loop with the most MMAs in it; empty where no loop multiplies."""
        where = {label: i for i, label in enumerate(self.instructions) if isinstance(label, str)}
        bodies = []
        for end, instruction in enumerate(self.instructions):
            target = re.search(r"\.L_x_\d+", instruction.operands) if isinstance(instruction, Instruction) else None
            if target and instruction.base == "BRA" and where.get(target.group(), end) < end:
                body = self.instructions[where[target.group()] : end + 1]
                bodies.append(Counter(i.base for i in body if isinstance(i, Instruction)))
        multiplying = [body for body in bodies if multiplications(body)]
        return min(multiplying, key=lambda body: body.total(), default=Counter())


def multiplications(body: Counter[str]) -> int:
    return sum(count for name, count in body.items() if MMA.fullmatch(name))


def machine_code(compiled: Any, folder: Path) -> MachineCode:
    """Of what `triton.compile` returned; the cubin is written into `folder`."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    resources = _run("cuobjdump", "-res-usage", str(cubin))
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", resources)}
    metadata = compiled.metadata
    return MachineCode(
        registers=used["REG"], stack=used["STACK"], local=used["LOCAL"], shared=metadata.shared,
        tensor_memory=getattr(metadata, "tmem_size", None) or 0, warps=metadata.num_warps,
        instructions=tuple(_read(_run("nvdisasm", str(cubin)))),
    )  # fmt: skip


def _run(program: str, *arguments: str) -> str:
    done = subprocess.run([BIN / program, *arguments], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def _read(text: str) -> list[Instruction | str]:
    found: list[Instruction | str] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            found.append(label.group(1))
        elif instruction := _LINE.match(line):
            found.append(Instruction(name=instruction.group(1), operands=instruction.group(2)))
    return found
