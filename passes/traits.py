"""Facts about a matmul that only the graph knows, so that defaults need no list of names.

tied       its weight is also an embedding table
router     its result decides where tokens go (it reaches a top-k selection)
head       its result is the model's: no layer follows, and it is as wide as the graph's embedding table or reaches the logarithm of a loss
attention  it multiplies two activations around a softmax
"""

from __future__ import annotations

import torch
from torch import fx

from fp4compile.passes.match import aten, root_parameters
from fp4compile.passes.site import Operand, OperandKind, fake_of, is_backward

_EMBEDDINGS = {aten.embedding.default, aten.index.Tensor, aten.embedding_dense_backward.default}
_SELECTIONS = {aten.topk.default, aten.argmax.default, aten.sort.default, aten.sort.stable, aten.scatter.src, aten.scatter.value}
_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.convolution.default}
_STEPS = 12  # operators between a router and its selection: cast, bias, softmax or sigmoid, group masks


def traits_of(node: fx.Node, operands: tuple[Operand, Operand]) -> frozenset[str]:
    """The traits of the matmul `node`, whose operands were traced to `operands`."""
    found: set[str] = set()
    weights = [o for o in operands if o.kind is OperandKind.WEIGHT]
    if any(_is_embedding_table(root) for o in weights for root in root_parameters(o.source)):
        found.add("tied")
    if weights and _reaches_selection(node):
        found.add("router")
    if weights and _is_head(node):
        found.add("head")
    if not weights and _touches_softmax(node):
        found.add("attention")
    return frozenset(found)


def _is_embedding_table(parameter: fx.Node) -> bool:
    return any(user.target in _EMBEDDINGS and user.args[0] is parameter for user in parameter.users)


def _is_head(node: fx.Node) -> bool:
    if is_backward(node) or not (_is_as_wide_as_an_embedding(node) or _reaches_logarithm(node)):
        return False
    stack, seen = [node], {node}
    while stack:
        fresh = {user for user in stack.pop().users if user not in seen and not is_backward(user)}
        if any(user.target in _PRODUCTS for user in fresh):
            return False
        seen |= fresh
        stack.extend(fresh)
    return True


def _is_as_wide_as_an_embedding(node: fx.Node) -> bool:
    tables = (n.args[0] for n in node.graph.find_nodes(op="call_function", target=aten.embedding.default))
    return any(fake_of(node).shape[-1] == fake_of(table).shape[0] for table in tables)  # type: ignore[arg-type]


def _reaches_logarithm(node: fx.Node) -> bool:
    """A cross entropy takes the logarithm of a sum over the scores; the sum is one wide."""
    width = fake_of(node).shape[-1]
    frontier, seen = {node}, {node}
    for _ in range(_STEPS):
        near = {user for n in frontier for user in n.users if user not in seen and not is_backward(user)}
        if any(user.target in (aten.log.default, aten._log_softmax.default) for user in near):
            return True
        frontier = {user for user in near if _keeps_scores(user, width) or _keeps_scores(user, 1)}
        seen |= frontier
    return False


def _reaches_selection(node: fx.Node) -> bool:
    """Follow small per-token values only: a hidden state does not pass through a selection as scores do."""
    width = fake_of(node).shape[-1]
    frontier, seen = {node}, {node}
    for _ in range(_STEPS):
        frontier = {user for n in frontier for user in n.users if user not in seen and _keeps_scores(user, width)}
        if any(user.target in _SELECTIONS for user in frontier):
            return True
        seen |= frontier
    return False


def _keeps_scores(node: fx.Node, width: object) -> bool:
    if node.target in _SELECTIONS:
        return True
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[-1] == width and "mm" not in str(node.target)


def _touches_softmax(node: fx.Node) -> bool:
    near = {aten._softmax.default, aten._safe_softmax.default, aten.exp.default, aten._softmax_backward_data.default}
    frontier, seen = {node}, {node}
    for _ in range(_STEPS):
        frontier = {n for f in frontier for n in (*f.users, *f.all_input_nodes) if n not in seen and n.op == "call_function"}
        if any(n.target in near for n in frontier):
            return True
        frontier = {n for n in frontier if "mm" not in str(n.target)}
        seen |= frontier
    return False
