"""MS-EDEN (arXiv 2601.22813): unbiased 4-bit values without a draw for each of them.

Values are rounded to nearest after a rotation with random signs, which makes what rounding loses a matter of length alone, on average
over the signs. So the block scales of each 128 values x, which became q, are multiplied by S = sum x^2 / sum x q, and the product is
rounded stochastically to e4m3: one draw a block. The rotation is the caller's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp4compile.codegen.formats import E4M3_MAX, EDEN_GROUP, EDEN_WIDEN
from fp4compile.codegen.reference.block_scales import sum_adjacent
from fp4compile.codegen.reference.e2m1 import decode_ref
from fp4compile.codegen.reference.philox import philox_ref

EDEN_SIXTH = torch.tensor(EDEN_WIDEN / 6, dtype=torch.float32).item()
_FRACTION_BITS = 20  # those of a float32 mantissa below e4m3's three


def eden_scales_ref(x_encoded: Tensor, codes: Tensor, scale: Tensor, seed: Tensor) -> Tensor:
    """Block scales (..., R, Kp/16), float32 holding e4m3 values, in place of `scale`.

    `x_encoded` and `codes` (..., R, Kp): x S and the codes (uint8) that it became under `scale`. Block b, counted through the whole tensor,
    draws from the first word of counter (b, 0, 0, 0) under `seed` (int64 scalar tensor).
    """
    magnitude = x_encoded.abs()
    quantized = decode_ref(codes & 7) * scale.repeat_interleave(16, -1)
    length = sum_adjacent((magnitude * magnitude).unflatten(-1, (-1, EDEN_GROUP)))
    projection = sum_adjacent((magnitude * quantized).unflatten(-1, (-1, EDEN_GROUP)))
    ratio = length / torch.where(projection > 0, projection, 1.0)
    # A group that is zero, or whose sums left float32's range, or that holds an Inf or NaN, keeps its scales.
    correction = torch.where((projection > 0) & (ratio < torch.inf), ratio, 1.0)
    word = philox_ref(seed, torch.arange(scale.numel(), device=scale.device))[:, 0].view(scale.shape)
    return stochastic_e4m3_ref(scale * correction.repeat_interleave(EDEN_GROUP // 16, -1), word)


def stochastic_e4m3_ref(target: Tensor, word: Tensor) -> Tensor:
    """float32 holding the e4m3 neighbours of `target` >= 0, saturating at 448; P(up) is the place between them, to 2^-20 of a step.

    `word`: random integers of 20 bits or more; the lowest 20 count. Adding them below e4m3's mantissa and cutting off rounds up as often
    as it should.
    """
    target = target.clamp(max=E4M3_MAX)
    fraction = (word & (1 << _FRACTION_BITS) - 1).float() * 2.0**-_FRACTION_BITS
    power_of_two = (target.view(torch.int32) & 0x7F800000).view(torch.float32)
    raised = target + fraction * (power_of_two * 0.125).clamp(min=2.0**-9)
    normal = (raised.view(torch.int32) & ~0xFFFFF).view(torch.float32)
    return torch.where(raised < 2.0**-6, torch.floor(raised * 512) / 512, normal)
