"""Whether an operator is right, before it is timed: a speed is never reported of something wrong.

Quantize agrees bit for bit with the reference. A product is compared with float64 sums of the exact values that its codes stand for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4compile.bench.case import QuantizeCase
from fp4compile.bench.ours import Product, Quantized, quantize_call, seed_on
from fp4compile.codegen.formats import GlobalScale
from fp4compile.codegen.reference.block import dequantize_ref, quantize_ref

WORST_FLOAT32_ERROR: Final = 5e-4  # norm ratio; float16 products of two, summed in pairs, reach 2.7e-4
# Both outputs are one rounding of nearly the same sum, so their errors differ by chance only, and by less than this.
_CHANCE: Final = 1.02
_ROWS_OF_X, _ROWS_OF_W, _SAMPLE = 64, 4096, (384, 1024)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`wrong` is empty, or says what is; `errors` are norm ratios against float64."""

    wrong: str
    errors: dict[str, float]


@torch.no_grad()
def verify_quantize(case: QuantizeCase, device: torch.device) -> Verdict:
    """All bits of a sample with hard values in it."""
    x, seed = _hard_sample(case).to(device), seed_on(device)
    found = [t.cpu() for t in quantize_call(case, x, seed)()]  # type: ignore[attr-defined]
    axes = (-1, -2) if case.axis is None else (case.axis,)
    copies = [quantize_ref(x.cpu(), config, axis=axis, seed=seed.cpu()) for axis, config in zip(axes, case.configs, strict=True)]
    names = [f"{name}{' of columns' if i else ''}" for i in range(len(copies)) for name in ("codes", "scales", "global scale")]
    for name, a, b in zip(names, found, itertools.chain(*copies), strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return Verdict(wrong=f"{name}: {a.dtype} {tuple(a.shape)} where the reference has {b.dtype} {tuple(b.shape)}", errors={})
        different = (_bits(a) != _bits(b)).sum().item()
        if different:
            return Verdict(wrong=f"{name}: {different} of {a.numel()} differ from the reference", errors={})
    return Verdict(wrong="", errors={})


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
    return Verdict(wrong=_what_is_wrong(found), errors=found)


def _what_is_wrong(errors: dict[str, float]) -> str:
    if not errors["float32"] <= WORST_FLOAT32_ERROR:
        return f"float32 output: error {errors['float32']:.2e}, {WORST_FLOAT32_ERROR:.0e} is allowed"
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


def _hard_sample(case: QuantizeCase) -> Tensor:
    """bfloat16 with ties, zeros, tiny and huge blocks, and where a scale is shared by few a NaN and an Inf."""
    rows, columns = min(case.rows, _SAMPLE[0]), min(case.columns, _SAMPLE[1])
    generator = torch.Generator().manual_seed(rows * columns)
    x = torch.randn(rows, columns, generator=generator)
    x[1::7] = torch.randint(-12, 13, x[1::7].shape, generator=generator) / 2.0
    x[2::11], x[3::13] = 0.0, -0.0
    x[4::17] *= 2.0**-60
    x[5::19] *= 2.0**40 if case.config.global_scale is GlobalScale.ROW else 30.0
    x[:, -3:] = 6.0
    if not any(config.hadamard for config in case.configs):
        x[rows // 2, columns // 2], x[rows // 3, 0] = float("nan"), float("-inf")
    return x.bfloat16()


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.uint8)
