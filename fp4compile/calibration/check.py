"""Whether an artefact is that of the weights at hand."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fp4compile.calibration.record import Calibration, WeightPrint
from fp4compile.codegen.errors import Fp4CompileError
from fp4compile.codegen.statistics import StaleCalibration, checksum
from fp4compile.weights import STORE


class AnotherModel(Fp4CompileError, ValueError):
    template = "{site}: {name} was calibrated with another model: {found}. Calibrate this one, and name its file in the policy."


def prints_of(named: Iterable[tuple[str, Tensor]]) -> dict[str, WeightPrint]:
    """One that is freed has none."""
    return {name: print_of(value) for name, value in named if not STORE.is_freed(value)}


def print_of(value: Tensor) -> WeightPrint:
    with torch.no_grad():
        return WeightPrint(shape=tuple(value.shape), checksum=checksum(value))


def check_weight(calibration: Calibration, site: str, name: str, value: Tensor | None) -> None:
    """Raises `AnotherModel` or `StaleCalibration` unless the parameter `name` of the layer `site` is what it was.

    A value that `free_weights` released is not looked at: its codes were made while it was there.
    """
    known = calibration.weights.get(name)
    if known is None:
        raise AnotherModel(site=site, name=calibration.name, found=f"it has no parameter {name}")
    if value is None or STORE.is_freed(value):
        return
    shape = tuple(value.shape)
    if known.shape != shape:
        raise AnotherModel(site=site, name=calibration.name, found=f"there {name} is {known.shape}, here {shape}")
    if print_of(value) != known:
        raise StaleCalibration(site=site, name=calibration.name)
