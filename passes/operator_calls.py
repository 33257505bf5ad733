"""The calls of `fp4::` operators in a graph, as what their kernels depend on: sizes, strides, dtypes and settings, no values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fp4compile.codegen import ops
from fp4compile.passes.literals import hint_of
from fp4compile.passes.site import fake_of


@dataclass(frozen=True)
class TensorLike:
    """A tensor without its values."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def zeros(self, device: torch.device) -> Tensor:
        """Zeros, so that what is an index or an offset points at nothing."""
        storage = 1 + sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True)) if all(self.size) else 0
        return torch.zeros(storage, dtype=self.dtype, device=device).as_strided(self.size, self.stride)


@dataclass(frozen=True)
class OperatorCall:
    """Equal calls need the same kernels."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    def run(self, device: torch.device) -> None:
        """Call the operator on tensors of zeros."""
        args = [value.zeros(device) if isinstance(value, TensorLike) else value for value in self.args]
        self.target(*args, **dict(self.kwargs))


def operator_calls(gm: fx.GraphModule) -> list[OperatorCall]:
    """Each different one that a kernel computes, in the order of the graph.

    Symbolic sizes count as those that were seen; who has none is left out.
    """
    found: dict[OperatorCall, None] = {}
    for node in gm.graph.nodes:
        if str(node.target).startswith("fp4.") and not _is_search(node):
            args, kwargs = fx.map_arg((tuple(node.args), dict(node.kwargs)), _without_values)
            if _Unknown not in map(type, args):
                found[OperatorCall(node.target, args, tuple(kwargs.items()))] = None
    return list(found)


def _is_search(node: fx.Node) -> bool:
    """What runs once a weight, in plain PyTorch."""
    arguments: tuple[Any, ...] = node.args
    return node.target is ops.QUANTIZE and ops.config_of(*arguments[2:-1]).is_offline


class _Unknown:
    """A size that only the run will tell."""


def _without_values(node: fx.Node) -> Any:
    value = fake_of(node)
    if not isinstance(value, Tensor):
        hint = hint_of(value)
        return _Unknown() if hint is None else hint
    sizes, strides = (tuple(hint_of(n) for n in numbers) for numbers in (value.shape, value.stride()))
    return _Unknown() if None in (*sizes, *strides) else TensorLike(sizes, strides, value.dtype)  # type: ignore[arg-type]
