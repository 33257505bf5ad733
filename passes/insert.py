"""Add a node to a graph with everything later stages expect of it: a fake value, the module path and the side of the partition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fp4compile.codegen import ops
from fp4compile.passes.site import fake_of

_RECOMPUTE = ("recompute", "ac_graph_id")  # marks of `torch.utils.checkpoint`
# Metadata that says where a node comes from. `seq_nr` ties a backward node to its forward one.
_ORIGIN = ("nn_module_stack", "fwd_nn_module_stack", "seq_nr", "stack_trace", "partitioner_tag", "autograd_backward")


def call(
    graph: fx.Graph,
    target: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    like: fx.Node,
    tag: str | None = None,
    source: fx.Node | None = None,
) -> fx.Node:
    """Insert `target(*args)` at the graph's insertion point, with the origin of `like` and its fake value computed.

    `tag` overrides the partition: "is_forward" or "is_backward". What a checkpoint recomputes is recomputed in its new form: marks are
    those of `like`, or of `source` where that belongs to a checkpoint.
    """
    kwargs = dict(kwargs or {})
    node = graph.call_function(target, args, kwargs)
    node.meta.update({key: like.meta[key] for key in _ORIGIN if key in like.meta})
    if tag is not None:
        node.meta["partitioner_tag"] = tag
    marked = source if source is not None and "recompute" in source.meta else like
    node.meta.update({key: marked.meta[key] for key in _RECOMPUTE if key in marked.meta})
    fake_args, fake_kwargs = fx.map_arg((args, kwargs), fake_of)
    node.meta["val"] = ops.SHAPE_RULES.get(target, target)(*fake_args, **fake_kwargs)
    return node


def size_node(graph: fx.Graph, source: fx.Node, axis: int, *, like: fx.Node) -> int | fx.Node:
    """The length of `source` along `axis`: an int where it is static, otherwise a node."""
    length = fake_of(source).shape[axis]
    if isinstance(length, torch.SymInt):
        return call(
            graph, torch.ops.aten.sym_size.int, (source, axis % fake_of(source).ndim), like=like, tag=source.meta.get("partitioner_tag")
        )
    return length


def place_after(source: fx.Node) -> fx.Node:
    """Where a reader of `source` may go at the earliest: placeholders stand together at the front of a graph."""
    place = source
    while place.op == "placeholder" and place.next.op == "placeholder":
        place = place.next
    return place
