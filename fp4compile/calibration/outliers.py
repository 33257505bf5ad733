"""Choose the channels of an activation that are quantized twice, from what a calibration saw of it (ARCQuant, arXiv 2601.07475)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4compile.calibration.record import LayerStatistics
from fp4compile.codegen.errors import Fp4CompileError
from fp4compile.codegen.formats import round_up
from fp4compile.codegen.outliers import Outliers


class CalibratedForAnotherWidth(Fp4CompileError, ValueError):
    template = "{site}: it multiplies {found} channels, and its calibration saw {needed}. Calibrate the model that is compiled."


class Statistic(StrEnum):
    """What channels are ranked by."""

    AMAX = "amax"  # largest |x|
    RMS = "rms"  # root of the mean square


@dataclass(frozen=True, kw_only=True)
class OutlierRule:
    """How many channels are outliers, one of the five ways, and which. The fields are the keys of a policy's `arc` table.

    threshold: those whose statistic is above this share of the largest channel's (the paper's rule, 1/8 of the layer's maximum).
    element_threshold, token_threshold: as many as there are, on average, elements in a row above this share of the largest of all, or of
    the largest of their token (the authors' code).
    channels, fraction: that many, or that share of K.
    multiple: the count is rounded up to it. reorder: channel by channel, sorted; else whole blocks. most: bound on the share of K.
    """

    statistic: Statistic = Statistic.AMAX
    threshold: float | None = None
    element_threshold: float | None = None
    token_threshold: float | None = None
    channels: int | None = None
    fraction: float | None = None
    multiple: int = 64
    reorder: bool = True
    most: float = 0.25


def outliers_of(statistics: LayerStatistics, rule: OutlierRule, block: int, *, site: str, k: object) -> Outliers | None:
    """The outliers of the activation that `site` multiplies along `k` channels, in blocks of `block`; None where the rule finds none.

    Where `most` leaves less than one `multiple`, the value says so, with a count of 0: reports must show it, and the order is still one.
    Equal statistics give one and the same value. Raises `CalibratedForAnotherWidth`.
    """
    if k != statistics.k:
        raise CalibratedForAnotherWidth(site=site, found=k, needed=statistics.k)
    return _chosen(_Source(digest=statistics.digest, read=lambda: statistics), rule, block)


@dataclass(frozen=True)
class _Source:
    """Statistics by their digest, for a cache."""

    digest: str
    read: Callable[[], LayerStatistics]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Source) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)


@lru_cache(maxsize=4096)
def _chosen(source: _Source, rule: OutlierRule, block: int) -> Outliers | None:
    statistics = source.read()
    ranked = statistics.channel_amax if rule.statistic is Statistic.AMAX else statistics.channel_mean_square.sqrt()
    padded = round_up(statistics.k, block)
    ranked = F.pad(ranked.float(), (0, padded - statistics.k), value=-1.0)  # padding is no outlier, and comes first
    wanted = min(round_up(math.ceil(_count(ranked, statistics, rule, block)), rule.multiple), padded)
    count = min(wanted, int(rule.most * statistics.k) // rule.multiple * rule.multiple)
    if not wanted:
        return None
    order = torch.argsort(ranked if rule.reorder else _by_block(ranked, block), stable=True)
    return Outliers(order=order.to(torch.int32), count=count, wanted=wanted)


def _count(ranked: Tensor, statistics: LayerStatistics, rule: OutlierRule, block: int) -> float:
    """How many channels the rule asks for, before rounding up."""
    if rule.channels is not None:
        return rule.channels
    if rule.fraction is not None:
        return rule.fraction * statistics.k
    if rule.token_threshold is not None:
        return statistics.share_above_in_token(rule.token_threshold) * statistics.k
    if rule.element_threshold is not None:
        return statistics.share_above(rule.element_threshold * statistics.amax) * statistics.k
    assert rule.threshold is not None, "a policy's table has one of the five"
    each = ranked if rule.reorder else _by_block(ranked, block).repeat_interleave(block)
    return int((each > rule.threshold * ranked.max()).sum())


def _by_block(ranked: Tensor, block: int) -> Tensor:
    """A block stands and falls with its largest channel."""
    return ranked.unflatten(-1, (-1, block)).amax(-1)
