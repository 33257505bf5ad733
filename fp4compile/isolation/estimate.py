"""How much each matmul loses, estimated without measuring any: one forward and one backward in high precision.

To first order the loss changes by the sum of gradient times error. With g the gradient of the mean loss at a matmul's result A B, the
error of B adds sum(g * A dB) and that of A sum(g * dA B), which are sum(dL/dB * dB) and sum(dL/dA * dA).
Terms with two errors are left out.

Errors of nearest rounding have no preferred direction, so these sums are small and of either sign, and what a good model loses is mostly of
second order. `curvature` is its usual estimate from the same gradients, half of the sum of squares of what each row contributes (the
empirical Fisher matrix, rows taken as independent).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fp4compile.isolation.planned import Call


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of one site, in nats (or whatever the loss is in), mean over batches."""

    weight: float
    activation: float
    curvature: float

    @property
    def first_order(self) -> float:
        return self.weight + self.activation


@dataclass(kw_only=True)
class Estimating:
    """A product in high precision whose gradient, when it comes, is held against the error that the policy would make."""

    sums: dict[str, Tensor] = field(default_factory=dict)  # (weight, activation, curvature), float64, on the model's device

    def __call__(self, call: Call) -> Tensor:
        out = call.exact()
        if not out.requires_grad:  # nothing before it is watched
            out.requires_grad_()
        out.register_hook(_Hook(self, call))
        return out

    def add(self, call: Call, gradient: Tensor) -> None:
        with torch.no_grad():
            g = gradient.float()
            activation, weight = (g.new_zeros(g.shape[:-1]) if d is None else (g * d).sum(-1) for d in call.differences())
            total = weight + activation
            curvature = 0.5 * total.numel() * total.square().sum(dtype=torch.float64)
            found = torch.stack([weight.sum(dtype=torch.float64), activation.sum(dtype=torch.float64), curvature])
            self.sums[call.site.name] = self.sums.get(call.site.name, torch.zeros_like(found)) + found

    def of(self, batches: int) -> dict[str, Estimate]:
        found = {}
        for name, sums in self.sums.items():
            weight, activation, curvature = (sums / batches).tolist()
            found[name] = Estimate(weight=weight, activation=activation, curvature=curvature)
        return found


class _Hook:
    """Holds the call until its gradient comes, then lets go of it."""

    def __init__(self, owner: Estimating, call: Call) -> None:
        self.owner, self.call = weakref.ref(owner), call

    def __call__(self, gradient: Tensor) -> None:
        owner = self.owner()
        if owner is not None:
            owner.add(self.call, gradient)


def spearman(x: list[float], y: list[float]) -> float:
    """Rank correlation of two lists of one length, ties at their mean rank; NaN where one of them is constant."""
    a, b = _ranks(torch.tensor(x, dtype=torch.float64)), _ranks(torch.tensor(y, dtype=torch.float64))
    a, b = a - a.mean(), b - b.mean()
    return ((a @ b) / (a.norm() * b.norm())).item() if len(x) > 1 else float("nan")


def _ranks(x: Tensor) -> Tensor:
    return (x[:, None] > x).sum(1).double() + 0.5 * ((x[:, None] == x).sum(1) - 1)
