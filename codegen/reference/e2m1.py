"""e2m1 elements: encode with round-to-nearest-even or stochastically, decode, pack two to a byte.

Codes 0..7 stand for 0, .5, 1, 1.5, 2, 3, 4, 6 and bit 3 is the sign, so 8 is -0 (OCP Microscaling Formats 1.0, 5.3.3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp4compile.codegen.formats import E2M1_VALUES

# A magnitude reaches code i+1 when it passes threshold i. Ties go to the even code, so half of the thresholds are inclusive.
_PASSED = (
    (0.25, torch.gt),
    (0.75, torch.ge),
    (1.25, torch.gt),
    (1.75, torch.ge),
    (2.5, torch.gt),
    (3.5, torch.ge),
    (5.0, torch.gt),
)


def encode_nearest_ref(y: Tensor) -> Tensor:
    """Codes (uint8, one an element) of `y` (float32, any shape), saturating at 6. NaN becomes +6, as `cvt.rn.satfinite` has it."""
    magnitude = y.abs()
    code = torch.zeros_like(y, dtype=torch.uint8)
    for threshold, passes in _PASSED:
        code += passes(magnitude, threshold)
    return _with_sign(code, y)


def encode_stochastic_ref(y: Tensor, random_byte: Tensor) -> Tensor:
    """Codes of `y` (float32) where `random_byte` (uint8, same shape) moves each magnitude up to its upper neighbour.

    P(up) = floor(256 f) / 256 for a fraction f of the step: TransformerEngine's software model of `cvt.rs.satfinite.e2m1x4`.
    """
    magnitude = y.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    raised = magnitude + random_byte.float() / 256 * step
    code = torch.zeros_like(y, dtype=torch.uint8)
    for value in E2M1_VALUES[1:]:
        code += raised >= value
    return _with_sign(code, y)


def decode_ref(codes: Tensor) -> Tensor:
    """float32 values of `codes` (uint8, one an element)."""
    table = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], dtype=torch.float32, device=codes.device)
    return table[codes.int()]


def pack_ref(codes: Tensor) -> Tensor:
    """(..., K) codes to (..., K/2) bytes; the even index lies in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_ref(packed: Tensor) -> Tensor:
    """(..., K/2) bytes to (..., K) codes."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def _with_sign(magnitude_code: Tensor, y: Tensor) -> Tensor:
    nan = torch.isnan(y)
    code = magnitude_code | (torch.signbit(y) & ~nan).to(torch.uint8) << 3
    return code.masked_fill(nan, 7)
