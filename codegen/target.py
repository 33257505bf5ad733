"""Machines as rows of a table, and the only functions that ask a device what it is."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from fp4compile.codegen.errors import UnsupportedDevice


@dataclass(frozen=True, kw_only=True)
class Target:
    """What code generation may rely on. `capability` is 10 * major + minor for CUDA and 0 for the CPU."""

    name: str
    device_type: str
    capability: int = 0

    @property
    def has_fp4_mma(self) -> bool:
        """Block-scaled FP4 tensor cores: tcgen05 on 10.x, mma.sync block scale on 12.x."""
        return self.capability in (100, 103, 110, 120, 121)

    @property
    def has_stochastic_convert(self) -> bool:
        """`cvt.rs.satfinite.e2m1x4` exists on sm_100a and sm_103a only."""
        return self.capability in (100, 103)


def target_of(device: torch.device, *, where: str = "target") -> Target:
    """Describe `device`. Raises `UnsupportedDevice` for anything but the CPU and CUDA from compute capability 8.0 on."""
    if device.type == "cpu":
        return Target(name="cpu", device_type="cpu")
    if device.type == "cuda" and torch.version.cuda:
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return Target(name=f"sm_{major}{minor}", device_type="cuda", capability=10 * major + minor)
        raise UnsupportedDevice(where=where, found=f"{device} (sm_{major}{minor})")
    raise UnsupportedDevice(where=where, found=str(device))


known_target = functools.cache(target_of)  # for launches, which ask on every call


@functools.cache
def processors_of(device: torch.device) -> int:
    """How many multiprocessors a CUDA device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count
