"""What a compiled model must equal: the same recipe, run eagerly on `nn.Linear` layers with the reference numerics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.reference.block import dequantize_ref, quantize_ref

PLAIN = QuantConfig()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Configs of the three matmuls of a layer; None keeps an operand, and with both kept the matmul, in high precision."""

    fprop_x: QuantConfig | None = PLAIN
    fprop_w: QuantConfig | None = PLAIN
    dgrad_dy: QuantConfig | None = None
    dgrad_w: QuantConfig | None = None
    wgrad_x: QuantConfig | None = None
    wgrad_dy: QuantConfig | None = None
    dequantized: bool = False  # the backward is in high precision, on the values of the forward's operands
    of_forward: bool = False  # what dgrad quantizes of the weight and wgrad of the activation are those values


def product(
    a: Tensor, b: Tensor, a_config: QuantConfig | None, b_config: QuantConfig | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(M, N) of A (M, K) and B (N, K): exact operands, float32 sums, one rounding; in high precision torch's own matmul."""
    if a_config is None and b_config is None:
        out = a @ b.T
        return out if bias is None else out + bias
    left, right = (_values(t, c) for t, c in ((a, a_config), (b, b_config)))
    k = max(left.shape[1], right.shape[1])
    left, right = (nn.functional.pad(t, (0, k - t.shape[1])) for t in (left, right))
    out = left @ right.T
    return (out if bias is None else out + bias.float()).to(dtype)


def _values(t: Tensor, config: QuantConfig | None) -> Tensor:
    return t.float() if config is None else dequantize_ref(*quantize_ref(t, config))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, recipe):
        ctx.save_for_backward(x, weight)
        ctx.recipe = recipe
        flat = x.flatten(0, -2)
        return product(flat, weight, recipe.fprop_x, recipe.fprop_w, bias, x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        flat, flat_dy, r = x.flatten(0, -2), dy.flatten(0, -2).contiguous(), ctx.recipe
        if r.dequantized:
            weight, flat = (_values(t, c)[:, : t.shape[1]].to(x.dtype) for t, c in ((weight, r.fprop_w), (flat, r.fprop_x)))
            return (flat_dy @ weight).view(x.shape), flat_dy.T @ flat, flat_dy.sum(0), None
        if r.of_forward:
            weight, flat = (_values(t, c)[:, : t.shape[1]].to(x.dtype) for t, c in ((weight, r.fprop_w), (flat, r.fprop_x)))
        dx = product(flat_dy, weight.T, r.dgrad_dy, r.dgrad_w, None, x.dtype).view(x.shape)
        dw = product(flat_dy.T, flat.T, r.wgrad_dy, r.wgrad_x, None, x.dtype)
        return dx, dw, flat_dy.sum(0), None


class RecipeLinear(nn.Module):
    def __init__(self, linear: nn.Linear, recipe: Recipe) -> None:
        super().__init__()
        self.weight, self.bias, self.recipe = linear.weight, linear.bias, recipe

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias if self.bias is not None else self.weight.new_zeros(self.weight.shape[0], dtype=x.dtype)
        return _Linear.apply(x, self.weight, bias, self.recipe)


def with_recipe(model: nn.Module, recipe: Recipe, skip: tuple[str, ...] = ()) -> nn.Module:
    """Replace every `nn.Linear` of `model` but those whose path ends in one of `skip`, in place; parameters are shared."""
    for path, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            full = f"{path}.{name}".strip(".")
            if isinstance(child, nn.Linear) and not full.endswith(skip or ("\0",)):
                setattr(module, name, RecipeLinear(child, recipe))
    return model
