"""The invariants of a graph between passes, as code. Run under tests after every pass, and on demand in production."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from fp4compile.codegen import ops
from fp4compile.codegen.residual_ops import WIDENED
from fp4compile.passes.errors import GraphInvalid
from fp4compile.passes.site import is_backward, plan_of, site_of


def verify(gm: fx.GraphModule, stage: str) -> None:
    """Raise `GraphInvalid` unless `gm` is well formed after the pass `stage`."""
    gm.graph.lint()
    for node in gm.graph.nodes:
        for problem in _problems(node):
            raise GraphInvalid(stage=stage, found=problem, node=node.format_node() or node.name)


def _problems(node: fx.Node) -> list[str]:
    found: list[str] = []
    if node.op == "call_function" and "val" not in node.meta and node.users:
        found.append("a value without a fake tensor")
    if node.op == "call_function" and not is_backward(node) and node.meta.get("partitioner_tag") == "is_forward":
        found += [f"a forward node that reads the backward node {n.name}" for n in node.all_input_nodes if is_backward(n)]
    if node.target in (ops.SCALED_MM, ops.SCALED_GROUPED_MM):
        found += _product_problems(node)
    return found


def _product_problems(node: fx.Node) -> list[str]:
    plan, site = plan_of(node), site_of(node)
    if plan is None or site is None:
        return ["a scaled product without its site"]
    found: list[str] = []
    for side, config, codes, scales in (("a", plan.lhs, node.args[0], node.args[1]), ("b", plan.rhs, node.args[3], node.args[4])):
        if (config is None) != (scales is None):
            found.append("an operand whose precision is not the planned one")
        layout = node.kwargs.get(f"{side}_layout", "plain")
        if _layout_of(scales, layout) != layout:
            found.append("an operand in another layout than its reader expects")
        if scales is not None and layout == "plain" and codes.meta["val"].shape[-1] * 2 != scales.meta["val"].shape[-1] * config.fmt.block:  # type: ignore[union-attr]
            found.append("codes and scales of different length")
    return found


def _layout_of(scales: Any, unknown: Any) -> Any:
    """The layout in which these scales were written; `unknown` where no quantize node says."""
    source = scales.args[0] if isinstance(scales, fx.Node) and scales.target is operator.getitem else None
    if not isinstance(source, fx.Node) or source.target not in (ops.QUANTIZE, ops.QUANTIZE_BOTH, *WIDENED):
        return unknown
    which: Any = scales.args[1]
    half = "layout" if source.target is not ops.QUANTIZE_BOTH else "row_layout" if which < 3 else "column_layout"
    return source.kwargs.get(half, "plain")
