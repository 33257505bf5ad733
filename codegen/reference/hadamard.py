"""Random Hadamard transform along the last dimension, as in arXiv 2509.25149 and TransformerEngine.

y = x diag(sign) H / sqrt(n), sign first, H in Sylvester order. It is orthogonal, so rotating both operands of a matmul along their
contraction dimension cancels inside the product.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Bit i set: element i is negated. The vector that TransformerEngine and torchao use for every layer; longer sizes repeat it.
SIGN_MASK = 0xD7E8


def signs(size: int, device: torch.device | None = None) -> Tensor:
    return torch.tensor([-1.0 if SIGN_MASK >> (i % 16) & 1 else 1.0 for i in range(size)], device=device)


def hadamard_ref(x: Tensor, size: int) -> Tensor:
    """Rotate groups of `size` (16, 32, 64 or 128) along the last dimension of `x`, whose length is a multiple of `size`.

    float32 butterflies, nearest stride first, one multiplication by 1/sqrt(size), one rounding to `x.dtype`.
    """
    y = x.float().unflatten(-1, (-1, size)) * signs(size, x.device)
    stride = 1
    while stride < size:
        pair = y.unflatten(-1, (-1, 2, stride))
        a, b = pair.unbind(-2)
        y = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        stride *= 2
    return (y * (1 / math.sqrt(size))).flatten(-2).to(x.dtype)
