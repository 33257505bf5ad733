"""Counts of magnitudes by exponent and the three leading bits of the fraction, so that any threshold may be asked about afterwards.

A bin is the upper 11 bits after the sign of a float32: bin 8 (e + 127) + f holds 2^e (1 + f/8) <= |x| < 2^e (1 + (f + 1)/8), and the first
8 bins hold zero and subnormals.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

BINS: Final = 1 << 11
_SHIFT: Final = 20


def count_magnitudes(x: Tensor) -> Tensor:
    """int64 (BINS,) of the finite float32 `x`, on its device."""
    bins = (x.abs().view(torch.int32) >> _SHIFT).flatten()
    return torch.bincount(bins, minlength=BINS)


def share_above(histogram: Tensor, threshold: float) -> float:
    """Share of the elements above `threshold`; within its bin they are taken to lie evenly."""
    total = int(histogram.sum())
    if not total or threshold < 0:
        return float(bool(total))
    at = torch.tensor(threshold, dtype=torch.float32)
    place = int(at.view(torch.int32) >> _SHIFT)
    low, high = (torch.tensor(b << _SHIFT, dtype=torch.int32).view(torch.float32).double() for b in (place, place + 1))
    inside = 1 - ((at.double() - low) / (high - low)).item() if 0 < place < BINS - 1 else 0.0  # zeros are above nothing
    return (int(histogram[place + 1 :].sum()) + inside * int(histogram[place])) / total
