"""Products that are named in the report, with a reason, but never rewritten: nothing that multiplies matrices goes unmentioned.

attention, bilinear forms, ...   operators with their own kernels, by name
cond(p, f, g, x), flex(...)      regions with a graph of their own, when they hold a product
other_library::linear(x, W)      operators that nobody sees into, when they read a weight matrix and values of its width
sum(mul(W, x))                   products that were written as sums before we saw them
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from fp4compile.passes.match import aten
from fp4compile.passes.module_path import module_of
from fp4compile.passes.site import Role, Site, fake_of

_ATTENTION = "attention is computed by one fused operator, which keeps its precision"
_VECTOR = "a matrix-vector product is bound by reading the matrix once; Inductor computes it"
_SMALL = "too small for a matmul: it is computed as a sum of products"
_FAST_PATH = "torch's fast path computes the whole layer in one operator; torch.backends.mha.set_fastpath_enabled(False) opens it"
_RECURRENT = "a recurrent layer is computed by one operator"
_OVERLOAD = "this overload, with its own output dtype, is left alone"
_QUANTIZED = "the model already quantized this matmul itself"
# By the operator's name; one that starts with `_` stands for all names that start so. These are as they are meant to be:
_AS_MEANT: Final = {
    "_scaled_dot_product": _ATTENTION,
    "_flash_attention": _ATTENTION,
    "_efficient_attention": _ATTENTION,
    "flex_attention": _ATTENTION,
    "_scaled_mm": _QUANTIZED,
    "_scaled_grouped_mm": _QUANTIZED,
    "_weight_int": _QUANTIZED,
    "_int_mm": "an integer matmul keeps its dtype",
    "dot": "a dot product has no matrix",
    "vdot": "a dot product has no matrix",
    "_cdist_forward": "a distance is not a matmul",
}
# And these a policy may have wanted in 4 bits, when they read a weight.
_OUT_OF_REACH: Final = {
    "_native_multi_head_attention": _FAST_PATH,
    "_transformer_encoder_layer_fwd": _FAST_PATH,
    "convolution": "a convolution is not a matmul of two matrices",
    "mv": _VECTOR,
    "addmv": _VECTOR,
    "addbmm": "a sum over batched products is left alone",
    "_trilinear": "a bilinear form is not a matmul of two matrices",
    "mm": _OVERLOAD,
    "bmm": _OVERLOAD,
    "addmm": _OVERLOAD,
    "baddbmm": _OVERLOAD,
    "_grouped_mm": _OVERLOAD,
    "grouped_mm_fallback": "the model computes its experts in a loop of its own because their dtype is not bfloat16",
    "mkldnn_rnn_layer": _RECURRENT,
    "lstm": _RECURRENT,
    "gru": _RECURRENT,
}
_SUMS: Final = (aten.sum.dim_IntList, aten.sum.default)
_TOO_SMALL: Final = ("mm", "addmm", "bmm", "baddbmm")
_VECTORS: Final = ("mv", "addmv")
_OURS: Final = ("aten", "prims", "fp4")
_OPAQUE = "{name} does not belong to torch, and what it does with its weight is not seen"
_REGION = "{count} matmuls lie inside {name}, whose graph is compiled as it is"


@dataclass(frozen=True, kw_only=True)
class LeftAlone:
    op: str
    reason: str
    role: Role = Role.MATMUL  # fprop where a policy may have wanted it: then the site counts as fallen back


def left_alone(node: fx.Node, weights: Container[fx.Node]) -> LeftAlone | None:
    """What product `node` computes, if one, and why it stays as it is. `weights` are the nodes computed from parameters alone."""
    namespace, name = _name_of(node)
    role = _role_of(node, weights)
    if (reason := _reason_by_name(_AS_MEANT, name)) is not None:
        return LeftAlone(op=name, reason=reason)
    if (reason := _reason_by_name(_OUT_OF_REACH, name)) is not None:
        return LeftAlone(op=name, reason=reason, role=role)
    if count := sum(map(_count_products, _regions(node))):
        return LeftAlone(op=name, reason=_REGION.format(count=count, name=name), role=role)
    if namespace not in _OURS and _reads_weight_matrix(node, weights):
        return LeftAlone(op=name, reason=_OPAQUE.format(name=f"{namespace}::{name}"), role=role)
    return _written_as_sum(node, weights) if node.target in _SUMS else None


def _written_as_sum(node: fx.Node, weights: Container[fx.Node]) -> LeftAlone | None:
    origin = getattr(node.meta.get("original_aten"), "_schema", None)
    name = "" if origin is None else origin.name.split("::")[-1]
    if name in _TOO_SMALL:
        return LeftAlone(op=name, reason=_SMALL)
    if name in _VECTORS:
        return LeftAlone(op=name, reason=_VECTOR, role=_role_of(node.all_input_nodes[0], weights))
    return None


def bare_site(node: fx.Node, found: LeftAlone) -> Site:
    """A row for the report: sizes of the result, no operands."""
    module, class_name = module_of(node)
    out = next((t for t in tree_leaves(fake_of(node)) if isinstance(t, torch.Tensor)), torch.empty(0))
    return Site(
        name="", module=module, class_name=class_name, role=found.role, op=found.op, m=out.shape[-2] if out.ndim > 1 else 1,
        n=out.shape[-1] if out.ndim else 1, k=0, dtype=out.dtype, depth=0, layers=0, refusal=found.reason,
    )  # fmt: skip


def _name_of(node: fx.Node) -> tuple[str, str]:
    """Namespace and name of the operator; of the wrapped one where a functional wrapper calls an operator that writes its inputs."""
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator) and node.args and isinstance(node.args[0], torch._ops.OpOverload):
        target = node.args[0]
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        return namespace, name
    return ("higher_order", target.name()) if isinstance(target, torch._ops.HigherOrderOperator) else ("", "")


def _role_of(node: fx.Node, weights: Container[fx.Node]) -> Role:
    """A layer's, unless its result is itself a weight, as a norm of one is."""
    return Role.FPROP if any(n in weights for n in node.all_input_nodes) and node not in weights else Role.MATMUL


def _reason_by_name(reasons: Mapping[str, str], name: str) -> str | None:
    return next((why for key, why in reasons.items() if name == key or (key[0] == "_" and name.startswith(key))), None)


def _regions(node: fx.Node) -> list[fx.GraphModule]:
    owner = node.graph.owning_module
    regions = [getattr(owner, str(n.target), None) for n in node.all_input_nodes if n.op == "get_attr"]
    return [r for r in regions if isinstance(r, fx.GraphModule)]


def _count_products(region: fx.GraphModule) -> int:
    nodes = [n for n in region.graph.nodes if n.op == "call_function"]
    return sum(_is_product(n) for n in nodes) + sum(_count_products(r) for n in nodes for r in _regions(n))


def _is_product(node: fx.Node) -> bool:
    return _reason_by_name({**_AS_MEANT, **_OUT_OF_REACH}, _name_of(node)[1]) is not None


def _reads_weight_matrix(node: fx.Node, weights: Container[fx.Node]) -> bool:
    """Whether `node` reads a weight matrix and something as wide as one of its sides: not an embedding, whose other input is indices."""
    inputs = [(n in weights, fake_of(n)) for n in node.all_input_nodes if "val" in n.meta]
    tensors: list[tuple[bool, Any]] = [(w, t) for w, t in inputs if isinstance(t, torch.Tensor) and t.is_floating_point() and t.ndim]
    sides = {side for is_weight, t in tensors if is_weight and t.ndim > 1 for side in t.shape[-2:] if isinstance(side, int)}
    return any(not is_weight and t.shape[-1] in sides for is_weight, t in tensors)
