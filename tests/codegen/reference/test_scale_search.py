"""Searched scales against brute force over every e4m3 scale in float64, and what a search must leave as it was."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.reference.block import dequantize_ref, quantize_ref
from fp4compile.codegen.reference.block_kinds import E2M1
from fp4compile.codegen.reference.e2m1 import unpack_ref
from fp4compile.codegen.reference.scale_search import Candidates, around, quantize_by_search_ref
from tests.codegen import oracle

SWEEP, MIXFP4, IF4, NVINT4 = QuantConfig(scale_rule="sweep"), *(QuantConfig(format=name) for name in ("mixfp4", "if4", "nvint4"))
EVERY = (
    SWEEP, MIXFP4, IF4, NVINT4, QuantConfig(scale_rule="soar"), QuantConfig(scale_rule="soar_decoupled"),
    QuantConfig(scale_rule="sweep", global_scale="row"), QuantConfig(scale_rule="sweep", block="16x16"),
    QuantConfig(format="mixfp4", scale_rule="sweep"), QuantConfig(format="if4", global_scale="row"),
)  # fmt: skip
GRIDS = {"e2m1": oracle.E2M1[:8].astype(np.float64), "integer": np.arange(8.0), "if4 integer": np.arange(8.0) * 6 / 7}
POSITIVE = oracle.e4m3_values(np.arange(1, 0x7F, dtype=np.uint8)).astype(np.float64)


def heavy(rows: int = 24, k: int = 64, seed: int = 0) -> Tensor:
    """Blocks of many shapes: flat, heavy-tailed, one outlier, few values, and of magnitudes from 2^-12 up."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(3, (rows, k)) * np.exp2(rng.integers(-12, 1, (rows, k // 16))).repeat(16, 1)
    x[::4] = rng.uniform(-1, 1, x[::4].shape)
    x[1::4, ::16] *= 8
    x[2::4] = rng.integers(-3, 4, x[2::4].shape)
    return torch.from_numpy(x.astype(np.float32))


def blocks_of(x: Tensor) -> np.ndarray:
    return x.double().numpy().reshape(x.shape[0], -1, 16)


def loss(x: Tensor, config: QuantConfig, quantized: tuple[Tensor, Tensor, Tensor] | None = None) -> np.ndarray:
    difference = x.double() - dequantize_ref(*(quantized or quantize_ref(x, config))).double()
    return difference.square().numpy().reshape(x.shape[0], -1, 16).sum(-1)


def least_loss(x: Tensor, decode: float, grid: np.ndarray) -> np.ndarray:
    """Of each block, over all 126 positive scales: the nearest of the grid's values, in float64."""
    y = np.abs(blocks_of(x))[..., None] / (decode * POSITIVE)  # (R, B, 16, 126)
    nearest = np.abs(y[..., None] - grid).min(-1)
    return (np.square(nearest * decode * POSITIVE).sum(-2)).min(-1)


@pytest.mark.parametrize("seed", range(3))
def test_a_sweep_of_8_bytes_each_way_is_exhaustive(seed: int):
    x = heavy(seed=seed)
    codes, scales, decode = quantize_ref(x, SWEEP)
    zero = (x == 0).all(-1).numpy()
    best = least_loss(x, decode.item(), GRIDS["e2m1"])
    found = loss(x, SWEEP, (codes, scales, decode))
    # A block whose usual scale rounds to zero may be as good with none.
    assert np.allclose(found, np.minimum(best, np.square(blocks_of(x)).sum(-1)), rtol=1e-4, atol=0) and not zero.all()


def test_a_wider_sweep_finds_nothing_better():
    rng = np.random.default_rng(7)
    samples = [rng.standard_normal, lambda s: rng.standard_t(3, s), lambda s: rng.uniform(-1, 1, s), lambda s: rng.laplace(size=s)]
    for sample in samples:
        x = torch.from_numpy(sample((256, 256)).astype(np.float32))
        whole = quantize_by_search_ref(x, SWEEP, candidates=(Candidates(kind=E2M1, offsets=around(126)),))
        assert torch.equal(whole[1].view(torch.uint8), quantize_ref(x, SWEEP)[1].view(torch.uint8))


@pytest.mark.parametrize(("config", "kinds"), [(MIXFP4, (6, 7)), (IF4, (6, 6))], ids=["mixfp4", "if4"])
def test_the_better_kind_of_each_block_is_taken(config: QuantConfig, kinds: tuple[int, int]):
    x = heavy(64, 128)
    _, scales, stored = quantize_ref(x, config)
    unit = 7 if config.format == "if4" else 1
    decode = stored.double().item() * unit
    largest = np.abs(blocks_of(x)).max(-1)
    flags = (scales.view(torch.uint8) >= 0x80).numpy()
    each = []
    for divisor, grid in zip(kinds, (GRIDS["e2m1"], GRIDS["if4 integer" if unit == 7 else "integer"]), strict=True):
        scale = oracle.e4m3_values(oracle.e4m3_bytes((largest / divisor / decode).astype(np.float32))).astype(np.float64) * decode
        with np.errstate(all="ignore"):
            y = np.where(scale[..., None] > 0, np.abs(blocks_of(x)) / scale[..., None], 0)
        rounded = grid[np.abs(y[..., None] - grid).argmin(-1)] * scale[..., None]
        each.append(np.square(np.abs(blocks_of(x)) - rounded).sum(-1))
    clear = np.abs(each[0] - each[1]) > 1e-4 * (each[0] + each[1])
    assert clear.mean() > 0.7 and 0.2 < flags.mean() < 0.9
    assert (flags == (each[1] < each[0]))[clear].all()
    assert np.allclose(loss(x, config), np.minimum(*each), rtol=1e-3, atol=1e-12)


def test_ties_go_to_integers_in_mixfp4_and_to_e2m1_in_if4():
    x = torch.zeros(2, 16)
    x[0, 0], x[1, 0] = 1.0, 2688.0
    assert (quantize_ref(torch.zeros(1, 16), MIXFP4)[1] >= 0x80).all()
    assert (quantize_ref(x, IF4)[1] >= 0).all()  # int8: the flag is the sign


def test_flat_blocks_take_integers_as_their_crest_factor_says():
    """Integers win below max / RMS = 2.224 on average (arXiv 2605.31035)."""
    x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    flags = quantize_ref(x, MIXFP4)[1] >= 0x80
    blocks = x.unflatten(-1, (-1, 16))
    crest = blocks.abs().amax(-1) / blocks.square().mean(-1).sqrt()
    assert flags[crest < 1.9].float().mean() > 0.9 and flags[crest > 2.6].float().mean() < 0.2
    near = (crest > 2.2) & (crest < 2.25)
    assert 0.3 < flags[near].float().mean() < 0.7


@pytest.mark.parametrize("config", EVERY, ids=QuantConfig.describe)
def test_codes_are_the_nearest_ones_under_the_stored_scales(config: QuantConfig):
    x = heavy(32, 128)
    codes, scales, decode = quantize_ref(x, config)
    decoded = dequantize_ref(codes, scales, decode).double().numpy()
    unit = 7 if config.format == "if4" else 1
    bytes_ = scales.view(torch.uint8).numpy()
    size = oracle.e4m3_values(bytes_ & 0x7F).astype(np.float64) * (decode.double().numpy()[..., None] if decode.ndim else decode.item())
    grids = np.where((bytes_ >= 0x80)[..., None], np.arange(8.0) * (6 if unit == 7 else 1), oracle.E2M1[:8] * unit)
    exact = np.abs(blocks_of(x))
    nearest = np.abs(exact[..., None] - grids[..., None, :] * size[..., None, None]).min(-1)
    assert np.allclose(np.abs(blocks_of(x) - decoded.reshape(exact.shape)), nearest, rtol=1e-4, atol=1e-7 * np.abs(exact).max())


@pytest.mark.parametrize("config", EVERY, ids=QuantConfig.describe)
def test_zeros_are_exact(config: QuantConfig):
    x = torch.zeros(4, 64)
    x[1] = -0.0
    codes, scales, decode = quantize_ref(x, config)
    assert (scales.view(torch.uint8) & 0x7F).sum() == 0 and torch.equal(dequantize_ref(codes, scales, decode), x)
    assert unpack_ref(codes)[1].tolist() == [8] * 64
    beside = torch.cat([torch.zeros(2, 16), torch.randn(2, 16)], dim=1)
    assert torch.equal(dequantize_ref(*quantize_ref(beside, config))[:, :16], torch.zeros(2, 16))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("config", [c for c in EVERY if not c.is_tile], ids=QuantConfig.describe)
def test_a_non_finite_element_poisons_its_block_and_nothing_else(config: QuantConfig, bad: float):
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    replaced = x.clone()
    x[2, 33], replaced[2, 33] = bad, 0.0
    got, expected = dequantize_ref(*quantize_ref(x, config)), dequantize_ref(*quantize_ref(replaced, config))
    assert got[2, 32:48].isnan().all()
    elsewhere = torch.ones_like(x, dtype=torch.bool)
    elsewhere[2, 32:48] = False
    if config.scale_rule.startswith("soar"):  # the rest of the block has no say in the global scale then
        assert torch.allclose(got[elsewhere], expected[elsewhere], rtol=0.3, atol=0.3)
    else:
        assert torch.equal(got[elsewhere], expected[elsewhere])


@pytest.mark.parametrize("config", EVERY, ids=QuantConfig.describe)
@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1e-30, 1e30, 3e38])
def test_extreme_magnitudes_stay_finite(config: QuantConfig, magnitude: float):
    x = torch.linspace(-1, 1, 64).view(1, 64).double().mul(magnitude).float()
    decoded = dequantize_ref(*quantize_ref(x, config))
    assert decoded.isfinite().all()
    if magnitude > 1e-34:
        assert (decoded - x).double().norm() < 0.15 * x.double().norm()


def test_a_tile_has_one_scale_and_the_least_loss_of_all_its_rows():
    config = QuantConfig(scale_rule="sweep", block="16x16")
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(3))
    codes, scales, decode = quantize_ref(x, config)
    bytes_ = scales.view(torch.uint8)
    for rows in (slice(0, 16), slice(16, 32), slice(32, 40)):
        assert (bytes_[rows] == bytes_[rows][:1]).all()
    size = POSITIVE * decode.item()
    y = np.abs(blocks_of(x))[..., None] / size
    per_scale = np.square(np.abs(y[..., None] - GRIDS["e2m1"]).min(-1) * size).sum(-2)  # (R, B, 126)
    best = np.stack([per_scale[r].sum(0).min(-1) for r in (slice(0, 16), slice(16, 32), slice(32, 40))])
    found = loss(x, config, (codes, scales, decode))
    assert np.allclose(np.stack([found[r].sum(0) for r in (slice(0, 16), slice(16, 32), slice(32, 40))]), best, rtol=1e-4)


@pytest.mark.parametrize("config", EVERY, ids=QuantConfig.describe)
def test_a_batch_is_its_matrices_and_an_axis_its_transpose(config: QuantConfig):
    x = torch.stack([heavy(20, 64, seed=s) * 10**s for s in range(3)])
    whole = quantize_ref(x, config)
    for i, matrix in enumerate(x):
        for together, alone in zip(whole, quantize_ref(matrix, config), strict=True):
            assert torch.equal(
                together[i].view(torch.uint8) if together[i].ndim else together[i], alone.view(torch.uint8) if alone.ndim else alone
            )
    turned = quantize_ref(x.mT.contiguous(), config, axis=-2)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(whole[:2], turned[:2], strict=True))


def test_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch):
    from fp4compile.codegen.reference import scale_search

    x = heavy(200, 64)
    whole = [quantize_ref(x, c) for c in EVERY]
    monkeypatch.setitem(scale_search._AT_ONCE, "cpu", 1)
    for config, expected in zip(EVERY, whole, strict=True):
        got = quantize_ref(x, config)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1].view(torch.uint8), expected[1].view(torch.uint8))


@pytest.mark.parametrize("shape", [(0, 16), (4, 0), (1, 1), (3, 17), (2, 0, 32)], ids=str)
@pytest.mark.parametrize("config", EVERY, ids=QuantConfig.describe)
def test_ragged_and_empty_shapes(config: QuantConfig, shape: tuple[int, ...]):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    decoded = dequantize_ref(*quantize_ref(x, config))[..., : shape[-1]]
    assert decoded.shape == x.shape and (decoded - x).abs().sum() <= 0.25 * x.abs().sum()
