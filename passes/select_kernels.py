"""Name the kernel that will run each product, and lay its operands out as that kernel reads them.

q = fp4.quantize(W); fp4.scaled_mm(x, q)  ->  q = fp4.quantize(W, layout='tiled'); fp4.scaled_mm(x, q, b_layout='tiled')

The first line runs once, in the weight store. A value whose readers want different layouts stays plain, which every kernel reads.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fp4compile.codegen import ops
from fp4compile.codegen.formats import Layout
from fp4compile.codegen.reference.layout import suits_tiles
from fp4compile.codegen.registry import kernel_for, layouts_for
from fp4compile.codegen.residual_ops import WIDENED
from fp4compile.passes.assign_precision import kernel_spec
from fp4compile.passes.base import Pass, PassContext, PassResult
from fp4compile.passes.site import constant_of, fake_of, kernel_of, plan_of, set_kernel, site_of

_PRODUCTS = (ops.SCALED_MM, ops.SCALED_GROUPED_MM)
_A_CODES, _B_CODES = 0, 3  # positions among a product's arguments
_FEW_ROWS = 64


@dataclass(frozen=True)
class SelectKernels(Pass):
    """Needs: scaled products. Leaves: a kernel name on each, and layouts. That a kernel exists was settled when precision was assigned."""

    name: ClassVar[str] = "select-kernels"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        named = 0
        wanted: dict[fx.Node, tuple[Layout, Layout]] = {}
        for node in gm.graph.nodes:
            if node.target not in _PRODUCTS:
                continue
            site, plan = site_of(node), plan_of(node)
            assert site is not None and plan is not None
            spec = kernel_spec(site, plan)
            wanted[node] = layouts_for(spec, ctx.target)
            if kernel_of(node) is None:
                kernel = kernel_for(spec, ctx.target)
                assert isinstance(kernel, str)
                set_kernel(node, kernel)
                named += 1
        for node in [n for n in gm.graph.nodes if n.target in (ops.QUANTIZE, *WIDENED)]:
            _lay_out(node, wanted)
        return PassResult(changed=named)


def _lay_out(quantize: fx.Node, wanted: dict[fx.Node, tuple[Layout, Layout]]) -> None:
    parts = [user for user in quantize.users if user.target is operator.getitem]
    readers = _readers(parts)
    layouts = {wanted[product][side] for product, side in readers if product in wanted}
    if len(layouts) != 1 or not all(product in wanted for product, _ in readers):
        return
    layout = layouts.pop()
    if layout is Layout.PLAIN or not _may_have(quantize, layout) or quantize.kwargs.get("layout") == layout:
        return
    quantize.kwargs = {**quantize.kwargs, "layout": str(layout)}
    target: Any = quantize.target
    values = ops.SHAPE_RULES.get(target, target)(*fx.map_arg(quantize.args, fake_of), layout=layout)
    quantize.meta["val"] = values
    for part in parts:
        part.meta["val"] = values[part.args[1]]  # type: ignore[index]
    for product, side in readers:
        product.kwargs = {**product.kwargs, ("a_layout", "b_layout")[side]: str(layout)}


def _readers(parts: list[fx.Node]) -> list[tuple[fx.Node, int]]:
    """(reader, side) of codes and scales; a side is 0 or 1, for A and B."""
    found: list[tuple[fx.Node, int]] = []
    for part in parts:
        for reader in part.users if part.args[1] != 2 else ():
            sides = [side for side, first in enumerate((_A_CODES, _B_CODES)) if part in reader.args[first : first + 2]]
            found += [(reader, side) for side in sides or [0]]
    return found


def _may_have(quantize: fx.Node, layout: Layout) -> bool:
    """Whether `layout` serves this value.

    A tiled weight is laid out once, in the weight store. It counts its rows in whole tiles, and padding must not cost much memory. Scales
    are swizzled in blocks of 128 rows: for a few rows of x that is many bytes of zeros, and kernels for few rows read plain ones as fast.
    """
    source, axis = quantize.args[:2]
    value = fake_of(source)  # type: ignore[arg-type]
    rows, k = (value if axis == -1 else value.mT).shape[-2:]
    k += quantize.args[3] if quantize.target in WIDENED else 0  # type: ignore[operator]
    weight = constant_of(quantize) is not None
    if layout is not Layout.TILED:
        return weight or isinstance(rows, torch.SymInt) or rows > _FEW_ROWS
    if isinstance(rows, torch.SymInt) or isinstance(k, torch.SymInt):
        return False
    return weight and suits_tiles(rows, k)
