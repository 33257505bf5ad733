"""Which kernel computes what where: one tuple, asked in order."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from fp4compile.codegen.formats import Layout
from fp4compile.codegen.kernel_spec import KernelSpec, Unsupported
from fp4compile.codegen.known_bad import Feature
from fp4compile.codegen.target import Target

_PRODUCTS: Final = ("scaled_mm", "scaled_grouped_mm")


def _any_operands(spec: KernelSpec) -> bool:
    return True


def _runs(spec: KernelSpec) -> bool:
    return any(config is not None and config.by_runs for config in (spec.lhs, spec.rhs))


def _nvfp4_weight_only(spec: KernelSpec) -> bool:
    return (
        not _runs(spec)
        and spec.lhs is None
        and spec.rhs is not None
        and spec.rhs.format == "nvfp4"
        and spec.dtype in (torch.bfloat16, torch.float16)
    )


def _nvfp4_weight(spec: KernelSpec) -> bool:
    halves = (torch.bfloat16, torch.float16) if spec.lhs is None else (torch.bfloat16, torch.float16, torch.float32)
    left = spec.lhs is None or spec.lhs.format in ("nvfp4", "mxfp4")
    return not _runs(spec) and left and spec.rhs is not None and spec.rhs.format == "nvfp4" and spec.dtype in halves


def _same_hardware_format(spec: KernelSpec) -> bool:
    return spec.lhs is not None and spec.rhs is not None and spec.lhs.format == spec.rhs.format and spec.rhs.fmt.in_hardware


@dataclass(frozen=True, kw_only=True)
class KernelFamily:
    """Kernels behind one name. A family reads operands in the layouts it names, and plain ones too, for not every value has a choice."""

    name: str  # as reports print it
    device_type: str
    ops: tuple[str, ...]
    folder: str  # of its sources, below this package
    ending: str
    capabilities: range | tuple[int, ...] = range(1000)  # 10 * major + minor
    takes: Callable[[KernelSpec], bool] = _any_operands
    a_layout: Layout = Layout.PLAIN
    b_layout: Layout = Layout.PLAIN
    relies_on: frozenset[Feature] = frozenset()  # what its kernels ask of their compiler that some version of it gets wrong
    search: str = ""  # module whose function `search(spec, m, n, k, device)` records the fastest tile, see `tuning.py`

    def supports(self, spec: KernelSpec, target: Target) -> bool:
        here = target.device_type == self.device_type and target.capability in self.capabilities
        return here and spec.op in self.ops and self.takes(spec)


FAMILIES: Final = (
    KernelFamily(name="cpu", device_type="cpu", ops=_PRODUCTS, folder="cpu", ending=".cpp"),
    KernelFamily(
        name="triton weight-only", device_type="cuda", ops=("scaled_mm",), folder="kernels", ending=".py",
        capabilities=range(80, 100), takes=_nvfp4_weight_only, b_layout=Layout.TILED, search="fp4compile.codegen.kernels.search_decode",
        relies_on=frozenset({Feature.CHAINED_DOTS}),
    ),
    KernelFamily(
        name="triton tcgen05", device_type="cuda", ops=_PRODUCTS, folder="kernels", ending=".py", capabilities=(100, 103),
        takes=_same_hardware_format, a_layout=Layout.SWIZZLED, b_layout=Layout.SWIZZLED,
        relies_on=frozenset({Feature.E4M3_SCALED_DOT, Feature.WARP_SPECIALIZATION}), search="fp4compile.codegen.kernels.search_native",
    ),
    KernelFamily(
        name="triton mma.sync", device_type="cuda", ops=_PRODUCTS, folder="kernels", ending=".py", capabilities=(120, 121),
        takes=_same_hardware_format, a_layout=Layout.SWIZZLED, b_layout=Layout.SWIZZLED,
        relies_on=frozenset({Feature.E4M3_SCALED_DOT}), search="fp4compile.codegen.kernels.search_native",
    ),
    KernelFamily(
        name="triton hopper", device_type="cuda", ops=_PRODUCTS, folder="kernels", ending=".py", capabilities=(90,), takes=_nvfp4_weight,
        b_layout=Layout.TILED, search="fp4compile.codegen.kernels.search_decode",
    ),
    KernelFamily(name="triton emulation", device_type="cuda", ops=_PRODUCTS, folder="kernels", ending=".py"),
)  # fmt: skip


def kernel_for(spec: KernelSpec, target: Target) -> str | Unsupported:
    """Name of the family that will run `spec` on `target`, or the reason why none does."""
    foreign = [config.format for config in (spec.lhs, spec.rhs) if config is not None and not config.fmt.in_hardware]
    if foreign and target.has_fp4_mma and spec.lhs is not None and spec.rhs is not None:
        return Unsupported(
            reason=f"no tensor core multiplies {foreign[0]} blocks, those of {target.name} included; "
            'use precision = "w4a16", which decodes them, or format = "nvfp4"'
        )
    if _runs(spec) and (reason := _why_not_by_runs(spec, target)):
        return Unsupported(reason=f'{reason}; use global_scale = "row"')
    family = _family_for(spec, target)
    return family.name if family else Unsupported(reason=f"no kernel for {spec.op} on {target.name}")


def _why_not_by_runs(spec: KernelSpec, target: Target) -> str:
    """Empty where a product with a global scale each 1x128 is computed."""
    if spec.op != "scaled_mm":
        return "a global scale each 1x128 is multiplied in plain and batched products, not in grouped ones"
    if spec.lhs is None or spec.rhs is None:
        return "a global scale each 1x128 needs both operands in 4 bits"
    if {spec.lhs.format, spec.rhs.format} != {"nvfp4"}:
        return "a global scale each 1x128 needs both operands in nvfp4"
    if target.has_fp4_mma:
        return f"no tensor core scales a sum each 1x128, those of {target.name} included"
    return ""


def layouts_for(spec: KernelSpec, target: Target) -> tuple[Layout, Layout]:
    """The layouts in which the family that runs `spec` reads A and B fastest."""
    family = _family_for(spec, target)
    return (family.a_layout, family.b_layout) if family else (Layout.PLAIN, Layout.PLAIN)


def relied_on(names: Iterable[str]) -> frozenset[Feature]:
    """What the families of these names rely on; names of no family count for nothing."""
    wanted = set(names)
    return frozenset().union(*(family.relies_on for family in FAMILIES if family.name in wanted))


def search_tiles(spec: KernelSpec, target: Target, m: int, n: int, k: int, device: torch.device) -> bool:
    """Let the family that runs `spec` search its tiles for one product; False where it has none to choose from."""
    family = _family_for(spec, target)
    if family is None or not family.search:
        return False
    importlib.import_module(family.search).search(spec, m, n, k, device)
    return True


def families_on(target: Target) -> list[str]:
    """Names of all families that may run something on `target`."""
    return [f.name for f in FAMILIES if f.device_type == target.device_type and target.capability in f.capabilities]


def _family_for(spec: KernelSpec, target: Target) -> KernelFamily | None:
    return next((family for family in FAMILIES if family.supports(spec, target)), None)


def sources_of(names: Iterable[str]) -> dict[str, str]:
    """File name -> text of the kernels behind these family names."""
    wanted = set(names)
    found: dict[str, str] = {}
    for family in FAMILIES:
        if family.name in wanted:
            files = (Path(__file__).parent / family.folder).glob("*" + family.ending)
            found.update({file.name: file.read_text() for file in sorted(files) if file.name != "__init__.py"})
    return found
