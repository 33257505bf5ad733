"""What a kernel depends on: the one word that passes and kernels share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fp4compile.codegen.formats import QuantConfig


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """One operator instance. `lhs` and `rhs` are None where that operand stays in high precision."""

    op: str  # "scaled_mm" or "scaled_grouped_mm"
    lhs: QuantConfig | None
    rhs: QuantConfig | None
    dtype: torch.dtype  # of the output and of a high-precision operand


@dataclass(frozen=True, kw_only=True)
class Unsupported:
    """Why no kernel computes a spec on a target."""

    reason: str
