"""Which kernel computes what where: one tuple, asked in order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fp4compile.codegen.kernel_spec import KernelSpec, Unsupported
from fp4compile.codegen.target import Target


@dataclass(frozen=True, kw_only=True)
class KernelFamily:
    name: str  # as reports print it
    device_type: str
    ops: tuple[str, ...]
    folder: str  # of its sources, below this package
    ending: str

    def supports(self, spec: KernelSpec, target: Target) -> bool:
        return target.device_type == self.device_type and spec.op in self.ops


FAMILIES: Final = (
    KernelFamily(name="cpu", device_type="cpu", ops=("scaled_mm", "scaled_grouped_mm"), folder="cpu", ending=".cpp"),
    KernelFamily(name="triton emulation", device_type="cuda", ops=("scaled_mm", "scaled_grouped_mm"), folder="kernels", ending=".py"),
)


def kernel_for(spec: KernelSpec, target: Target) -> str | Unsupported:
    """Name of the family that will run `spec` on `target`, or the reason why none does."""
    for family in FAMILIES:
        if family.supports(spec, target):
            return family.name
    return Unsupported(reason=f"no kernel for {spec.op} on {target.name}")


def sources_of(names: Iterable[str]) -> dict[str, str]:
    """File name -> text of the kernels behind these family names."""
    wanted = set(names)
    found: dict[str, str] = {}
    for family in FAMILIES:
        if family.name in wanted:
            files = (Path(__file__).parent / family.folder).glob("*" + family.ending)
            found.update({file.name: file.read_text() for file in sorted(files) if file.name != "__init__.py"})
    return found
