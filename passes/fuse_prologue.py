"""Let the quantizer rotate while it reads.

fp4.quantize(fp4.hadamard(x, 16))  ->  fp4.quantize(x, hadamard=16)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from fp4compile.codegen import ops
from fp4compile.passes.base import Pass, PassContext, PassResult


@dataclass(frozen=True)
class FusePrologue(Pass):
    """Needs: quantize nodes. Leaves: no `fp4::hadamard` whose only readers are quantizers along its axis."""

    name: ClassVar[str] = "fuse-prologue"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        rotations = [node for node in gm.graph.nodes if node.target is ops.HADAMARD]
        return PassResult(changed=sum(_fuse(node) for node in rotations))


def _fuse(rotation: fx.Node) -> int:
    source, axis, size = rotation.args
    readers = list(rotation.users)
    if not all(r.target is ops.QUANTIZE and r.args[0] is rotation and r.args[1] == axis for r in readers):
        return 0
    for reader in readers:
        _, _, *fields, seed = reader.args
        config = replace(ops.config_of(*fields), hadamard=size)  # type: ignore[arg-type]
        reader.args = (source, axis, *ops.quantize_args(config), seed)  # type: ignore[assignment]
    rotation.graph.erase_node(rotation)
    return len(readers)
