"""The high-precision weights that `free_weights` released, and how to bring them back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fp4compile.codegen import ops
from fp4compile.codegen.errors import Fp4CompileError
from fp4compile.codegen.formats import round_up
from fp4compile.codegen.reference.block import dequantize_ref
from fp4compile.codegen.reference.layout import plain_ref
from fp4compile.codegen.reference.residual import out_of_order_ref
from fp4compile.codegen.residual_ops import QUANTIZE_REPEATED
from fp4compile.weights import STORE


class CannotRestore(Fp4CompileError, RuntimeError):
    template = "restore: {name} {found}. {advice}"


def restore(model: nn.Module, source: Mapping[str, Tensor] | str | os.PathLike[str] | None = None) -> int:
    """Give every freed weight of `model` its memory back; returns how many there were.

    source: a state dict, or the path of a file that `torch.load` reads, with the exact originals. Without it the weights are
    decoded from their 4-bit codes, so they equal what the compiled model multiplies with, not what was first loaded.

    Raises `CannotRestore` when `source` lacks a weight, and leaves that weight freed.
    """
    freed = [(name, p) for name, p in model.named_parameters() if STORE.is_freed(p)]
    originals = _load(source)
    for name, parameter in freed:
        if originals is None:
            STORE.restore(parameter, _decoded(name, parameter))
        elif name in originals:
            STORE.restore(parameter, originals[name])
        else:
            raise CannotRestore(name=name, found="is not in the given state dict", advice="Pass the model's full state dict, or no source.")
    return len(freed)


def refresh(model: nn.Module) -> int:
    """Quantize the weights of `model` again on their next use; needed only after writes through `param.data`.

    Returns how many stored values were forgotten.
    """
    return STORE.refresh(list(model.parameters()))


def _load(source: Any) -> Mapping[str, Tensor] | None:
    if source is None or isinstance(source, Mapping):
        return source
    return torch.load(source, map_location="cpu", weights_only=True)


def _decoded(name: str, parameter: Tensor) -> Tensor:
    for compute, values in STORE.codes_of(parameter):
        node = next(n for n in compute.graph.nodes if n.target in (ops.QUANTIZE, QUANTIZE_REPEATED))
        source, axis, *_ = node.args
        twice = node.target is QUANTIZE_REPEATED
        config = ops.config_of(*(node.args[4:] if twice else node.args[2:-1]))
        if source.op != "placeholder" or config.hadamard:
            continue
        codes, scales, global_scale = values
        decoded = dequantize_ref(*plain_ref(codes, scales, node.kwargs.get("layout", "plain")), global_scale)
        if twice:
            order, outliers = getattr(compute, node.args[2].target), node.args[3]
            wide = round_up(parameter.shape[axis], config.fmt.block) + outliers
            decoded = out_of_order_ref(decoded[..., :wide], order, outliers, config)
        decoded = decoded[..., : parameter.shape[axis]]
        return decoded if axis == -1 else decoded.mT
    raise CannotRestore(
        name=name, found="was changed before it was quantized, so its codes do not hold it", advice="Pass source=<state dict>."
    )
