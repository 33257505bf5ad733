"""Quantize each value once, however many matmuls read it.

    q = fp4.quantize(x); k = fp4.quantize(x)  ->  q = k = fp4.quantize(x)

Stochastic draws are never merged: each reads a seed of its own, so no two of them are equal nodes.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fp4compile.codegen import ops
from fp4compile.codegen.residual_ops import WIDENED
from fp4compile.passes.base import Pass, PassContext, PassResult
from fp4compile.passes.normalize import merge_equal


@dataclass(frozen=True)
class ShareQuantize(Pass):
    """Needs: quantize nodes. Leaves: no two that compute the same value."""

    name: ClassVar[str] = "share-quantize"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        merge_equal(gm.graph, {ops.HADAMARD})
        shared = merge_equal(gm.graph, {ops.QUANTIZE, *WIDENED})
        merge_equal(gm.graph, {operator.getitem})
        ctx.record.shared += shared
        return PassResult(changed=shared, notes=(f"{shared} quantize nodes served by another one",))
