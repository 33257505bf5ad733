"""Layers with a backward of their own: all their products bear one number, and read operands in other shapes than the forward did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]


class _Flattened(torch.autograd.Function):
    """One weight a batch going forward, and one product over all tokens coming back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return torch.mm(x.flatten(0, 1), w.flatten(0, 1).t()).unflatten(0, x.shape[:2])

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> Pair:
        x, w = ctx.saved_tensors
        dy = dys[0].flatten(0, 1)[None]
        dw = torch.bmm(dy.mT, x.view(1, -1, x.shape[-1]))
        return torch.bmm(dy, w.view(1, -1, w.shape[-1])).view_as(x), dw.view_as(w)


class _Expanded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return torch.bmm(x, w.t().expand(x.shape[0], -1, -1))

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> Pair:
        x, w = ctx.saved_tensors
        dy = dys[0].flatten(0, 1)
        return (dy @ w).view_as(x), dy.t() @ x.flatten(0, 1)


class _TwoWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        hidden = rows @ w.t()
        ctx.save_for_backward(rows, w, v, hidden)
        return (hidden @ v.t()).view_as(x)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, w, v, hidden = ctx.saved_tensors
        dy = dys[0].flatten(0, 1)
        dh = dy @ v
        return (dh @ w).view_as(dys[0]), dh.t() @ rows, dy.t() @ hidden


# In the graph as one call: Dynamo would otherwise trace forward and backward apart.
flattened, expanded, two_weights = (
    torch._dynamo.allow_in_graph(lambda *args, function=function: function.apply(*args))
    for function in (_Flattened, _Expanded, _TwoWeights)
)


class _Layer(nn.Module):
    run: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(*shape) for shape in self.shapes)

    def forward(self, x: Tensor) -> Tensor:
        return type(self).run(x, *(self.weights[i] for i in range(len(self.shapes))))  # Dynamo of torch 2.11 unpacks no ParameterList


class Flattened(_Layer):
    run, shapes = staticmethod(flattened), ((2, 24, 32),)


class Expanded(_Layer):
    run, shapes = staticmethod(expanded), ((48, 32),)


class TwoWeights(_Layer):
    run, shapes = staticmethod(two_weights), ((32, 32), (32, 32))


class Traced(_Layer):
    """As models call it: Dynamo traces forward and backward."""

    run, shapes = staticmethod(_TwoWeights.apply), ((32, 32), (32, 32))


class Grouped(nn.Module):
    """Two experts, of 16 tokens and of the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 48, 32, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.tensor([16, x.shape[0]], dtype=torch.int32)
        return torch._grouped_mm(x, self.weight.transpose(-2, -1), offs=ends)
