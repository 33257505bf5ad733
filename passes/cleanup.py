"""Drop what nothing reads any more.

permute(W); fp4.scaled_mm(...)  ->  fp4.scaled_mm(...)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fp4compile.passes.base import Pass, PassContext, PassResult


@dataclass(frozen=True)
class Cleanup(Pass):
    """Leaves: no dead node, and compiled code that matches the graph."""

    name: ClassVar[str] = "cleanup"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        before = len(gm.graph.nodes)
        gm.graph.eliminate_dead_code()
        gm.recompile()
        return PassResult(changed=before - len(gm.graph.nodes))
