"""The sums of a measured operand, against a plain loop over its blocks in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.reference.block import dequantize_ref, quantize_ref
from fp4compile.diagnosis.measure import measure

CONFIGS = {
    "1x16": QuantConfig(),
    "16x16": QuantConfig(block="16x16"),
    "row scale": QuantConfig(global_scale="row"),
    "4/6": QuantConfig(scale_rule="four_over_six"),
    "mxfp4": QuantConfig(format="mxfp4"),
}


def heavy_tailed(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, columns, generator=generator) / torch.rand(rows, columns, generator=generator).sqrt()
    x[1, :32] = 0
    return x


def by_hand(x: torch.Tensor, config: QuantConfig) -> dict[str, float]:
    """Block by block, from codes and scales of the reference."""
    codes, scales, decode = quantize_ref(x, config)
    source, got = x.double().numpy(), dequantize_ref(codes, scales, decode).double().numpy()[:, : x.shape[1]]
    unit = scales.double().numpy() * np.broadcast_to(decode.double().numpy().reshape(-1, 1), (x.shape[0], 1))
    size, tall = config.fmt.block, 16 if config.block == "16x16" else 1
    found = dict.fromkeys(("blocks", "clipped", "clipped_away", "flushed", "saturated"), 0.0)
    for top in range(0, x.shape[0], tall):
        for left in range(0, x.shape[1], size):
            block = np.abs(source[top : top + tall, left : left + size])
            limit = 6 * unit[top, left // size] * (1 + 2.0**-20)
            found["saturated"] += (block > limit).sum()
            if block.max() > 0:
                found["blocks"] += 1
                found["flushed"] += float(not got[top : top + tall, left : left + size].any())
                if block.max() > limit:
                    found["clipped"] += 1
                    found["clipped_away"] += 1 - limit / block.max()
    error = got - source
    return found | {
        "elements": source.size,
        "nonzero": (source != 0).sum(),
        "underflowed": ((source != 0) & (got == 0)).sum(),
        "signal": (source**2).sum(),
        "noise": (error**2).sum(),
        "magnitude": np.abs(source).sum(),
        "drift": error.sum(),
        "gain": (error * source).sum(),
        "amax": np.abs(source).max(),
    }


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("rows", "columns"), [(32, 64), (21, 72)])
def test_sums_equal_a_plain_loop(config: QuantConfig, rows: int, columns: int) -> None:
    x = heavy_tailed(rows, columns)
    (codes, *_), sums = measure(x, config, axis=-1, draws=1)
    assert torch.equal(codes, quantize_ref(x, config)[0])
    for name, value in by_hand(x, config).items():
        assert getattr(sums, name) == pytest.approx(value, rel=1e-5, abs=1e-4), name
    assert sums.calls == 1 and sums.not_finite == 0


def test_along_the_other_axis_the_transposed_matrix_is_measured() -> None:
    x = heavy_tailed(64, 40)
    got, want = (vars(measure(t, QuantConfig(), axis=axis, draws=1)[1]) for t, axis in ((x, -2), (x.mT.contiguous(), -1)))
    assert got == pytest.approx(want, rel=1e-12)  # torch adds up the two layouts in orders of their own, which the processor decides


def test_the_rotation_comes_first() -> None:
    x = torch.zeros(16, 64)
    x[:, 5] = 1.0  # a lone value becomes sixteen equal ones
    plain, turned = (measure(x, QuantConfig(hadamard=h), axis=-1, draws=1)[1] for h in (0, 16))
    assert plain.nonzero == 16 and turned.nonzero == 16 * 16
    assert turned.signal == pytest.approx(plain.signal) and turned.amax == pytest.approx(0.25)


def test_known_numbers_of_a_gaussian() -> None:
    """Published: relative error 0.906 % with nearest rounding, 1.88 % with stochastic, which clips 0.34 % of the length away.

    Draws of 8 bits round up too seldom by 1/512 of a step on average: another 0.05 %.
    """
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    nearest = measure(x, QuantConfig(), axis=-1, draws=1)[1]
    assert nearest.sqnr_db == pytest.approx(-10 * math.log10(0.00906), abs=0.02)
    torch.manual_seed(0)
    drawn = measure(x, QuantConfig(rounding="stochastic"), axis=-1, draws=8)[1]
    assert drawn.sqnr_db == pytest.approx(-10 * math.log10(0.0188), abs=0.02)
    assert drawn.gain_bias == pytest.approx(-0.0039, abs=0.0002) and 0 < drawn.gain_error < 2e-4
    assert drawn.clipped_maxima == pytest.approx(0.51, abs=0.02)  # e4m3 rounds about half of the scales down
    assert drawn.clipped_maxima * drawn.clipped_by == pytest.approx(0.011, abs=0.001)  # 1.1 % of all block maxima


def test_wider_scales_clip_nothing_and_leave_the_bias_of_8_bit_draws() -> None:
    x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    sums = measure(x, QuantConfig(rounding="stochastic", scale_rule="amax_17_16"), axis=-1, draws=8)[1]
    assert sums.clipped_maxima == 0 and sums.saturation == 0
    assert sums.gain_bias == pytest.approx(-0.0006, abs=0.0002)


def test_blocks_too_small_for_the_tensor_are_flushed() -> None:
    x = torch.full((2, 32), 1e-7)
    x[0, 0] = 1000.0
    sums = measure(x, QuantConfig(), axis=-1, draws=1)[1]
    assert sums.flushed_blocks == 3 / 4 and sums.underflow == 63 / 64


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    x = heavy_tailed(16, 64)
    clean = x.clone()
    x[3, 17] = math.inf
    clean[3, 16:32] = 0  # the whole block decodes to NaN
    sums = measure(x, QuantConfig(), axis=-1, draws=1)[1]
    assert sums.not_finite == 16 and math.isfinite(sums.noise)
    assert sums.signal == pytest.approx(float(clean.double().square().sum()))


def test_two_calls_add() -> None:
    x, y = heavy_tailed(16, 64), heavy_tailed(32, 64) / 3
    both = measure(x, QuantConfig(), axis=-1, draws=1)[1] + measure(y, QuantConfig(), axis=-1, draws=1)[1]
    assert both.calls == 2 and both.elements == 48 * 64 and both.amax == float(torch.cat([x, y]).abs().max())
    assert both.signal == pytest.approx(float(x.double().square().sum() + y.double().square().sum()))


def test_an_all_zero_operand_has_no_shares() -> None:
    sums = measure(torch.zeros(16, 32), QuantConfig(), axis=-1, draws=1)[1]
    assert (sums.underflow, sums.clipped_maxima, sums.bias, sums.gain_bias) == (0, 0, 0, 0) and math.isnan(sums.sqnr_db)
