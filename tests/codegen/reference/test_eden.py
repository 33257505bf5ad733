"""MS-EDEN: what it keeps exactly, what it keeps on average, and how much less noise than stochastic rounding it makes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp4compile.codegen.errors import IllegalCombination
from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.reference.block import dequantize_ref, quantize_ref
from fp4compile.codegen.reference.eden import stochastic_e4m3_ref
from fp4compile.codegen.reference.hadamard import hadamard_ref, signs

EDEN = QuantConfig(rounding="eden")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def eden(x: Tensor, seed: int) -> Tensor:
    return dequantize_ref(*quantize_ref(x, EDEN, seed=torch.tensor(seed)))


def test_a_scale_becomes_a_neighbour_as_often_as_it_should() -> None:
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    low, high = grid[:-1], grid[1:]
    words = torch.arange(0, 1 << 20, 1 << 12)  # 256 evenly spaced draws
    for eighths in range(8):
        target = low + (high - low) * (eighths / 8)
        got = stochastic_e4m3_ref(target[:, None].expand(-1, 256), words.expand(126, -1))
        assert ((got == low[:, None]) | (got == high[:, None])).all()
        assert torch.equal((got == high[:, None]).sum(1), torch.full((126,), 32 * eighths))
    assert stochastic_e4m3_ref(torch.tensor([1e9, 448.0, 0.0]), torch.full((3,), -1)).tolist() == [448.0, 448.0, 0.0]


def test_the_length_of_every_group_is_kept_on_average() -> None:
    """<x, S q> = <x, x> for each 128 values, whatever the input: with the scales' rounding that holds for the mean over draws."""
    x = normal(64, 256) * torch.exp2(normal(64, 1, seed=1))
    drawn = torch.stack([eden(x, seed) for seed in range(200)])
    groups = (drawn * x).unflatten(-1, (-1, 128)).sum(-1) / (x * x).unflatten(-1, (-1, 128)).sum(-1)
    error = groups.std(0) / 200**0.5
    assert ((groups.mean(0) - 1).abs() < 5 * error + 1e-6).all() and (error > 0).all()


def test_unbiased_over_rotations_where_nearest_rounding_is_not() -> None:
    x, draws = normal(8, 256).bfloat16().float(), 600
    generator = torch.Generator().manual_seed(7)
    results: dict[str, list[Tensor]] = {"eden": [], "nearest": []}
    for draw in range(draws):
        flip = torch.randint(0, 2, (128,), generator=generator).float().mul(2).sub(1).repeat(2)
        rotated = hadamard_ref(x * flip, 128)
        for name, config in (("eden", EDEN), ("nearest", QuantConfig())):
            values = dequantize_ref(*quantize_ref(rotated, config, seed=torch.tensor(draw)))
            back = hadamard_ref((values.unflatten(-1, (-1, 128)) * signs(128)).flatten(-2), 128).unflatten(-1, (-1, 128)) * signs(128)
            results[name].append(back.flatten(-2) * flip)
    gain = {name: float(((torch.stack(all_) * x).sum() / draws / (x * x).sum()) - 1) for name, all_ in results.items()}
    assert abs(gain["eden"]) < 5e-4 < 3e-3 < abs(gain["nearest"])
    single = float((results["eden"][0] - x).norm() / x.norm())
    mean = float((torch.stack(results["eden"]).mean(0) - x).norm() / x.norm())
    assert mean < 1.3 * single / draws**0.5


def test_less_than_half_the_noise_of_stochastic_rounding() -> None:
    x = normal(256, 4096)
    noise = {}
    for name, config in (("eden", EDEN), ("stochastic", QuantConfig(rounding="stochastic", scale_rule="amax_17_16"))):
        values = dequantize_ref(*quantize_ref(x, config, seed=torch.tensor(3)))
        noise[name] = float((values - x).square().mean() / x.square().mean())
    assert 0.0090 < noise["eden"] < 0.0102 and 0.0225 < noise["stochastic"] < 0.0245


def test_zeros_stay_zero_and_non_finite_values_stay_in_their_blocks() -> None:
    assert not eden(torch.zeros(3, 128), 1).any()
    x = normal(2, 256)
    x[0, 5], x[1, 200] = float("nan"), float("inf")
    values = eden(x, 1)
    bad = values.isnan().unflatten(-1, (-1, 16)).any(-1).nonzero().tolist()
    assert bad == [[0, 0], [1, 12]]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"format": "mxfp4"}, "a power of two is too coarse"),
        ({"scale_rule": "four_over_six"}, "a scale chosen by its error is biased"),
        ({"scale_rule": "amax_17_16"}, "EDEN maps block maxima as its own correction wants"),
        ({"block": "16x16"}, "128 values of one row"),
        ({"format": "mixfp4"}, "kind of a block"),
    ],
)
def test_what_it_excludes(options: dict[str, str], reason: str) -> None:
    with pytest.raises(IllegalCombination, match=reason):
        QuantConfig(rounding="eden", **options)
