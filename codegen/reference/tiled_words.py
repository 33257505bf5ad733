"""The order of bits in the codes of a tiled weight: 16 codes of a block are two words, from which neighbours come out by a turn and a mask.

A kernel wants codes 2 p and 2 p + 1 with their signs in bits 15 and 31 and their magnitudes in bits 6 to 8 and 22 to 24, where bfloat16 has
the boundary of exponent and mantissa. Turned left by 2 p, word 0 (p = 0, 2, 5) or word 1 (p = 1, 3, 6) has them there, and for p = 4 and 7
word 0 in the bits `FROM_FIRST` and word 1 in the others. Every bit is used once: turns by all even numbers cover two words exactly.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

IN_FIRST: Final = (0, 2, 5)
IN_SECOND: Final = (1, 3, 6)
FROM_FIRST: Final = 0x06030603
_WORD: Final = 0xFFFFFFFF


def permute_words(codes: Tensor) -> Tensor:
    """Packed codes (..., 8 n) uint8 in the order that kernels read, 16 codes at a time."""
    first, second = _words(codes)
    found = [torch.zeros_like(first), torch.zeros_like(second)]
    for pair in range(8):
        both = (first if pair < 4 else second) >> 8 * (pair % 4)
        spread = (both & 0x7) << 6 | (both & 0x8) << 12 | (both & 0x70) << 18 | (both & 0x80) << 24
        turned = (spread >> 2 * pair | spread << (32 - 2 * pair)) & _WORD
        for word, mask in enumerate(_masks(pair)):
            found[word] |= turned & mask
    return _codes(found[0], found[1], codes.shape)


def restore_words(codes: Tensor) -> Tensor:
    """The inverse of `permute_words`."""
    first, second = _words(codes)
    found = [torch.zeros_like(first), torch.zeros_like(second)]
    for pair in range(8):
        mask = _masks(pair)
        word = (first & mask[0]) | (second & mask[1])
        turned = (word << 2 * pair | word >> (32 - 2 * pair)) & _WORD
        both = (turned >> 6) & 0x7 | (turned >> 12) & 0x8 | (turned >> 18) & 0x70 | (turned >> 24) & 0x80
        found[pair // 4] |= both << 8 * (pair % 4)
    return _codes(found[0], found[1], codes.shape)


def _masks(pair: int) -> tuple[int, int]:
    """Which bits of either word belong to `pair`, before the turn."""
    mask = (0x81C081C0 >> 2 * pair | 0x81C081C0 << (32 - 2 * pair)) & _WORD
    first = _WORD if pair in IN_FIRST else 0 if pair in IN_SECOND else FROM_FIRST
    return mask & first, mask & ~first


def _words(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Two int64 tensors of 32 bits each; the memory of a GPU and of every CPU that torch runs on is little-endian."""
    words = codes.contiguous().view(torch.int32).view(*codes.shape[:-1], -1, 2).long() & _WORD
    return words[..., 0], words[..., 1]


def _codes(first: Tensor, second: Tensor, shape: torch.Size) -> Tensor:
    return torch.stack((first, second), -1).to(torch.int32).view(torch.uint8).view(shape)
