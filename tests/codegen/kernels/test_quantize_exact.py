"""The quantize and Hadamard kernels against `reference`, bit for bit."""

from __future__ import annotations

import pytest
import torch
import triton
from torch import Tensor

from fp4compile.codegen.errors import UnsupportedDtype
from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.kernels import launch, launch_quantize
from fp4compile.codegen.ops import quantize_args
from fp4compile.codegen.reference.block import dequantize_ref, quantize_ref
from fp4compile.codegen.reference.hadamard import hadamard_ref
from fp4compile.codegen.reference.layout import lay_out_ref
from tests.codegen.kernels.hard_inputs import (
    DISTRIBUTIONS,
    all_quantizations,
    assert_same_bits,
    first_differences,
    hard_batch,
    same_nan,
)

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
CASES = [(i, config, DTYPES[i % 3], (-1, -2)[i // 3 % 2]) for i, config in enumerate(all_quantizations())]
INTERPRETED = triton.knobs.runtime.interpret
if INTERPRETED:  # slow: rotations other than 16 only with the plainest settings
    CASES = [c for c in CASES if c[1].get("hadamard", 0) in (0, 16) or ("scale_rule" not in c[1] and c[1].get("global_scale") != "row")]


def assert_exact(x: Tensor, axis: int = -1, seed: int | None = None, **options: object) -> None:
    config = QuantConfig(**options)  # type: ignore[arg-type]
    seed_tensor = None if seed is None else torch.tensor(seed, dtype=torch.int64, device=x.device)
    got = launch.quantize(x, axis, *quantize_args(config), seed_tensor)
    want = quantize_ref(x, config, axis=axis, seed=seed_tensor)
    assert_same_bits(got, want)


@pytest.mark.parametrize(("index", "options", "dtype", "axis"), CASES, ids=[f"{i}-{a}" for i, _, _, a in CASES])
def test_every_option_on_hard_inputs(device: torch.device, index: int, options: dict, dtype: torch.dtype, axis: int) -> None:
    generator = torch.Generator(device).manual_seed(index)
    x = hard_batch(10, 35, dtype, generator, DISTRIBUTIONS[index % 4 :: 4] if INTERPRETED else DISTRIBUTIONS)
    assert_exact(x, axis, seed=-7 - index if QuantConfig(**options).draws else None, **options)


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("shape", [(1, 1), (1, 16), (16, 1), (17, 300), (70, 31), (2, 3, 2, 33)], ids=str)
@pytest.mark.parametrize("options", [{}, {"global_scale": "row"}, {"block": "16x16"}, {"format": "mxfp4"}], ids=str)
def test_ragged_shapes(device: torch.device, shape: tuple[int, ...], axis: int, options: dict) -> None:
    x = torch.randn(*shape, generator=torch.Generator(device).manual_seed(1), device=device)
    assert_exact(x.bfloat16(), axis, **options)


@pytest.mark.parametrize("shape", [(0, 16), (3, 0), (0, 0), (0, 4, 5), (2, 0, 5), (2, 5, 0)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"global_scale": "row"}, {"global_scale": "static", "static_amax": 5.0}, {"format": "mxfp4"}], ids=str
)
def test_tensors_without_elements(device: torch.device, shape: tuple[int, ...], options: dict) -> None:
    for axis in (-1, -2):
        assert_exact(torch.zeros(shape, device=device), axis, **options)


def test_any_strides(device: torch.device) -> None:
    x = torch.randn(8, 40, generator=torch.Generator(device).manual_seed(2), device=device)
    views = x.t(), x[::2, 3::3], x[:1].expand(5, 40), x.view(2, 4, 40).transpose(0, 1), x.view(2, 1, 4, 40).transpose(0, 2)
    for view in views:
        for axis in (-1, -2):
            assert_exact(view, axis)
            assert_exact(view, axis, global_scale="row", scale_rule="four_over_six")


def test_every_threshold_under_every_scale(device: torch.device) -> None:
    """A block for each e4m3 scale: its maximum is 6 s, the rest are the ties of e2m1 times s and their neighbours. 2688 makes S = 1."""
    scale = torch.arange(1, 127, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=device)
    exact = torch.cat([torch.full((126, 1), 6.0, device=device), ties.expand(126, 7)], dim=1) * scale[:, None]
    around = torch.cat([exact, exact, -exact.nextafter(torch.zeros_like(exact)), exact.nextafter(exact + 1)], dim=1)
    around[:, 24] = exact[:, 0]  # one step above 6 s would be another scale
    x = torch.cat([around, torch.zeros(1, 32, device=device)])
    x[126, 0] = 2688.0
    assert_exact(x)
    assert_exact(x, scale_rule="four_over_six_mae")
    codes, scales, decode = launch.quantize(x, -1, *quantize_args(QuantConfig()))
    assert decode.item() == 1.0
    assert scales.view(torch.uint8)[:126, 0].tolist() == list(range(1, 127))
    # The largest power of two for scale: products with the reciprocal are exact there, so the standard's ties to even show.
    row = [7, 0, 2, 2, 4, 4, 6, 6]
    assert codes[0x78 - 1, :4].tolist() == [row[2 * i] | row[2 * i + 1] << 4 for i in range(4)]


def test_ties_of_the_scale(device: torch.device) -> None:
    """Block maxima that scale to every midpoint between e4m3 values, give or take a few units in the last place."""
    value = torch.arange(127, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()
    middle = (value[:-1] + value[1:]) / 2 * 6
    steps = torch.arange(-4, 5, device=device, dtype=torch.int32)
    x = torch.zeros(126 * 9 + 1, 16, device=device)
    x[:-1, 5] = (middle.view(torch.int32)[:, None] + steps).flatten().view(torch.float32)
    x[-1, 0] = 2688.0
    assert_exact(x)


def test_a_non_finite_element_spoils_its_block_alone(device: torch.device) -> None:
    x = torch.randn(4, 64, generator=torch.Generator(device).manual_seed(3), device=device)
    clean = launch.quantize(x.clamp(-1, 1), -1, *quantize_args(QuantConfig()))
    spoilt = x.clamp(-1, 1).clone()
    spoilt[1, 20], spoilt[2, 40] = float("nan"), -float("inf")
    codes, scales, decode = launch.quantize(spoilt, -1, *quantize_args(QuantConfig()))
    hit = torch.zeros(4, 4, dtype=torch.bool, device=device)
    hit[1, 1] = hit[2, 2] = True
    assert (scales.view(torch.uint8)[hit] == 0x7F).all()
    assert torch.equal(scales.view(torch.uint8)[~hit], clean[1].view(torch.uint8)[~hit])
    assert torch.equal(codes.view(4, 4, 8)[~hit], clean[0].view(4, 4, 8)[~hit])
    assert torch.equal(decode, clean[2])


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_hadamard(device: torch.device, size: int, axis: int) -> None:
    generator = torch.Generator(device).manual_seed(size)
    for dtype in DTYPES:
        x = hard_batch(10, 40, dtype, generator)
        got = launch.hadamard(x, axis, size)
        moved = x if axis == -1 else x.mT
        padded = torch.nn.functional.pad(moved, (0, -moved.shape[-1] % size))
        want = hadamard_ref(padded, size)
        want = (want if axis == -1 else want.mT).contiguous()
        assert got.is_contiguous()
        assert not first_differences(same_nan(got), same_nan(want)), first_differences(same_nan(got), same_nan(want))


def test_a_dtype_without_kernels_is_refused(device: torch.device) -> None:
    with pytest.raises(UnsupportedDtype, match="float64"):
        launch.quantize(torch.zeros(16, 16, dtype=torch.float64, device=device), -1, *quantize_args(QuantConfig()))


BOTH_WAYS = ("maximum found on the way", "maximum first")  # the fixture `way`


def takes_maximum(options: dict) -> bool:
    return options.get("global_scale", "tensor") == "tensor" and options.get("format") != "mxfp4"


EDEN = {"hadamard": 128, "rounding": "eden"}
# Every way of reading: 16-byte loads along rows, words across pairs of rows, single elements either way.
READINGS = [((48, 256), False), ((48, 256), True), ((33, 40), False), ((2, 64, 128), True)]
OPTIONS = [
    {}, {"hadamard": 16}, {"hadamard": 64}, {"scale_rule": "four_over_six"}, {"block": "16x16"}, {"global_scale": "row"},
    {"rounding": "stochastic"}, {"format": "mxfp4", "hadamard": 16}, {"global_scale": "static", "static_amax": 2.0},
]  # fmt: skip


# What needs no maximum of the tensor knows one way only.
WAYS = [(options, way) for options in OPTIONS for way in (BOTH_WAYS if takes_maximum(options) else BOTH_WAYS[:1])]


@pytest.mark.parametrize(("options", "way"), WAYS, indirect=["way"], ids=str)
@pytest.mark.parametrize(("shape", "turned"), READINGS, ids=str)
def test_every_way_of_reading(device: torch.device, shape: tuple[int, ...], turned: bool, options: dict, way: str) -> None:
    turn = READINGS.index((shape, turned)) + WAYS.index((options, way))
    # Interpreted, each reading meets each dtype under a third of the options.
    for i, dtype in [(turn % 3, DTYPES[turn % 3])] if INTERPRETED else enumerate(DTYPES):
        x = torch.randn(*shape, generator=torch.Generator(device).manual_seed(i), device=device).to(dtype)
        x = x.mT.contiguous().mT if turned else x
        assert_exact(x, -1 - i % 2, seed=11 if "rounding" in options else None, **options)


@pytest.mark.parametrize("options", [{"hadamard": 64, "global_scale": "row"}, {"hadamard": 128}, EDEN], ids=str)
@pytest.mark.parametrize("axis", [-1, -2])
def test_small_matrices_of_several_tiles_of_large_units(device: torch.device, options: dict, axis: int) -> None:
    """With scales of rows along the second axis one program reads them all for the maximum, in a loop without a first round of its own."""
    x = torch.randn(300, 200, generator=torch.Generator(device).manual_seed(5), device=device).bfloat16()
    x[140, 150] = 40  # in none of the first tiles
    assert_exact(x, axis, seed=3, **options)


@pytest.mark.parametrize(
    ("options", "way"),
    [({}, BOTH_WAYS[0]), ({}, BOTH_WAYS[1]), ({"global_scale": "row"}, BOTH_WAYS[0]), ({"format": "mxfp4"}, BOTH_WAYS[0]),
     ({"hadamard": 16}, BOTH_WAYS[1])],
    indirect=["way"], ids=str,
)  # fmt: skip
@pytest.mark.parametrize("shape", [(1, 64), (130, 48), (2, 3, 80)], ids=str)
def test_swizzled_scales_and_their_padding(device: torch.device, shape: tuple[int, ...], options: dict, way: str) -> None:
    x = torch.randn(*shape, generator=torch.Generator(device).manual_seed(3), device=device).bfloat16()
    for axis in (-1, -2):
        got = launch.quantize(x, axis, *quantize_args(QuantConfig(**options)), layout="swizzled")
        codes, scales, decode = quantize_ref(x, QuantConfig(**options), axis=axis)
        for g, w in zip(got, (*lay_out_ref(codes, scales, "swizzled"), decode), strict=True):
            assert not first_differences(g, w.contiguous()), first_differences(g, w.contiguous())


PAIRS_OF_OPTIONS = [
    ({}, {}), ({}, {"hadamard": 16}), ({"hadamard": 32}, {}), ({"rounding": "stochastic"}, {"hadamard": 16, "rounding": "stochastic"}),
    ({"block": "16x16"}, {"block": "16x16", "scale_rule": "four_over_six"}), ({"hadamard": 16}, {"hadamard": 64}),
    ({"format": "mxfp4"}, {"global_scale": "static", "static_amax": 2.0}), ({"global_scale": "row"}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("row", "column"), PAIRS_OF_OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("shape", "turned", "layout"), [((64, 96), False, "plain"), ((2, 48, 128), True, "swizzled"), ((17, 35), False, "plain")], ids=str
)
def test_both_axes_in_one_reading(
    device: torch.device, shape: tuple[int, ...], turned: bool, layout: str, row: dict, column: dict
) -> None:  # fmt: skip
    x = torch.randn(*shape, generator=torch.Generator(device).manual_seed(4), device=device).bfloat16()
    x = x.mT.contiguous().mT if turned else x
    configs, seeds = (QuantConfig(**row), QuantConfig(**column)), tuple(torch.tensor(s, device=device) for s in (5, -6))
    got = launch.quantize_both(x, *(quantize_args(c) for c in configs), *seeds, layout, layout)
    want: list[Tensor] = []
    for config, axis, seed in zip(configs, (-1, -2), seeds, strict=True):
        codes, scales, decode = quantize_ref(x, config, axis=axis, seed=seed)
        want += [*lay_out_ref(codes, scales, layout), decode]
    for name, g, w in zip(("codes", "scales", "global_scale") * 2, got, want, strict=True):
        assert not first_differences(g, w.contiguous()), f"{name}: {first_differences(g, w.contiguous())}"


@pytest.mark.parametrize("options", [{}, {"global_scale": "row"}, {"format": "mxfp4"}])
@pytest.mark.parametrize("axis", [-1, -2])
def test_more_matrices_than_a_grid_holds_are_quantized_in_pieces(options: dict, axis: int, device, monkeypatch) -> None:
    x = torch.randn(2, 5, 16, 48, device=device).bfloat16()
    config = QuantConfig(**options)
    want = launch.quantize(x, axis, *quantize_args(config))
    monkeypatch.setattr(launch_quantize, "MOST_MATRICES", 4)
    for got, whole in zip(launch.quantize(x, axis, *quantize_args(config)), want, strict=True):
        assert got.shape == whole.shape and got.dtype == whole.dtype
        assert torch.equal(got.view(torch.uint8), whole.view(torch.uint8)) if got.itemsize == 1 else torch.equal(got, whole)
    with pytest.raises(launch_quantize.TooManyMatrices, match="10 matrices"):
        launch.quantize(x, axis, *quantize_args(QuantConfig(rounding="stochastic")), torch.tensor(1, device=device))


@pytest.mark.parametrize("options", [{}, {"global_scale": "row"}, {"format": "mxfp4"}, {"rounding": "eden"}], ids=str)
@pytest.mark.parametrize(("shape", "k"), [((17, 40), 40), ((4, 64), 64), ((2, 3, 32), 20)], ids=str)
def test_decoded_values_are_rounded_once(device: torch.device, shape: tuple[int, ...], k: int, options: dict) -> None:
    config = QuantConfig(**options)
    x = torch.randn(*shape, generator=torch.Generator(device).manual_seed(4), device=device)
    parts = quantize_ref(x, config, seed=torch.tensor(1, device=device))
    for dtype in DTYPES:
        got = launch.dequantize(*parts, k, dtype)
        assert not first_differences(got, dequantize_ref(*parts)[..., :k].to(dtype).contiguous()) and got.is_contiguous()


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("options", [{}, {"block": "16x16"}], ids=str)
def test_tiles_of_a_weight(device: torch.device, options: dict, axis: int) -> None:
    x = torch.randn(2, 40, 176, generator=torch.Generator(device).manual_seed(2), device=device).bfloat16()
    arguments = quantize_args(QuantConfig(**options))
    codes, scales, decode = launch.quantize(x, axis, *arguments, None)
    want = (*lay_out_ref(codes, scales, "tiled"), decode)
    assert_same_bits(launch.quantize(x, axis, *arguments, None, layout="tiled"), want)
