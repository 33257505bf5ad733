"""Which kernel computes what where: one tuple, asked in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fp4compile.codegen.kernel_spec import KernelSpec, Unsupported
from fp4compile.codegen.target import Target


@dataclass(frozen=True, kw_only=True)
class KernelFamily:
    name: str  # as reports print it
    device_type: str
    ops: tuple[str, ...]

    def supports(self, spec: KernelSpec, target: Target) -> bool:
        return target.device_type == self.device_type and spec.op in self.ops


FAMILIES: Final = (
    KernelFamily(name="cpu", device_type="cpu", ops=("scaled_mm", "scaled_grouped_mm")),
    KernelFamily(name="triton emulation", device_type="cuda", ops=("scaled_mm", "scaled_grouped_mm")),
)


def kernel_for(spec: KernelSpec, target: Target) -> str | Unsupported:
    """Name of the family that will run `spec` on `target`, or the reason why none does."""
    for family in FAMILIES:
        if family.supports(spec, target):
            return family.name
    return Unsupported(reason=f"no kernel for {spec.op} on {target.name}")
