"""The native block-scaled product against the reference, every row of its table: bit for bit where float32 sums are exact.

It runs in the interpreter, whose scaled dot is Triton's own word for what the instruction computes, or on a GPU with FP4 tensor cores.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp4compile.codegen.formats import Layout, QuantConfig
from fp4compile.codegen.kernels import launch_native
from fp4compile.codegen.kernels.native_tiles import MMA_SYNC, TCGEN05, Architecture, NativeTile, Plan
from fp4compile.codegen.reference.block import dequantize_ref, quantize_ref
from fp4compile.codegen.reference.matmul import scaled_mm_ref
from tests.codegen.kernels.exact_products import Side, exact_side
from tests.codegen.kernels.hard_inputs import first_differences
from tests.codegen.kernels.native_devices import HERE, swizzled

TILES = [(architecture, tile) for architecture in HERE for tile in architecture.tiles]
NAMES = [f"sm_{architecture.capabilities[0]}-{tile.name}" for architecture, tile in TILES]
NARROW = [(architecture, architecture.named("16 rows")) for architecture in HERE]
WHOLE = [(architecture, architecture.named("128x128")) for architecture in HERE]
LAYOUTS = (Layout.PLAIN, Layout.SWIZZLED)
GRANULARITIES = (("none", "none"), ("tensor", "none"), ("row", "tensor"), ("tensor", "row"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Each tile with each granularity, and each of both with every dtype of the result.
EPILOGUES = [(*each, g, DTYPES[(i + j) % 3]) for i, each in enumerate(NARROW + WHOLE) for j, g in enumerate(GRANULARITIES)]


def product(
    a: Side, b: Side, k: int, bias: Tensor | None = None, out_dtype: torch.dtype = torch.float32, *, layout: str = Layout.PLAIN,
    architecture: Architecture = HERE[0], tile: NativeTile | None = None, splits: int = 1,
) -> Tensor:  # fmt: skip
    left, right = (a, b) if layout == Layout.PLAIN else (swizzled(a), swizzled(b))
    return launch_native.scaled_mm(
        *left.arguments(), *right.arguments(), bias, k, out_dtype, a_layout=layout, b_layout=layout,
        capability=architecture.capabilities[0], chosen=None if tile is None else Plan(tile=tile, splits=splits),
    )  # fmt: skip


def quantized(x: Tensor, config: QuantConfig) -> Side:
    codes, scales, global_scale = quantize_ref(x, config)
    return Side(data=codes, scales=scales, global_scale=global_scale)


def assert_exact(
    a: Side, b: Side, k: int, bias: Tensor | None = None, out_dtype: torch.dtype = torch.float32, *, layout: str = Layout.PLAIN,
    architecture: Architecture = HERE[0], tile: NativeTile | None = None, splits: int = 1,
) -> None:  # fmt: skip
    got = product(a, b, k, bias, out_dtype, layout=layout, architecture=architecture, tile=tile, splits=splits)
    want = scaled_mm_ref(*a.arguments(), *b.arguments(), bias, k, out_dtype)
    assert got.is_contiguous()
    assert not first_differences(got, want), first_differences(got, want)


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize(("architecture", "tile"), TILES, ids=NAMES)
def test_every_tile_on_ragged_shapes(device: torch.device, architecture: Architecture, tile: NativeTile, fmt: str) -> None:
    generator = torch.Generator(device).manual_seed(0)
    for i, (m, n, k) in enumerate(((1, 1, 1), (3, 70, 150), (130, 272, 512), (40, 65, 47))):
        a = exact_side(fmt, (m, k), generator, global_scale="row")
        b = exact_side(fmt, (n, k), generator, global_scale="tensor")
        layout = LAYOUTS[(i + (fmt == "mxfp4")) % 2]  # each shape in one layout a format
        assert_exact(a, b, k, layout=layout, architecture=architecture, tile=tile)


@pytest.mark.parametrize(("architecture", "tile", "granularity", "out_dtype"), EPILOGUES)
def test_the_epilogue_rounds_in_the_fixed_order(
    device: torch.device, architecture: Architecture, tile: NativeTile, granularity: tuple[str, str], out_dtype: torch.dtype
) -> None:
    generator = torch.Generator(device).manual_seed(1)
    a = exact_side("nvfp4", (20, 48), generator, global_scale=granularity[0])
    b = exact_side("nvfp4", (24, 48), generator, global_scale=granularity[1])
    biases = [torch.randn(*s, generator=generator, device=device) for s in ((24,), (1,), (20, 24), (20, 1))]
    for bias in (None, biases[0].bfloat16(), *biases):
        assert_exact(a, b, 48, bias, out_dtype, architecture=architecture, tile=tile)
    single = exact_side("nvfp4", (1, 48), generator, global_scale=granularity[0])
    for shape in ((24,), (1, 24), ()):
        assert_exact(single, b, 48, torch.randn(shape, generator=generator, device=device), out_dtype, architecture=architecture, tile=tile)


@pytest.mark.parametrize("granularity", ["none", "tensor", "row"])
@pytest.mark.parametrize(("architecture", "tile"), NARROW + WHOLE)
def test_batches(device: torch.device, architecture: Architecture, tile: NativeTile, granularity: str) -> None:
    generator = torch.Generator(device).manual_seed(2)
    for batch, layout in (((3,), Layout.SWIZZLED), ((2, 2), Layout.PLAIN)):
        a = exact_side("nvfp4", (*batch, 5, 64), generator, global_scale=granularity)
        own = exact_side("nvfp4", (*batch, 7, 64), generator, global_scale=granularity)
        shared = exact_side("nvfp4", (7, 64), generator, global_scale=granularity)
        bias = torch.randn(7, generator=generator, device=device)
        for right in (own, shared):
            assert_exact(a, right, 64, bias, layout=layout, architecture=architecture, tile=tile)


@pytest.mark.parametrize(("architecture", "tile"), NARROW + WHOLE)
def test_operands_that_tma_cannot_read_are_copied(device: torch.device, architecture: Architecture, tile: NativeTile) -> None:
    generator = torch.Generator(device).manual_seed(3)
    a, b = exact_side("nvfp4", (9, 96), generator), exact_side("nvfp4", (24, 96), generator)
    assert a.scales is not None and b.scales is not None
    # 48 bytes a row are 16-byte aligned; a slice that starts at the second byte of a buffer, and a transposed matrix, are not.
    shifted = torch.empty(9 * 48 + 1, dtype=torch.uint8, device=device)[1:].view(9, 48).copy_(a.data)
    turned = b.data.t().contiguous().t()
    turned_scales = b.scales.view(torch.uint8).t().contiguous().t().view(b.scales.dtype)
    for left, right in (
        (Side(data=shifted, scales=a.scales, global_scale=None), b),
        (a, Side(data=turned, scales=turned_scales, global_scale=None)),
        (Side(data=a.data[::2], scales=a.scales[::2], global_scale=None), b),
    ):
        assert_exact(left, right, 96, architecture=architecture, tile=tile)


@pytest.mark.parametrize("layout", [Layout.PLAIN, Layout.SWIZZLED])
@pytest.mark.parametrize(("architecture", "tile"), NARROW + WHOLE)
def test_columns_past_k_are_ignored(device: torch.device, architecture: Architecture, tile: NativeTile, layout: str) -> None:
    """A rotated operand has non-zero codes up to the Hadamard size, and the last byte of an odd k holds another column."""
    generator = torch.Generator(device).manual_seed(4)
    a, b = exact_side("nvfp4", (5, 128), generator), exact_side("nvfp4", (9, 128), generator)
    for k in (70, 71, 128):
        assert_exact(a, b, k, layout=layout, architecture=architecture, tile=tile)


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize(("architecture", "tile"), NARROW + WHOLE)
def test_non_finite_blocks_stay_visible(device: torch.device, architecture: Architecture, tile: NativeTile, fmt: str) -> None:
    x = torch.randn(3, 64, generator=torch.Generator(device).manual_seed(5), device=device)
    x[1, 7] = float("inf")
    weight = torch.randn(6, 64, generator=torch.Generator(device).manual_seed(6), device=device)
    weight[4, 63] = float("nan")
    sides = [quantized(t, QuantConfig(format=fmt)) for t in (x, weight)]
    out = product(*sides, 64, None, torch.bfloat16, architecture=architecture, tile=tile)
    expected = torch.zeros(3, 6, dtype=torch.bool, device=device)
    expected[1, :] = expected[:, 4] = True
    assert torch.equal(out.isnan(), expected)


@pytest.mark.parametrize(("architecture", "tile"), NARROW + [(a, t) for a, t in TILES if t.name == "128x128 split"])
def test_a_split_sum_is_the_same_every_time(device: torch.device, architecture: Architecture, tile: NativeTile) -> None:
    generator = torch.Generator(device).manual_seed(7)
    m, n, k = 5, 130, 1040  # five turns
    a, b = exact_side("nvfp4", (m, k), generator, global_scale="row"), exact_side("nvfp4", (n, k), generator, global_scale="tensor")
    bias = torch.randn(n, generator=generator, device=device)
    for layout, each, splits in ((Layout.PLAIN, None, 5), (Layout.SWIZZLED, bias, 3), (Layout.SWIZZLED, bias, 4)):
        assert_exact(a, b, k, each, torch.bfloat16, layout=layout, architecture=architecture, tile=tile, splits=splits)
    # Values whose sum depends on its order.
    x = torch.randn(m, k, generator=generator, device=device)
    side = quantized(x, QuantConfig())
    first, second = (product(side, side, k, architecture=architecture, tile=tile, splits=3) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("architecture", HERE, ids=lambda a: f"sm_{a.capabilities[0]}")
def test_nearer_to_float64_than_float32_arithmetic_can_promise(device: torch.device, architecture: Architecture) -> None:
    """Every product is exact, so the error is that of summing K numbers in float32: at most K 2^-24 of the sum of magnitudes."""
    generator = torch.Generator(device).manual_seed(8)
    k = 512
    sides, values = [], []
    for rows, config in ((20, QuantConfig(global_scale="row")), (40, QuantConfig())):
        side = quantized(torch.randn(rows, k, generator=generator, device=device), config)
        assert side.scales is not None and side.global_scale is not None
        sides.append(side)
        values.append(dequantize_ref(side.data, side.scales).double() * side.global_scale.double().reshape(-1, 1))
    got = product(*sides, k, architecture=architecture).double()
    bound = (k + 4) * 2.0**-24 * (values[0].abs() @ values[1].abs().mT)
    assert ((got - values[0] @ values[1].mT).abs() <= bound).all()


def test_results_without_elements(device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(9)
    for m, n in ((0, 5), (5, 0)):
        out = product(exact_side("nvfp4", (m, 32), generator), exact_side("nvfp4", (n, 32), generator), 32)
        assert out.shape == (m, n)


def test_what_is_served() -> None:
    e4m3, e8m0 = torch.empty(1, dtype=torch.float8_e4m3fn), torch.empty(1, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    layouts = ("swizzled", "plain")
    for capability in (*TCGEN05.capabilities, *MMA_SYNC.capabilities):
        assert launch_native.serves(e4m3, e4m3, layouts, 64, capability)
        assert launch_native.serves(e8m0, e8m0, layouts, 64, capability)
        for scales in ((e4m3, e8m0), (None, e4m3), (e4m3, None), (e4m3.view(torch.uint8), e4m3.view(torch.uint8))):
            assert not launch_native.serves(*scales, layouts, 64, capability)
        assert not launch_native.serves(e4m3, e4m3, layouts, 0, capability)
        assert not launch_native.serves(e4m3, e4m3, ("plain", "tiled"), 64, capability)
    assert not launch_native.serves(e4m3, e4m3, layouts, 64, 90)
