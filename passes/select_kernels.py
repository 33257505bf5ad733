"""Name the kernel that will run each product.

fp4.scaled_mm(...)  ->  the same, with the name of its kernel family
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fp4compile.codegen import ops
from fp4compile.codegen.registry import kernel_for
from fp4compile.passes.assign_precision import kernel_spec
from fp4compile.passes.base import Pass, PassContext, PassResult
from fp4compile.passes.site import kernel_of, plan_of, set_kernel, site_of


@dataclass(frozen=True)
class SelectKernels(Pass):
    """Needs: scaled products. Leaves: a kernel name on each. That one exists was settled when precision was assigned."""

    name: ClassVar[str] = "select-kernels"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        named = 0
        for node in gm.graph.nodes:
            if node.target in (ops.SCALED_MM, ops.SCALED_GROUPED_MM) and kernel_of(node) is None:
                site, plan = site_of(node), plan_of(node)
                assert site is not None and plan is not None
                kernel = kernel_for(kernel_spec(site, plan), ctx.target)
                assert isinstance(kernel, str)
                set_kernel(node, kernel)
                named += 1
        return PassResult(changed=named)
