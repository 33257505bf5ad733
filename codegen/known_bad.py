"""Versions of Triton and torch that are known to compile wrong code for a device, as rows of one table.

A row names what breaks. It stops a compilation only where a kernel family that serves the target relies on that; elsewhere it is worth
knowing, and `fp4compile doctor` prints it. Versions newer than all that were tried are named there too, and never stopped.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from fp4compile.codegen.errors import Fp4CompileError
from fp4compile.codegen.target import Target

# Oldest and newest minor version that the tests ran with.
TESTED: Final = {"torch": ("2.11", "2.13"), "triton": ("3.6", "3.9")}


class Feature(StrEnum):
    """What a kernel may ask of its compiler beyond loads, stores, arithmetic and one plain dot a turn."""

    E4M3_SCALED_DOT = "tl.dot_scaled with e4m3 scales"
    DECOMPOSED_E8M0_DOT = "tl.dot_scaled with e8m0 scales where the hardware has no such instruction"
    HALF_SCALED_DOT = "tl.dot_scaled of a 16-bit operand and an fp4 one"
    MN_PACKED_DOT = "tl.dot_scaled of operands packed along M or N"
    BATCHED_SCALED_DOT = "tl.dot_scaled of three-dimensional operands"
    CHAINED_DOTS = "two dots into one accumulator in one turn of a loop"
    MODIFIED_ACCUMULATOR = "an accumulator that is changed between the dots of a loop"
    WARP_SPECIALIZATION = "tl.range(warp_specialize=True)"
    SPECIALIZED_PLAIN_LOADS = "tl.range(warp_specialize=True) over loads that are not TMA"
    REGISTER_WGMMA = "a Hopper dot in flight whose left operand lies in registers"
    EAGER_ROUNDING = "Inductor's option emulate_precision_casts"  # for comparisons with eager mode
    INDUCTOR = "Inductor's own kernels"  # every compiled model has them, and no family of ours relies on them


@dataclass(frozen=True, kw_only=True)
class KnownBad:
    """Versions from `since` up to, but without, `until` (empty: none fixes it) of `package` on targets whose name starts with `targets`."""

    package: str
    since: str
    until: str
    targets: tuple[str, ...]
    feature: Feature
    symptom: str
    source: str

    def covers(self, target: Target, version: str) -> bool:
        if not version or not target.name.startswith(self.targets):
            return False
        return _numbers(self.since) <= _numbers(version) and not (self.until and _numbers(self.until) <= _numbers(version))

    def __str__(self) -> str:
        return f"{self.feature} {self.symptom} ({self.source})"


_TRITON: Final = "https://github.com/triton-lang/triton"
_HOPPER, _TCGEN05, _SM_120 = ("sm_90",), ("sm_100", "sm_103", "sm_110"), ("sm_12",)
_EMULATED: Final = ("sm_8", "sm_90")

KNOWN_BAD: Final = (
    KnownBad(
        package="triton", since="3.6", until="3.9", targets=_EMULATED, feature=Feature.E4M3_SCALED_DOT,
        symptom="crashes the compiler (3.6, 3.7) or spills", source=f"{_TRITON}/pull/9772",
    ),
    KnownBad(
        package="triton", since="3.6", until="3.8", targets=("sm_121",), feature=Feature.E4M3_SCALED_DOT,
        symptom="crashes the compiler", source=f"{_TRITON}/pull/10010",
    ),
    KnownBad(
        package="triton", since="3.6", until="3.7", targets=_SM_120, feature=Feature.HALF_SCALED_DOT,
        symptom="crashes the compiler", source=f"{_TRITON}/issues/9558",
    ),
    KnownBad(
        package="triton", since="3.8", until="3.9", targets=_SM_120, feature=Feature.MN_PACKED_DOT,
        symptom="gives wrong results", source=f"{_TRITON}/issues/11733",
    ),
    KnownBad(
        package="triton", since="3.8", until="3.9", targets=_SM_120, feature=Feature.BATCHED_SCALED_DOT,
        symptom="fails an assertion of the compiler", source=f"{_TRITON}/issues/11733",
    ),
    KnownBad(
        package="triton", since="3.6", until="3.9", targets=("sm_",), feature=Feature.DECOMPOSED_E8M0_DOT,
        symptom="takes the smallest scales, bytes 0 and 1, for zero", source=f"{_TRITON}/pull/11624",
    ),
    KnownBad(
        package="triton", since="3.6", until="3.9", targets=_TCGEN05, feature=Feature.CHAINED_DOTS,
        symptom="overlap and give wrong results on tiles of 64 rows or more", source=f"{_TRITON}/issues/10821",
    ),
    KnownBad(
        package="triton", since="3.6", until="3.8", targets=_TCGEN05, feature=Feature.MODIFIED_ACCUMULATOR,
        symptom="gives results that differ from run to run", source=f"{_TRITON}/issues/9871, {_TRITON}/issues/10590",
    ),
    KnownBad(
        package="triton", since="3.6", until="", targets=(*_HOPPER, *_SM_120), feature=Feature.WARP_SPECIALIZATION,
        symptom="fails in the compiler on plain matmul loops", source=f"{_TRITON}/issues/10284, {_TRITON}/issues/9728",
    ),
    KnownBad(
        package="triton", since="3.6", until="", targets=_TCGEN05, feature=Feature.SPECIALIZED_PLAIN_LOADS,
        symptom="gives wrong results", source=f"{_TRITON}/issues/8311",
    ),
    KnownBad(
        package="triton", since="3.6", until="", targets=_HOPPER, feature=Feature.REGISTER_WGMMA,
        symptom="reads registers that are already written again, with the ptxas (before CUDA 13.3) in Triton's wheels",
        source=f"{_TRITON}/issues/9433, {_TRITON}/pull/11781",
    ),
    KnownBad(
        package="triton", since="3.7", until="3.8", targets=("sm_",), feature=Feature.INDUCTOR,
        symptom="may mix up values where several strided slices are assigned, as in interleaved rotary embeddings",
        source="https://github.com/pytorch/pytorch/issues/193183",
    ),
    KnownBad(
        package="torch", since="2.11", until="2.13", targets=("cpu",), feature=Feature.INDUCTOR,
        symptom="may not compile where sizes change ('not declared in this scope'); the option assert_indirect_indexing=False helps",
        source="https://github.com/pytorch/pytorch/issues/187335",
    ),
    KnownBad(
        package="torch", since="2.11", until="2.13", targets=("cpu",), feature=Feature.EAGER_ROUNDING,
        symptom="changes nothing: what fused operators pass on stays float32", source="https://github.com/pytorch/pytorch/issues/185337",
    ),
)  # fmt: skip


class KnownBadVersion(Fp4CompileError, RuntimeError):
    template = "{where}: {package} {version} on {target} is known to be bad: {row}. {advice}"


class VersionTooOld(Fp4CompileError, RuntimeError):
    template = (
        "{where}: {package} {version} is older than all that this release works with; {oldest} or newer is needed. Upgrade {package}."
    )


class TritonMissing(Fp4CompileError, ImportError):
    template = "{where}: Triton is not installed, and the kernels for {target} are written in it. Run: pip install 'triton>={oldest}'"


@functools.cache
def installed(package: str) -> str:
    """Version of an importable package, empty where there is none. Nightly builds carry Triton under other distribution names."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        names = importlib.metadata.packages_distributions().get(package, ())
        return importlib.metadata.version(names[0]) if names else ""


def known_bad(target: Target) -> list[KnownBad]:
    """The rows that hold for `target` and the versions installed here."""
    return [row for row in KNOWN_BAD if row.covers(target, installed(row.package))]


def is_unknown(package: str, version: str) -> bool:
    """Whether `version` lies outside of what was tested."""
    low, high = TESTED[package]
    return not _numbers(low) <= _numbers(version)[:2] <= _numbers(high)


def is_too_old(package: str, version: str) -> bool:
    return _numbers(version)[:2] < _numbers(TESTED[package][0])


def check_versions(target: Target, relied_on: Collection[Feature], *, where: str) -> None:
    """Refuse a target on which the versions installed here compile wrong code for what its kernels rely on.

    Raises `TritonMissing`, `VersionTooOld` or `KnownBadVersion`. The CPU's kernels need none of the two.
    """
    if target.device_type == "cpu":
        return
    if not installed("triton"):
        raise TritonMissing(where=where, target=target.name, oldest=TESTED["triton"][0])
    for package, (oldest, _) in TESTED.items():
        if is_too_old(package, installed(package)):
            raise VersionTooOld(where=where, package=package, version=installed(package), oldest=oldest)
    for row in known_bad(target):
        if row.feature in relied_on:
            raise KnownBadVersion(
                where=where, package=row.package, version=installed(row.package), target=target.name, row=row, advice=_advice(row)
            )


def _advice(row: KnownBad) -> str:
    fixed = f"{row.package} {row.until} or newer" if row.until else f"{row.package} older than {row.since}"
    return f"Install {fixed}, or run on another device."


def _numbers(version: str) -> tuple[int, ...]:
    """(3, 7, 1) of "3.7.1+git5d6048aa"."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()
