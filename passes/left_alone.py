"""Products that are named in the report, with a reason, but never rewritten: nothing that multiplies matrices goes unmentioned.

attention, convolutions, ...     operators with their own kernels, by name
cond(p, f, g, x), flex(...)      regions with a graph of their own, when they hold a product
other_library::linear(x, W)      operators that nobody sees into, when they read a weight matrix and values of its width
sum(mul(W, x))                   products that were written as sums before we saw them
"""

from __future__ import annotations

from collections.abc import Container
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
# By the operator's name; one that starts with `_` stands for all names that start so.
_REASONS: Final = {
    "_scaled_dot_product": _ATTENTION,
    "_flash_attention": _ATTENTION,
    "_efficient_attention": _ATTENTION,
    "flex_attention": _ATTENTION,
    "_native_multi_head_attention": "torch's fast path computes the whole attention layer in one operator; call model.train() to see inside",
    "_transformer_encoder_layer_fwd": "torch's fast path computes the whole layer in one operator; "
    "torch.backends.mha.set_fastpath_enabled(False) opens it",
    "convolution": "a convolution is not a matmul of two matrices",
    "mv": _VECTOR,
    "addmv": _VECTOR,
    "dot": "a dot product has no matrix",
    "vdot": "a dot product has no matrix",
    "addbmm": "a sum over batched products is left alone",
    "_trilinear": "a bilinear form is not a matmul of two matrices",
    "_scaled_mm": "the model already quantized this matmul itself",
    "_scaled_grouped_mm": "the model already quantized this matmul itself",
    "_weight_int": "the model already quantized this matmul itself",
    "_int_mm": "an integer matmul keeps its dtype",
    "mm": "this overload of mm (with its own output dtype) is left alone",
    "bmm": "this overload of bmm (with its own output dtype) is left alone",
    "addmm": "this overload of addmm (with its own output dtype) is left alone",
    "baddbmm": "this overload of baddbmm (with its own output dtype) is left alone",
    "_grouped_mm": "this overload of _grouped_mm is left alone",
    "grouped_mm_fallback": "the model computes its experts in a loop of its own because their dtype is not bfloat16",
    "_cdist_forward": "a distance is not a matmul",
    "mkldnn_rnn_layer": "a recurrent layer is computed by one operator",
    "lstm": "a recurrent layer is computed by one operator",
    "gru": "a recurrent layer is computed by one operator",
}  # fmt: skip
_SUMS: Final = (aten.sum.dim_IntList, aten.sum.default)
_WRITTEN_AS_SUMS: Final = {"mv": _VECTOR, "addmv": _VECTOR, "mm": _SMALL, "addmm": _SMALL, "bmm": _SMALL, "baddbmm": _SMALL}
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
    role = Role.FPROP if any(n in weights for n in node.all_input_nodes) else Role.MATMUL
    if (reason := _reason_by_name(name)) is not None:
        return LeftAlone(op=name, reason=reason)
    if count := sum(map(_count_products, _regions(node))):
        return LeftAlone(op=name, reason=_REGION.format(count=count, name=name), role=role)
    if namespace not in _OURS and _reads_weight_matrix(node, weights):
        return LeftAlone(op=name, reason=_OPAQUE.format(name=f"{namespace}::{name}"), role=role)
    origin = getattr(node.meta.get("original_aten"), "_schema", None)
    if node.target in _SUMS and origin is not None and (reason := _WRITTEN_AS_SUMS.get(origin.name.split("::")[-1])):
        return LeftAlone(op=origin.name.split("::")[-1], reason=reason)
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


def _reason_by_name(name: str) -> str | None:
    return next((why for key, why in _REASONS.items() if name == key or (key[0] == "_" and name.startswith(key))), None)


def _regions(node: fx.Node) -> list[fx.GraphModule]:
    owner = node.graph.owning_module
    regions = [getattr(owner, str(n.target), None) for n in node.all_input_nodes if n.op == "get_attr"]
    return [r for r in regions if isinstance(r, fx.GraphModule)]


def _count_products(region: fx.GraphModule) -> int:
    nodes = [n for n in region.graph.nodes if n.op == "call_function"]
    return sum(_is_product(n) for n in nodes) + sum(_count_products(r) for n in nodes for r in _regions(n))


def _is_product(node: fx.Node) -> bool:
    return _reason_by_name(_name_of(node)[1]) is not None


def _reads_weight_matrix(node: fx.Node, weights: Container[fx.Node]) -> bool:
    """Whether `node` reads a weight matrix and something as wide as one of its sides: not an embedding, whose other input is indices."""
    inputs = [(n in weights, fake_of(n)) for n in node.all_input_nodes if "val" in n.meta]
    tensors: list[tuple[bool, Any]] = [(w, t) for w, t in inputs if isinstance(t, torch.Tensor) and t.is_floating_point() and t.ndim]
    sides = {side for is_weight, t in tensors if is_weight and t.ndim > 1 for side in t.shape[-2:] if isinstance(side, int)}
    return any(not is_weight and t.shape[-1] in sides for is_weight, t in tensors)
