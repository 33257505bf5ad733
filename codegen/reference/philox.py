"""Philox4x32-10 (Salmon et al., SC 2011) in int64 arithmetic: the random bytes of stochastic rounding.

One counter value serves one group of 16 elements: 4 words of 4 bytes, byte i of word j belonging to element 4 j + i. A kernel that
walks the tensor in any order therefore draws the same bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox_bytes_ref(seed: Tensor, groups: int) -> Tensor:
    """(groups, 16) random uint8 for the 64-bit `seed` (int64 scalar tensor); group g uses counter (g, 0, 0, 0)."""
    words = philox_ref(seed, torch.arange(groups, device=seed.device, dtype=torch.int64))
    shifts = torch.tensor([0, 8, 16, 24], device=seed.device)
    return (words[..., None] >> shifts & 0xFF).to(torch.uint8).flatten(-2)


def philox_ref(seed: Tensor, counter: Tensor) -> Tensor:
    """(n, 4) words (int64 holding uint32) for counters (n,) below 2^32."""
    key = [seed & _MASK, seed >> 32 & _MASK]
    zero = torch.zeros_like(counter)
    c = [counter & _MASK, zero, zero, zero]
    for _ in range(10):
        hi0, lo0 = _multiply(_MULTIPLIERS[0], c[0])
        hi1, lo1 = _multiply(_MULTIPLIERS[1], c[2])
        c = [hi1 ^ c[1] ^ key[0], lo1, hi0 ^ c[3] ^ key[1], lo0]
        key = [(key[0] + _WEYL[0]) & _MASK, (key[1] + _WEYL[1]) & _MASK]
    return torch.stack(c, dim=-1)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of a 32x32-bit product, through 16-bit halves so that int64 never overflows."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = (low >> 16) + (high & _MASK)
    return (high >> 32 << 16) + (middle >> 16), (middle & 0xFFFF) << 16 | low & 0xFFFF
