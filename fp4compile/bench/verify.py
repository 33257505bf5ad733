"""Whether an operator is right, before it is timed: a speed is never reported of something wrong.

A product is compared with float64 sums of the exact values that its codes stand for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4compile.bench.ours import Product, Quantized
from fp4compile.codegen.reference.block import dequantize_ref

WORST_FLOAT32_ERROR: Final = 5e-4  # norm ratio; float16 products of two, summed in pairs, reach 2.7e-4
# Both outputs are one rounding of nearly the same sum, so their errors differ by chance only, and by less than this.
_CHANCE: Final = 1.02
_RANGE: Final = 100.0  # powers of two up and down
_ROWS_OF_X, _ROWS_OF_W = 64, 4096


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`wrong` is empty, or says what is; `errors` are norm ratios against float64."""

    wrong: str
    errors: dict[str, float]


@torch.no_grad()
def verify_product(product: Product, x: Tensor, dense: Tensor) -> Verdict:
    """Runs on the weight `dense` (n, k), or (groups, n, k), compared on some rows of x (m, k).

    In bfloat16 the global scales are left out, for the dense product rounds before they could be applied, and another number is rounded
    with another error.
    """
    left, weight = product.left(x), product.weight(dense)
    chosen = torch.linspace(0, len(x) - 1, min(len(x), _ROWS_OF_X), device=x.device).long()
    full = product.multiply(left, weight, torch.float32)
    half, again = (product.multiply((*left[:2], None), (*weight[:2], None)) for _ in range(2))
    if not torch.equal(half.view(torch.int16), again.view(torch.int16)):
        return Verdict(wrong="two runs differ", errors={})
    errors = _Errors()
    for rows, columns, truth, by, rounded in _truth(product, x, dense, chosen):
        errors.add("float32", full[rows][:, columns].double() - truth * by, truth * by)
        errors.add("bfloat16", half[rows][:, columns].double() - truth, truth)
        errors.add("dense bfloat16", rounded.double() - truth, truth)
    found = errors.ratios()
    if product.case.activation == "bf16":
        found["float32, x from 2^-100 to 2^100"] = _wide_range_error(product, x, dense, chosen)
    return Verdict(wrong=_what_is_wrong(found), errors=found)


def _wide_range_error(product: Product, x: Tensor, dense: Tensor, chosen: Tensor) -> float:
    """Of the worst row, when each has a power of two of its own: bfloat16's range does not fit into float16."""
    wide = (x.float() * torch.logspace(-_RANGE, _RANGE, len(x), base=2, device=x.device)[:, None]).bfloat16()
    full = product.multiply(product.left(wide), product.weight(dense), torch.float32)
    above, below = (torch.zeros(len(x), dtype=torch.float64, device=x.device) for _ in range(2))
    for rows, columns, truth, by, _ in _truth(product, wide, dense, chosen):
        above[rows] += (full[rows][:, columns].double() - truth * by).square().sum(1)
        below[rows] += (truth * by).square().sum(1)
    return (above[chosen] / below[chosen]).sqrt().max().item()


def _what_is_wrong(errors: dict[str, float]) -> str:
    for name in [name for name in errors if name.startswith("float32")]:
        if not errors[name] <= WORST_FLOAT32_ERROR:
            return f"{name.replace('float32', 'float32 output', 1)}: error {errors[name]:.2e}, {WORST_FLOAT32_ERROR:.0e} is allowed"
    ours, dense = errors["bfloat16"], errors["dense bfloat16"]
    if not ours <= _CHANCE * dense:
        return f"bfloat16 output: error {ours:.3e}, a dense bfloat16 product of the same values has {dense:.3e}"
    return ""


Part = tuple[Tensor, slice, Tensor, Tensor, Tensor]


def _truth(product: Product, x: Tensor, dense: Tensor, chosen: Tensor) -> Iterator[Part]:
    """(rows, columns, float64 sums of exact products, what global scales multiply them by, a dense bfloat16 product).

    Of parts of the output, to save memory. Decoded without their global scales both operands are exact in bfloat16.
    """
    left, scale, k = x, torch.ones((), device=x.device), product.case.k
    if product.case.activation == "fp4":
        left, scale = _decoded(product.quantize(x), k)
    weights = [t if product.case.groups else t[None] for t in product.quantize(dense)]
    group_of = product.group_of_rows(chosen)
    for group in group_of.unique().tolist():
        rows = chosen[group_of == group]
        codes, scales, b_scale = (t[group] for t in weights)
        for start in range(0, len(codes), _ROWS_OF_W):
            columns = slice(start, min(start + _ROWS_OF_W, len(codes)))
            right, _ = _decoded((codes[columns], scales[columns], b_scale), k)
            truth = left[rows].double() @ right.double().mT
            yield rows, columns, truth, (scale * b_scale).double(), F.linear(left[rows].bfloat16(), right.bfloat16())


def _decoded(quantized: Quantized, k: int) -> tuple[Tensor, Tensor]:
    codes, scales, global_scale = quantized
    return dequantize_ref(codes, scales)[:, :k], global_scale


class _Errors:
    """Sums of squares by name, of differences and of what they are differences to."""

    def __init__(self) -> None:
        self._squares: dict[str, tuple[float, float]] = {}

    def add(self, name: str, difference: Tensor, truth: Tensor) -> None:
        above, below = self._squares.get(name, (0.0, 0.0))
        self._squares[name] = (above + difference.square().sum().item(), below + truth.square().sum().item())

    def ratios(self) -> dict[str, float]:
        return {name: (above / below) ** 0.5 for name, (above, below) in self._squares.items()}
