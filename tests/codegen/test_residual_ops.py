"""`fp4::quantize_residual` and `fp4::quantize_repeated` against an independent implementation, and against what ARCQuant promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fp4compile.codegen import ops
from fp4compile.codegen.calibrated import quantize_for_inputs, second_moments
from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.reference.block import dequantize_ref
from fp4compile.codegen.reference.e2m1 import unpack_ref
from fp4compile.codegen.reference.gptq import UnusableMoments
from fp4compile.codegen.reference.layout import plain_ref
from fp4compile.codegen.residual_ops import QUANTIZE_REPEATED, QUANTIZE_RESIDUAL
from fp4compile.codegen.statistics import InputMoments, checksum, remember
from tests.codegen import oracle

CONFIGS = {
    "tensor": {},
    "4/6": {"scale_rule": "four_over_six"},
    "row": {"global_scale": "row"},
    "row 4/6": {"global_scale": "row", "scale_rule": "four_over_six"},
    "static": {"global_scale": "static", "static_amax": 2.5},
    "mxfp4": {"format": "mxfp4"},
}


def an_order(k: int, unit: int) -> Tensor:
    return torch.randperm(k // unit, generator=torch.Generator().manual_seed(k)).int()


def quantized_by_oracle(x: oracle.Array, options: dict, amax: float | None = None) -> oracle.Quantized:
    if options.get("format") == "mxfp4":
        return oracle.mxfp4(x)
    rule = options.get("scale_rule", "amax")
    return oracle.nvfp4(x, rule=rule, static_amax=options.get("static_amax") if amax is None else amax)


def residual_by_oracle(x: oracle.Array, order: list[int], outliers: int, options: dict) -> tuple[oracle.Bytes, oracle.Bytes]:
    """Codes, one a byte, and scales of `x` (R, K), a row after the other where each has a global scale of its own."""
    if options.get("global_scale") == "row":
        plain = {name: value for name, value in options.items() if name != "global_scale"}
        rows = [residual_by_oracle(row[None], order, outliers, plain) for row in x]
        return np.concatenate([codes for codes, _ in rows]), np.concatenate([scales for _, scales in rows])
    block = 32 if options.get("format") == "mxfp4" else 16
    padded = oracle.zero_padded(x, block)
    unit = padded.shape[1] // len(order)
    channels = [i * unit + j for i in order for j in range(unit)]
    padded = padded[:, channels]
    once = quantized_by_oracle(padded, options)
    scale = oracle.e4m3_values(once.scales) if block == 16 else np.exp2(once.scales.astype(np.float32) - 127)
    decoded = (oracle.E2M1[once.codes] * np.repeat(scale, block, axis=1)) * once.decode
    lost = (padded - decoded)[:, padded.shape[1] - outliers :]
    twice = quantized_by_oracle(lost, options, options.get("static_amax", float(np.abs(x).max())))
    codes, scales = [], []
    first = (padded.shape[1] - outliers) // block
    for i in range(padded.shape[1] // block):
        codes.append(once.codes[:, i * block : (i + 1) * block])
        scales.append(once.scales[:, i])
        if i >= first:
            j = i - first
            codes.append(twice.codes[:, j * block : (j + 1) * block])
            scales.append(twice.scales[:, j])
    return np.concatenate(codes, axis=1), np.stack(scales, axis=1)


@pytest.mark.parametrize("by_block", [False, True], ids=["channels", "blocks"])
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_every_bit_is_the_oracles(options: dict, by_block: bool) -> None:
    config = QuantConfig(**options)
    x = torch.randn(7, 150, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 1, 150)
    block = config.fmt.block
    order = an_order(160, block if by_block else 1)
    codes, scales, _ = QUANTIZE_RESIDUAL(x.bfloat16(), -1, order, 64, *ops.quantize_args(config))
    want_codes, want_scales = residual_by_oracle(x.bfloat16().float().numpy(), order.tolist(), 64, options)
    assert np.array_equal(scales.view(torch.uint8).numpy(), want_scales)
    got_codes = unpack_ref(codes).numpy()
    assert np.array_equal(np.where(got_codes == 8, 0, got_codes), np.where(want_codes == 8, 0, want_codes))  # the oracle has no -0


@pytest.mark.parametrize(("rule", "error"), [("amax", 0.0075), ("four_over_six", 0.0055)])
def test_two_stages_on_gaussian_data(rule: str, error: float) -> None:
    """Relative squared error in percent: the anchor of ARCQuant's two stages, and with four-over-six what this project measured."""
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(2))
    config = QuantConfig(scale_rule=rule)  # type: ignore[arg-type]
    parts = dequantize_ref(*QUANTIZE_RESIDUAL(x, -1, torch.arange(1024).int(), 1024, *ops.quantize_args(config)))
    twice = parts.unflatten(-1, (-1, 2, 16)).sum(-2).flatten(-2)
    assert 100 * ((twice - x) ** 2).sum() / (x**2).sum() == pytest.approx(error, rel=0.03)


@pytest.mark.parametrize("rule", ["amax", "sweep", "soar"])
def test_the_product_is_that_of_value_and_residual(rule: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x, w = torch.randn(9, 96, generator=generator), torch.randn(32, 96, generator=generator)
    order, config = an_order(96, 1), QuantConfig(scale_rule=rule)  # type: ignore[arg-type]
    a = QUANTIZE_RESIDUAL(x, -1, order, 32, *ops.quantize_args(QuantConfig(global_scale="row")))  # type: ignore[arg-type]
    b = QUANTIZE_REPEATED(w, -1, order, 32, *ops.quantize_args(config))
    once = dequantize_ref(*ops.QUANTIZE(w[:, order], -1, *ops.quantize_args(config))).double()
    values = dequantize_ref(*a).double().unflatten(-1, (-1, 16))
    plain, pairs = values[:, :4].flatten(1), values[:, 4:].unflatten(1, (2, 2)).sum(2).flatten(1)
    want = torch.cat([plain, pairs], dim=1) @ once.T
    got = ops.SCALED_MM(*a, *b, None, 128, torch.float32)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-5)  # float32 sums of 128


@pytest.mark.parametrize("layout", ["swizzled", "tiled"])
@pytest.mark.parametrize("operator", [QUANTIZE_RESIDUAL, QUANTIZE_REPEATED], ids=["residual", "repeated"])
def test_layouts_hold_the_same_values(operator: torch._ops.OpOverload, layout: str) -> None:
    x = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(4)).mT.contiguous().mT
    args = (x.mT, -2, an_order(64, 16), 32, *ops.quantize_args(QuantConfig()))
    plain, other = operator(*args), operator(*args, layout=layout)
    codes, scales = plain_ref(*other[:2], layout)
    assert torch.equal(codes[..., :48], plain[0]) and torch.equal(scales.view(torch.uint8)[..., :6], plain[1].view(torch.uint8))
    assert torch.equal(other[2], plain[2])


def test_outlier_blocks_of_a_weight_are_repeated_bit_for_bit() -> None:
    w = torch.randn(32, 64, generator=torch.Generator().manual_seed(5))
    codes, scales, _ = QUANTIZE_REPEATED(w, -1, an_order(64, 1), 32, *ops.quantize_args(QuantConfig(scale_rule="sweep")))  # type: ignore[arg-type]
    blocks, scales = codes.unflatten(-1, (6, 8)), scales.view(torch.uint8)
    assert torch.equal(blocks[:, 2::2], blocks[:, 3::2]) and torch.equal(scales[:, 2::2], scales[:, 3::2])
    assert not torch.equal(blocks[:, 0], blocks[:, 1])


def remembered(weight: Tensor, x: Tensor, *, full: bool) -> str:
    """The name of the moments of `x` (tokens, K)."""
    moments = second_moments(x)
    blocks = moments.unflatten(0, (-1, 16)).unflatten(2, (-1, 16)).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    key = f"arc {full} {checksum(weight)}"
    site = InputMoments(site="up", calibration="c.pt", blocks=blocks, full=moments if full else None, checksum=checksum(weight))
    remember(key, site)
    return key


@pytest.mark.parametrize("method", ["gptq", "local_hessian", "gptq_local_hessian"])
def test_a_calibrated_weight_is_quantized_in_the_order_of_its_input(method: str) -> None:
    generator = torch.Generator().manual_seed(6)
    w, x = torch.randn(24, 64, generator=generator), torch.randn(200, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    rounding = "gptq" if "gptq" in method else "nearest"
    rule = "local_hessian" if "local_hessian" in method else "sweep"
    config = QuantConfig(scale_rule=rule, rounding=rounding, calibration="any")  # type: ignore[arg-type]
    for order, full in ((an_order(64, 1), True), (an_order(64, 16), True), (an_order(64, 16), False)):
        if "gptq" in method and not full:
            continue
        got = QUANTIZE_REPEATED(w, -1, order, 0, *ops.quantize_args(config), calibration=remembered(w, x, full=full))
        channels = order if order.numel() == 64 else (order[:, None] * 16 + torch.arange(16)).flatten()
        want = quantize_for_inputs(w[:, channels], second_moments(x[:, channels]), QuantConfig(scale_rule="sweep"), method=method)  # type: ignore[arg-type]
        assert torch.equal(dequantize_ref(*got), want.dequantize())


def test_moments_of_blocks_do_not_tell_those_of_other_blocks() -> None:
    w, x = torch.randn(16, 64), torch.randn(100, 64)
    config = QuantConfig(scale_rule="local_hessian", calibration="any")  # type: ignore[arg-type]
    with pytest.raises(UnusableMoments, match=r"up: the second moments are those of blocks of 16 channels.*reorder = false"):
        QUANTIZE_REPEATED(w, -1, an_order(64, 1), 0, *ops.quantize_args(config), calibration=remembered(w, x, full=False))


@pytest.mark.parametrize("operator", [QUANTIZE_RESIDUAL, QUANTIZE_REPEATED], ids=["residual", "repeated"])
def test_torch_accepts_the_operators(operator: torch._ops.OpOverload) -> None:
    for layout in ("plain", "tiled"):
        args = (torch.randn(16, 40), -1, an_order(48, 1), 16, *ops.quantize_args(QuantConfig()))
        torch.library.opcheck(operator, args, {"layout": layout})
