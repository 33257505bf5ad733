"""What the forward keeps for the backward, read off the backward's inputs once torch has split the joint graph."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import fx

from fp4compile.passes.literals import hint_of
from fp4compile.passes.record import GraphRecord
from fp4compile.passes.site import codes_of, fake_of, input_of


def count_saved(backward: fx.Graph, parameters: Container[int], record: GraphRecord) -> None:
    """Fill in the bytes that `record` tells of. `parameters` are positions among Dynamo's inputs: those are alive anyway."""
    saved = [node for node in backward.nodes if node.op == "placeholder" and _is_saved(node, parameters)]
    names = {node.name for node in saved}
    coded = [node for node in saved if codes_of(node) is not None]
    in_place_of = {codes.source: codes for node in coded if (codes := codes_of(node)) is not None and names.isdisjoint(codes.values)}
    total, in_codes = sum(map(_bytes, saved)), sum(map(_bytes, coded))
    record.saved_bytes += total
    record.saved_code_bytes += in_codes
    record.saved_bytes_without += total - in_codes + sum(hint_of(codes.size) or 0 for codes in in_place_of.values())


def _is_saved(node: fx.Node, parameters: Container[int]) -> bool:
    is_tangent = "tangents" in node.name
    position = input_of(node)
    is_parameter = position is not None and position in parameters
    return not is_tangent and not is_parameter and isinstance(fake_of(node), torch.Tensor)


def _bytes(node: fx.Node) -> int:
    value = fake_of(node)
    return (hint_of(value.numel()) or 0) * value.element_size()
