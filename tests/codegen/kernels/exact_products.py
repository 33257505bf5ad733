"""Operands whose product float32 sums without error in any order, so that a kernel must agree with the reference in every bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HIGH_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KINDS = ("nvfp4", "mxfp4", *HIGH_PRECISION)


@dataclass(frozen=True, kw_only=True)
class Side:
    """One operand as `fp4::scaled_mm` takes it."""

    data: Tensor
    scales: Tensor | None
    global_scale: Tensor | None

    def arguments(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.data, self.scales, self.global_scale


def exact_side(kind: str, shape: tuple[int, ...], generator: torch.Generator, *, global_scale: str = "none") -> Side:
    """`shape` is (..., R, K). Values are multiples of 1/4 up to 12, so K = 4096 products stay below 2^24 sixteenths.

    `global_scale`: "none", "tensor", "row" or "1x128"; these are arbitrary float32, for the epilogue rounds in a fixed order.
    """
    *batch, rows, k = shape
    device = generator.device
    made = None
    if global_scale != "none":
        numbers = {"row": (rows,), "1x128": (rows, -(-k // 128))}.get(global_scale, ())
        made = torch.rand((*batch, *numbers), generator=generator, device=device) + 0.01
    if kind in HIGH_PRECISION:
        data = torch.randint(-48, 49, shape, generator=generator, device=device) / 4
        return Side(data=data.to(HIGH_PRECISION[kind]), scales=None, global_scale=made)
    block = 16 if kind == "nvfp4" else 32
    padded = -(-k // block) * block
    data = torch.randint(0, 256, (*batch, rows, padded // 2), generator=generator, device=device).to(torch.uint8)
    # Scales 0.5, 1, 2 and, where there is a mantissa, 1.5.
    choices = (0x30, 0x38, 0x3C, 0x40) if kind == "nvfp4" else (126, 127, 128)
    pick = torch.randint(0, len(choices), (*batch, rows, padded // block), generator=generator, device=device)
    scales = torch.tensor(choices, dtype=torch.uint8, device=device)[pick]
    return Side(data=data, scales=scales.view(torch.float8_e4m3fn if kind == "nvfp4" else torch.float8_e8m0fnu), global_scale=made)
