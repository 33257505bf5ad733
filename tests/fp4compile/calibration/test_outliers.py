"""Which channels a rule finds, from statistics written down by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fp4compile.calibration.histogram import count_magnitudes
from fp4compile.calibration.outliers import CalibratedForAnotherWidth, OutlierRule, Statistic, outliers_of
from fp4compile.calibration.record import LayerStatistics


def statistics(x: Tensor) -> LayerStatistics:
    """Of one batch `x` (tokens, K)."""
    return LayerStatistics(
        sites=("up",),
        k=x.shape[1],
        tokens=x.shape[0],
        amax=x.abs().max().item(),
        channel_amax=x.abs().amax(0),
        channel_mean_square=x.square().mean(0),
        block_moments=torch.zeros(-(-x.shape[1] // 16), 16, 16),
        histogram=count_magnitudes(x),
        token_histogram=count_magnitudes(x.abs() / x.abs().amax(1, keepdim=True)),
    )


def chosen(x: Tensor, block: int = 16, **rule: Any):
    return outliers_of(statistics(x), OutlierRule(**rule), block, site="up", k=x.shape[1])


def ramp(k: int = 128) -> Tensor:
    """Channel i has the constant magnitude i + 1, in a shuffled place."""
    return (torch.randperm(k, generator=torch.Generator().manual_seed(0)) + 1.0).expand(4, k)


def test_channels_are_sorted_and_the_last_are_above_the_threshold() -> None:
    x = ramp()
    found = chosen(x, threshold=0.75, multiple=16, most=1.0)
    assert found.count == found.wanted == 32  # 97 .. 128 are above 0.75 * 128
    assert x[0, found.order.long()].tolist() == list(range(1, 129))


def test_their_number_is_rounded_up_and_bounded() -> None:
    assert chosen(ramp(), threshold=0.8, multiple=64, most=1.0).count == 64
    held_back = chosen(ramp(), channels=100, multiple=16, most=0.3)
    assert (held_back.count, held_back.wanted, held_back.describe()) == (32, 112, "arc32 of 112")
    assert chosen(ramp(), fraction=0.2, multiple=16, most=1.0).count == 32
    assert chosen(ramp(), channels=64, most=0.25).describe() == "arc0 of 64"
    assert chosen(ramp(), channels=0) is None


def test_a_share_of_the_largest_counts_elements() -> None:
    x = torch.full((4, 128), 1.0)
    x[0, :32], x[1, 7] = 16.0, 16.0  # of token 0 an element in four, of token 1 one, of the others all are above an eighth
    share = (32 + 1 + 128 + 128) / 512
    assert chosen(x, token_threshold=0.125, multiple=16, most=1.0).count == math.ceil(share * 128 / 16) * 16
    assert chosen(x, element_threshold=0.125, multiple=16, most=1.0).count == 16  # 33 of 512


def test_blocks_stand_and_fall_with_their_largest_channel() -> None:
    x = torch.ones(4, 64)
    x[:, 20], x[:, 50] = 9.0, 8.0
    found = chosen(x, threshold=0.5, multiple=16, reorder=False, most=1.0)
    assert found.order.tolist() == [0, 2, 3, 1] and found.count == 32


def test_the_statistic_decides_what_is_large() -> None:
    x = torch.ones(16, 32)
    x[0, 3], x[:, 9] = 10.0, 5.0  # one spike, and a channel that is always large
    assert chosen(x, channels=16, most=1.0, multiple=16).order[-1] == 3
    assert chosen(x, channels=16, most=1.0, multiple=16, statistic=Statistic.RMS).order[-1] == 9


def test_padding_comes_first_and_dead_channels_are_no_outliers() -> None:
    x = ramp(40)
    found = chosen(x, block=32, channels=32, multiple=32, most=1.0)
    assert sorted(found.order.tolist()) == list(range(64)) and set(found.order[:24].tolist()) == set(range(40, 64))
    assert chosen(torch.zeros(4, 64), threshold=0.125) is None


def test_equal_statistics_give_one_value_and_another_width_is_refused() -> None:
    assert chosen(ramp(), channels=16, multiple=16) is chosen(ramp(), channels=16, multiple=16)
    with pytest.raises(CalibratedForAnotherWidth, match="up: it multiplies 96 channels, and its calibration saw 128"):
        outliers_of(statistics(ramp()), OutlierRule(channels=16), 16, site="up", k=96)
