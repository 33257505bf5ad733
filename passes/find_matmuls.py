"""Find every matmul and say what it is.

    mm(view(x), permute(W))  ->  the same, with a Site: module path, role, M, N, K, operands traced to weight, activation or gradient

The backward of a layer carries the forward's `seq_nr`, so fprop, dgrad and wgrad are known without guessing from shapes or names.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from fp4compile.passes.base import NoMatch, Pass, PassContext, PassResult
from fp4compile.passes.left_alone import bare_site, left_alone
from fp4compile.passes.lower_convolutions import why_not_a_matmul
from fp4compile.passes.match import aten, computed_from_gradients, computed_from_parameters, named_parameter, underlying
from fp4compile.passes.module_path import module_of
from fp4compile.passes.site import EMPTY, NO_DEPTH, Operand, OperandKind, Role, Site, fake_of, input_of, is_backward, set_site
from fp4compile.passes.traits import traits_of

# Position of the two factors among the arguments.
_FACTORS = {
    aten.mm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.bmm.default: (0, 1),
    aten._grouped_mm.default: (0, 1),
}
_NO_LAYER = frozenset({"head", "router", "tied"})
_PARAMETERS_ONLY = "multiplies parameters, as when an adapter is merged: the result is a weight, and is quantized where it is used"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class FindMatmuls(Pass):
    """Needs: a normalized graph. Leaves: a Site on each matmul, with the reason where none can be rewritten."""

    name: ClassVar[str] = "find-matmuls"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        facts = _Facts.of(gm.graph, ctx.parameters)
        forward = _sites((n for n in gm.graph.nodes if not is_backward(n)), facts)
        backward = _sites(filter(is_backward, gm.graph.nodes), replace(facts, forward_roles=_roles_of(forward)))
        sites = {**forward, **backward}
        in_order = {node: sites[node] for node in gm.graph.nodes if node in sites}
        for node, site in _with_unique_names(_with_depth(in_order)).items():
            set_site(node, site)
        return PassResult(changed=len(sites))


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """What is known of the whole graph before single nodes are looked at."""

    parameters: Mapping[int, str]
    weights: set[fx.Node]  # computed from parameters alone
    products: set[fx.Node]  # those among them that a matmul has part in
    gradients: set[fx.Node]
    forward_roles: Mapping[int, Role]  # seq_nr -> role of the forward matmul

    @classmethod
    def of(cls, graph: fx.Graph, parameters: Mapping[int, str]) -> _Facts:
        weights = computed_from_parameters(graph, parameters, also_written=True)
        products: set[fx.Node] = set()
        for node in graph.nodes:
            if node in weights and (node.target in _FACTORS or any(n in products for n in node.all_input_nodes)):
                products.add(node)
        gradients = computed_from_gradients(graph)
        return cls(parameters=parameters, weights=weights, products=products, gradients=gradients, forward_roles={})


def _sites(nodes: Iterable[fx.Node], facts: _Facts) -> dict[fx.Node, Site]:
    return {node: found for node in nodes if isinstance(found := match(node, facts), Site)}


def _roles_of(forward: Mapping[fx.Node, Site]) -> dict[int, Role]:
    """Roles by `seq_nr`. Where matmuls share one, as inside an autograd function, it is a layer's if any of them is."""
    roles: dict[int, Role] = {}
    for node, site in forward.items():
        if "seq_nr" in node.meta and roles.get(node.meta["seq_nr"]) is not Role.FPROP:
            roles[node.meta["seq_nr"]] = site.role
    return roles


def match(node: fx.Node, facts: _Facts) -> Site | NoMatch:
    """Describe `node` as a site, or say why it is none."""
    if node.op != "call_function":
        return NoMatch(reason="not an operator")
    if node.target in _FACTORS:
        return _matmul_site(node, facts)
    if node.target is aten.convolution.default and not is_backward(node):
        return _convolution_site(node, facts)
    found = None if is_backward(node) else left_alone(node, facts.weights)
    return NoMatch(reason=f"{node.target} is not a matmul") if found is None else bare_site(node, found)


def _factors(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    first, second = _FACTORS[node.target]  # type: ignore[index]
    return node.args[first], node.args[second]  # type: ignore[return-value]


def _matmul_site(node: fx.Node, facts: _Facts) -> Site:
    left, right = _factors(node)
    a, b, out = fake_of(left), fake_of(right), fake_of(node)
    lhs, rhs = _operand(left, -1, facts), _operand(right, -2, facts)
    if node.target is aten.bmm.default and "attention" in traits_of(node, projected := (_projected(lhs, facts), _projected(rhs, facts))):
        lhs, rhs = projected
    module, class_name = module_of(node)
    weight = next((o.parameter for o in (lhs, rhs) if o.kind is OperandKind.WEIGHT), "")
    role = _role(node, lhs, rhs, facts)
    op = node.target._schema.name.split("::")[-1]  # type: ignore[union-attr]
    grouped_over_k = op == "_grouped_mm" and b.ndim == 2
    return Site(
        name="",
        module=_path(module, weight),
        class_name=class_name,
        role=role,
        op=op,
        m=a.shape[-2],
        n=b.shape[-1],
        k=a.shape[-1],
        batch=1 if op == "_grouped_mm" else (out.shape[0] if out.ndim == 3 else 1),
        dtype=out.dtype,
        depth=0,
        layers=0,
        lhs=lhs,
        rhs=rhs,
        traits=traits_of(node, (lhs, rhs)),
        refusal=_refusal(a, b, out, grouped_over_k, op, node) or (_PARAMETERS_ONLY if node in facts.weights else ""),
    )


def _convolution_site(node: fx.Node, facts: _Facts) -> Site:
    x, w = node.args[0], node.args[1]
    out, kernel = fake_of(node), fake_of(w)  # type: ignore[arg-type]
    lhs, rhs = _operand(x, -1, facts), _operand(w, -1, facts)  # type: ignore[arg-type]
    module, class_name = module_of(node)
    dtype_refusal = "" if out.dtype in _DTYPES else f"dtype {str(out.dtype).removeprefix('torch.')} is not float32, bfloat16 or float16"
    return Site(
        name="",
        module=_path(module, rhs.parameter),
        class_name=class_name,
        role=Role.FPROP if rhs.kind is OperandKind.WEIGHT else Role.MATMUL,
        op="convolution",
        m=out.shape[0] * math.prod(out.shape[2:]),
        n=out.shape[1],
        k=math.prod(kernel.shape[1:]),
        dtype=out.dtype,
        depth=0,
        layers=0,
        lhs=lhs,
        rhs=rhs,
        refusal=why_not_a_matmul(node) or dtype_refusal,
    )


def _refusal(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, grouped_over_k: bool, op: str, node: fx.Node) -> str:
    for dtype in (a.dtype, b.dtype, out.dtype):
        if dtype not in _DTYPES:
            return f"dtype {str(dtype).removeprefix('torch.')} is not float32, bfloat16 or float16"
    if any(isinstance(s, int) and s == 0 for s in (*a.shape, *b.shape)):
        return EMPTY
    if a.device != b.device:
        return f"operands lie on two devices, {a.device} and {b.device}"
    if grouped_over_k:
        return "the groups of this grouped matmul split its contraction dimension, and blocks must not cross groups"
    if op == "_grouped_mm" and (len(node.args) < 3 or node.args[2] is None or a.ndim != 2):
        return "only a grouped matmul of a 2-D activation with offsets is rewritten"
    if op == "_grouped_mm" and any(arg is not None for arg in (*node.args[3:4], node.kwargs.get("bias"))):
        return "a grouped matmul with a bias is left alone"
    return ""


def _operand(node: fx.Node, axis: int, facts: _Facts) -> Operand:
    source, axis = underlying(node, axis)
    if source in facts.weights:
        parameter = named_parameter(source)
        position = input_of(parameter) if parameter is not None else None
        return Operand(
            kind=OperandKind.WEIGHT, source=source, axis=axis, parameter=facts.parameters.get(position, "") if position is not None else ""
        )
    kind = OperandKind.GRADIENT if source in facts.gradients else OperandKind.ACTIVATION
    return Operand(kind=kind, source=source, axis=axis)


def _projected(operand: Operand, facts: _Facts) -> Operand:
    """Learned queries, once projected, come from parameters alone; in attention they are activations all the same."""
    is_product = operand.source in facts.products
    return replace(operand, kind=OperandKind.ACTIVATION, parameter="") if is_product else operand


def _role(node: fx.Node, lhs: Operand, rhs: Operand, facts: _Facts) -> Role:
    has_weight = OperandKind.WEIGHT in (lhs.kind, rhs.kind)
    if not is_backward(node):
        return Role.FPROP if has_weight and node not in facts.weights else Role.MATMUL
    forward = facts.forward_roles.get(node.meta.get("seq_nr", -1))
    if has_weight:
        return Role.DGRAD if forward in (Role.FPROP, None) else Role.MATMUL
    return Role.WGRAD if forward is Role.FPROP else Role.MATMUL


def _path(module: str, parameter: str) -> str:
    """The module path; that of the weight's owner where it lies inside, as when a mixer multiplies by its projection's weight itself.

    With the parameter's own name where that is not `weight`, as in `mlp.experts.gate_up_proj`.
    """
    owner, _, leaf = parameter.rpartition(".")
    if parameter and leaf != "weight":
        return parameter
    return owner if owner.startswith(f"{module}.") else module or parameter.removesuffix(".weight")


def _with_depth(sites: Mapping[fx.Node, Site]) -> dict[fx.Node, Site]:
    """Number the layers in forward order; a backward site takes number, path and traits of its forward.

    Heads and routers have a weight and are no layers: a share of the depth is one of what would be quantized.
    """
    weighted = [node for node, site in sites.items() if site.role is Role.FPROP]
    layers = [node for node in weighted if _NO_LAYER.isdisjoint(sites[node].traits)]
    depth = {node: i for i, node in enumerate(layers)}
    forward_of_seq: dict[int | None, list[fx.Node]] = {}
    for node in weighted:
        if "seq_nr" in node.meta:
            forward_of_seq.setdefault(node.meta["seq_nr"], []).append(node)
    numbered: dict[fx.Node, Site] = {}
    for node, site in sites.items():
        own = [node] if site.role is Role.FPROP else forward_of_seq.get(node.meta.get("seq_nr"), [])
        # An autograd function gives one number to all its products.
        forward = next((n for n in own if _share_operand(site, sites[n])), own[0] if own else None)
        if site.role is Role.MATMUL or forward is None:
            numbered[node] = replace(site, layers=len(layers))
            continue
        origin = sites[forward]
        traits = site.traits | origin.traits  # a router's gradients reach no selection, and wgrad does not read the tied weight
        numbered[node] = replace(
            site, depth=depth.get(forward, NO_DEPTH), layers=len(layers), module=origin.module, class_name=origin.class_name, traits=traits
        )
    return numbered


def _share_operand(one: Site, other: Site) -> bool:
    sources = {operand.source for operand in (other.lhs, other.rhs) if operand is not None}
    return any(operand is not None and operand.source in sources for operand in (one.lhs, one.rhs))


def _with_unique_names(sites: Mapping[fx.Node, Site]) -> dict[fx.Node, Site]:
    """Names are module paths; `#2`, `#3` tell several matmuls of one module and role apart."""
    seen: Counter[tuple[str, Role]] = Counter()
    named: dict[fx.Node, Site] = {}
    for node, site in sites.items():
        base = site.module or site.op
        seen[base, site.role] += 1
        count = seen[base, site.role]
        named[node] = replace(site, name=base if count == 1 else f"{base}#{count}")
    return named
