"""Which channels of an activation are quantized twice, chosen by a calibration: plain data that passes put into a graph."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Outliers:
    """The last `count` channels, in `order`, get residual blocks (ARCQuant, arXiv 2601.07475).

    order: int32 (Kp,) on the CPU, a permutation of the channels, K padded with zeros to whole blocks; or (Kp/block,), one of whole blocks.
    wanted: how many the rule would have had; more than `count` where a bound held it back.
    """

    order: Tensor
    count: int
    wanted: int

    @cached_property
    def digest(self) -> str:
        """Changes with the order; two values with equal orders share one constant of a graph."""
        return hashlib.sha256(self.order.numpy().tobytes()).hexdigest()

    def describe(self) -> str:
        """As reports append it to a format: `arc320`."""
        return f"arc{self.count}" if self.wanted <= self.count else f"arc{self.count} of {self.wanted}"
