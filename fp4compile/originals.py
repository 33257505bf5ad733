"""The high-precision weights that `free_weights` released, and how to bring them back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fp4compile.codegen import ops
from fp4compile.codegen.errors import Fp4CompileError
from fp4compile.codegen.reference.block import dequantize_ref
from fp4compile.codegen.reference.layout import plain_ref
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
        nodes = [n for n in compute.graph.nodes if n.target is ops.QUANTIZE]
        source, axis, *_ = nodes[0].args
        if source.op != "placeholder" or ops.config_of(*nodes[0].args[2:-1]).hadamard:
            continue
        codes, scales, global_scale = values
        decoded = dequantize_ref(*plain_ref(codes, scales, nodes[0].kwargs.get("layout", "plain")), global_scale)
        decoded = decoded[..., : parameter.shape[axis]]
        return decoded if axis == -1 else decoded.mT
    raise CannotRestore(
        name=name, found="was changed before it was quantized, so its codes do not hold it", advice="Pass source=<state dict>."
    )
