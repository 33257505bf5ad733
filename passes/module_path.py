"""Module paths as users spell them, from the metadata that Dynamo leaves on nodes."""

from __future__ import annotations

import re

from torch import fx

# L['self']._modules['layers']._modules['0'].up  ->  root L['self'], then layers.0.up
_ROOT = re.compile(r"^[LG]\['(?P<name>[^']*)'\]")
# A class with a __getattr__ of its own is read through its __dict__.
_MEMBERS = r"\._(?:modules|parameters|buffers)|\.__dict__\['_(?:modules|parameters|buffers)'\]"
_ITEM = re.compile(rf"(?:{_MEMBERS})\['([^']*)'\]|\['([^']*)'\]|\[(\d+)\]")
# Names that are no identifiers, under torch.func.functional_call: getattr(getattr(L['self'], '0').up, '1').
_GETATTR = re.compile(r"getattr\((.*), '([^']*)'\)")


def module_of(node: fx.Node) -> tuple[str, str]:
    """Path of the innermost module around `node`, without the root, and its class name. Backward nodes name their forward's."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return "", ""
    path, module_class = list(stack.values())[-1]
    return readable_path(path), getattr(module_class, "__name__", str(module_class)).rsplit(".", 1)[-1]


def readable_path(source: str) -> str:
    """`L['self']._modules['layers']._modules['0']._parameters['weight']` as `layers.0.weight`."""
    while "getattr(" in source and (plain := _GETATTR.sub(r"\1.\2", source)) != source:
        source = plain
    without_root = _ROOT.sub("", source)
    dotted = _ITEM.sub(lambda m: "." + next(g for g in m.groups() if g is not None), without_root)
    return dotted.strip(".")
