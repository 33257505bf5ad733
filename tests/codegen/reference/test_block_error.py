"""Quantization error on synthetic data against published-style anchors: a wrong recipe that is bit-stable would still fail here.

Anchors: 100 sum(err^2) / sum(x^2) over 2^20 independent values, computed once in numpy by another program; seeds spread by up to
1.7 % (Student t3) and 2.8 % (16x16 tiles on heavy tails), so 3 % is the tolerance, and 6 % for tiles on Student's t.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.reference.block import dequantize_ref, quantize_ref

ANCHORS = {
    #            NVFP4  4/6 MSE  4/6 MAE  4/6 absmax  16x16
    "gaussian": (0.906, 0.757, 0.780, 0.798, 1.239),
    "student5": (0.853, 0.752, 0.772, 0.806, 1.862),
    "student3": (0.820, 0.754, 0.770, 0.791, 3.289),
    "laplace": (0.860, 0.759, 0.782, 0.818, 1.674),
    "uniform": (1.033, 0.762, 0.782, 0.796, 1.215),
}
CONFIGS = (
    QuantConfig(),
    QuantConfig(scale_rule="four_over_six"),
    QuantConfig(scale_rule="four_over_six_mae"),
    QuantConfig(scale_rule="four_over_six_absmax"),
    QuantConfig(block="16x16"),
)


def _draw(name: str) -> Tensor:
    torch.manual_seed(5)  # of t3's first seeds, 0 and 4 hold one value of over 250 that outweighs the rest
    shape = (1024, 1024)
    if name.startswith("student"):
        return torch.distributions.StudentT(float(name[-1])).sample(shape)
    if name == "laplace":
        return torch.distributions.Laplace(0.0, 1.0).sample(shape)
    return torch.randn(shape) if name == "gaussian" else torch.rand(shape) * 2 - 1


def _round_trip(x: Tensor, config: QuantConfig, seed: int | None = None) -> Tensor:
    return dequantize_ref(*quantize_ref(x, config, seed=None if seed is None else torch.tensor(seed)))


def _relative_error(x: Tensor, y: Tensor) -> float:
    return 100 * ((x - y).double().square().sum() / x.double().square().sum()).item()


@pytest.mark.parametrize("name", ANCHORS)
def test_relative_error_of_each_rule(name: str):
    x = _draw(name)
    for config, anchor in zip(CONFIGS, ANCHORS[name], strict=True):
        tolerance = 0.06 if config.is_tile and name.startswith("student") else 0.03
        assert _relative_error(x, _round_trip(x, config)) == pytest.approx(anchor, rel=tolerance), config.describe()


def test_stochastic_rounding_error_and_its_clipping_bias():
    x = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    config = QuantConfig(rounding="stochastic")
    draws = [_round_trip(x, config, seed) for seed in range(16)]
    assert _relative_error(x, draws[0]) == pytest.approx(1.885, rel=0.03)
    mean = torch.stack(draws).mean(0)
    gain = ((mean * x).double().sum() / x.double().square().sum()).item()
    # Nearest-rounded scales let 3.4 % of the values exceed 6 and clip: 0.9966, less the 1/512 step lost by the 8-bit draw.
    assert gain == pytest.approx(0.9966, abs=0.0015)
    assert _relative_error(x, mean) < _relative_error(x, _round_trip(x, QuantConfig()))


def test_a_scale_wider_by_17_16_clips_nothing_and_makes_draws_unbiased():
    x = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    config, narrow = (QuantConfig(scale_rule=rule, rounding="stochastic") for rule in ("amax_17_16", "amax"))
    draws = [_round_trip(x, config, seed) for seed in range(16)]
    assert _relative_error(x, draws[0]) == pytest.approx(2.34, rel=0.03)
    mean = torch.stack(draws).mean(0)
    gain = ((mean * x).double().sum() / x.double().square().sum()).item()
    assert gain == pytest.approx(1, abs=0.0012)  # the 8-bit draw is short of 1/512 of a step on the mean
    largest = x.unflatten(-1, (-1, 16)).abs().amax(-1)

    def bias_of_maxima(values: torch.Tensor) -> float:
        return ((values.unflatten(-1, (-1, 16)).abs().amax(-1) - largest) / largest).mean().item()

    clipped = [_round_trip(x, narrow, seed) for seed in range(16)]
    assert bias_of_maxima(torch.stack(clipped).mean(0)) < -0.008 and abs(bias_of_maxima(mean)) < 0.003


def test_stochastic_draws_depend_on_the_seed_alone():
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    config = QuantConfig(rounding="stochastic")
    first, again, other = (quantize_ref(x, config, seed=torch.tensor(s)) for s in (5, 5, 6))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    nearest = quantize_ref(x, QuantConfig())
    for draw in (first, other):
        assert torch.equal(draw[1].view(torch.uint8), nearest[1].view(torch.uint8)), "scales are never drawn"
