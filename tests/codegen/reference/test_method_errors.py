"""Quantization error of every weight method on synthetic data, within 2% of anchors that another program computed in numpy.

100 sum(err^2) / sum(x^2) over 2^20 independent values (1024 x 1024). Anchors are means of five seeds, single ones spread by at most 0.5%
(Student t3 1.7%, tiles on Student t5 2.8%); those in `SINGLE_SEED` are of one.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.reference.block import dequantize_ref, quantize_ref

SWEEP_448 = "sweep at E = 448"  # no policy asks for it: blocks near the maximum cannot choose a larger scale
CONFIGS = {
    "nvfp4": QuantConfig(),
    "4/6 mse": QuantConfig(scale_rule="four_over_six"),
    "4/6 mae": QuantConfig(scale_rule="four_over_six_mae"),
    "nvint4": QuantConfig(format="nvint4"),
    "mixfp4": QuantConfig(format="mixfp4"),
    "if4": QuantConfig(format="if4"),
    SWEEP_448: QuantConfig(scale_rule="sweep", global_scale="static", static_amax=1.0),
    "sweep": QuantConfig(scale_rule="sweep"),
    "16x16": QuantConfig(block="16x16"),
}
ANCHORS = {
    "gaussian": (0.906, 0.757, 0.780, 0.745, 0.617, 0.615, 0.660, 0.660, 1.239),
    "student5": (0.853, 0.752, 0.772, 1.041, 0.682, 0.681, 0.675, 0.675, 1.862),
    "student3": (0.820, 0.754, 0.770, 1.303, 0.720, 0.720, 0.697, 0.696, 3.289),
    "laplace": (0.860, 0.759, 0.782, 1.052, 0.702, 0.701, 0.680, 0.680, 1.674),
    "uniform": (1.033, 0.762, 0.782, 0.443, 0.434, 0.431, 0.782, 0.617, 1.215),
}
# (4/6 absmax, MixFP4 with 4/6 for its e2m1 blocks, share of integer blocks in MixFP4)
SINGLE_SEED = {
    "gaussian": (0.798, 0.598, 0.63),
    "student5": (0.806, 0.661, 0.47),
    "student3": (0.791, 0.690, 0.38),
    "laplace": (0.818, 0.679, 0.42),
    "uniform": (0.796, 0.424, 0.93),
}
# What this package's own combinations reach. Not published: asserted so that a change is noticed.
OWN = {
    "gaussian": (0.817, 0.762, 0.547, 0.546, 0.667),
    "student5": (0.783, 0.742, 0.615, 0.615, 0.955),
    "uniform": (0.842, 0.797, 0.366, 0.363, 0.374),
}
OWN_CONFIGS = (
    QuantConfig(scale_rule="soar"),
    QuantConfig(scale_rule="soar_decoupled"),
    QuantConfig(format="mixfp4", scale_rule="sweep"),
    QuantConfig(format="if4", scale_rule="sweep"),
    QuantConfig(format="nvint4", scale_rule="sweep"),
)


def draw(name: str, seed: int = 0, rows: int = 1024) -> Tensor:
    rng, shape = np.random.default_rng(seed), (rows, 1024)
    if name.startswith("student"):
        values = rng.standard_t(int(name[-1]), shape)
    else:
        values = {"gaussian": rng.standard_normal, "laplace": lambda s: rng.laplace(size=s), "uniform": lambda s: rng.uniform(-1, 1, s)}[
            name
        ](shape)
    return torch.from_numpy(values.astype(np.float32))


def relative_error(x: Tensor, config: QuantConfig) -> float:
    return 100 * ((x - dequantize_ref(*quantize_ref(x, config))).double().square().sum() / x.double().square().sum()).item()


def at_448(x: Tensor) -> QuantConfig:
    """A sweep under the global scale of plain rounding."""
    return QuantConfig(scale_rule="sweep", global_scale="static", static_amax=x.abs().max().item() * 256 / 448)


@pytest.mark.parametrize("name", ANCHORS)
def test_relative_error_of_each_rule(name: str):
    x = draw(name)
    for (rule, config), anchor in zip(CONFIGS.items(), ANCHORS[name], strict=True):
        assert relative_error(x, at_448(x) if rule == SWEEP_448 else config) == pytest.approx(anchor, rel=0.02), rule


@pytest.mark.parametrize("name", SINGLE_SEED)
def test_relative_error_of_what_was_measured_on_one_seed(name: str):
    x = draw(name)
    absmax, mixed_four_over_six, share = SINGLE_SEED[name]
    tolerance = 0.025 if name == "student3" else 0.02  # one draw against another: their spread is 1.7%
    assert relative_error(x, QuantConfig(scale_rule="four_over_six_absmax")) == pytest.approx(absmax, rel=tolerance)
    assert relative_error(x, QuantConfig(format="mixfp4", scale_rule="four_over_six")) == pytest.approx(mixed_four_over_six, rel=tolerance)
    _, scales, _ = quantize_ref(x, QuantConfig(format="mixfp4"))
    assert (scales >= 0x80).float().mean().item() == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("name", OWN)
def test_relative_error_of_unpublished_combinations(name: str):
    x = draw(name, rows=256)
    for config, expected in zip(OWN_CONFIGS, OWN[name], strict=True):
        assert relative_error(x, config) == pytest.approx(expected, rel=0.03), config.describe()
