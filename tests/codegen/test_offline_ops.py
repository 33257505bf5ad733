"""Rules and formats that no kernel computes, through the `fp4::` operators: routed to the reference, decoded exactly, or refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import fp4compile
from fp4compile.codegen import ops
from fp4compile.codegen.cpu import launch
from fp4compile.codegen.errors import IllegalCombination
from fp4compile.codegen.formats import FORMATS, Layout, QuantConfig
from fp4compile.codegen.kernel_spec import KernelSpec, Unsupported
from fp4compile.codegen.reference.block import dequantize_ref, quantize_ref
from fp4compile.codegen.reference.layout import plain_ref
from fp4compile.codegen.registry import kernel_for
from fp4compile.codegen.target import Target

FLAGGED = ("mixfp4", "if4", "nvint4")
OFFLINE = (
    QuantConfig(scale_rule="sweep"), QuantConfig(scale_rule="soar", global_scale="row"), QuantConfig(scale_rule="soar_decoupled"),
    QuantConfig(scale_rule="sweep", block="16x16"), QuantConfig(scale_rule="sweep", hadamard=64),
    *(QuantConfig(format=name) for name in FLAGGED), QuantConfig(format="mixfp4", scale_rule="sweep", global_scale="row"),
)  # fmt: skip


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x.view(torch.uint8) if x.ndim else x, y.view(torch.uint8) if y.ndim else y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("config", OFFLINE, ids=QuantConfig.describe)
@pytest.mark.parametrize("axis", [-1, -2])
def test_the_operator_is_the_reference(config: QuantConfig, axis: int):
    x = _randn(35, 50, dtype=torch.bfloat16)
    assert config.is_offline
    found = ops.QUANTIZE(x, axis, *ops.quantize_args(config), None)
    assert _same(found, quantize_ref(x, config, axis=axis))
    with FakeTensorMode() as mode:
        fake = ops.QUANTIZE(mode.from_tensor(x), axis, *ops.quantize_args(config), None)
    assert [(t.shape, t.dtype, t.stride()) for t in fake] == [(t.shape, t.dtype, t.stride()) for t in found]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("config", OFFLINE, ids=QuantConfig.describe)
def test_a_gpu_chooses_the_same_bits(config: QuantConfig):
    x = _randn(300, 1000, dtype=torch.bfloat16)
    found = ops.QUANTIZE(x.cuda(), -1, *ops.quantize_args(config), None)
    expected = quantize_ref(x, config)
    if config.scale_rule.startswith("soar"):  # a global scale in closed form, from sums in another order
        assert torch.allclose(found[2].cpu(), expected[2], rtol=1e-6)
        assert (found[1].cpu().view(torch.uint8) != expected[1].view(torch.uint8)).float().mean() < 0.001
    else:
        assert _same(tuple(t.cpu() for t in found), expected)


def test_the_operator_keeps_its_contract():
    for config in (OFFLINE[0], OFFLINE[2]):
        torch.library.opcheck(ops.QUANTIZE, (_randn(19, 40), -1, *ops.quantize_args(config), None))


def test_a_tiled_weight_may_be_searched():
    x = _randn(32, 256)
    codes, scales, decode = ops.QUANTIZE(x, -1, *ops.quantize_args(OFFLINE[0]), None, layout=Layout.TILED)
    assert _same((*plain_ref(codes, scales, Layout.TILED), decode), quantize_ref(x, OFFLINE[0]))


def _exact(operand: tuple[Tensor, Tensor | None, Tensor | None], k: int) -> Tensor:
    x, scales, decode = operand
    return (
        x.double()
        if scales is None
        else dequantize_ref(x, scales).double()[..., :k] * decode.double().reshape(*decode.shape, *(1,) * (x.ndim - decode.ndim))
    )


@pytest.mark.parametrize("name", FLAGGED)
@pytest.mark.parametrize("left", ["bf16", "fp32", "nvfp4"])
@pytest.mark.parametrize("m", [1, 5, 9, 40])
def test_products_on_the_cpu(name: str, left: str, m: int):
    for n, k in ((1, 16), (33, 100), (70, 576)):
        weight = quantize_ref(_randn(n, k, seed=1), QuantConfig(format=name))
        if left == "nvfp4":
            a = quantize_ref(_randn(m, k), QuantConfig(global_scale="row"))
        else:
            a = (_randn(m, k, dtype=torch.bfloat16 if left == "bf16" else torch.float32), None, None)
        out = ops.SCALED_MM(*a, *weight, None, k, torch.float32)
        exact, size = _exact(a, k) @ _exact(weight, k).mT, _exact(a, k).abs() @ _exact(weight, k).abs().mT
        # float32 sums of K exact products, and the roundings of two global scales.
        assert ((out.double() - exact).abs() <= (k + 4) * torch.finfo(torch.float32).eps * size).all()


def test_products_in_every_shape_on_the_cpu():
    weight = quantize_ref(_randn(3, 12, 64, seed=1), QuantConfig(format="mixfp4"))
    flagged_left = quantize_ref(_randn(20, 64), QuantConfig(format="if4"))
    offs = torch.tensor([4, 4, 20], dtype=torch.int32)
    out = ops.SCALED_GROUPED_MM(*flagged_left, *weight, offs, 64, torch.float32)
    for start, end, group in ((0, 4, 0), (4, 20, 2)):
        one = tuple(t[group] for t in weight)
        expected = _exact((flagged_left[0][start:end], flagged_left[1][start:end], flagged_left[2]), 64) @ _exact(one, 64).mT
        assert torch.allclose(out[start:end].double(), expected, rtol=1e-4, atol=1e-4)
    one = tuple(t[0] for t in weight)
    batched = _randn(2, 3, 64, dtype=torch.bfloat16)
    assert torch.equal(
        ops.SCALED_MM(batched, None, None, *one, None, 64, torch.bfloat16)[1],
        ops.SCALED_MM(batched[1], None, None, *one, None, 64, torch.bfloat16),
    )


def test_the_cpu_never_reads_flagged_scales_as_numbers():
    """The same bytes as e4m3 would be negative scales: another product, so a kernel that mixed them up would fail here."""
    codes, scales, decode = quantize_ref(_randn(24, 64), QuantConfig(format="mixfp4"))
    assert (scales >= 0x80).any()
    x = _randn(2, 64, dtype=torch.bfloat16)
    flagged, negative = (
        ops.SCALED_MM(x, None, None, codes, s, decode, None, 64, torch.float32) for s in (scales, scales.view(torch.float8_e4m3fn))
    )
    assert not torch.allclose(flagged, negative, rtol=0.1)
    assert torch.uint8 not in launch._KIND or launch._KIND[torch.uint8] != launch._KIND[torch.float8_e4m3fn]


@pytest.mark.parametrize("name", FLAGGED)
def test_quantize_gives_a_tensor_that_decodes(name: str):
    x = _randn(17, 40, dtype=torch.bfloat16)
    q = fp4compile.quantize(x, name)
    assert q.scales.dtype == FORMATS[name].scale_dtype and q.nbytes == 17 * (24 + 3) + 4
    assert (q.dequantize(torch.float32) - x.float()).norm() < 0.1 * x.float().norm()


CARDS = {"cpu": Target(name="cpu", device_type="cpu")} | {
    f"sm_{c}": Target(name=f"sm_{c}", device_type="cuda", capability=c) for c in (80, 90, 100, 103, 120)
}


@pytest.mark.parametrize(("card", "name"), list(itertools.product(CARDS, FLAGGED)))
def test_no_tensor_core_is_asked_for_what_it_cannot_do(card: str, name: str):
    flagged, nvfp4 = QuantConfig(format=name), QuantConfig()
    weight_only = kernel_for(KernelSpec(op="scaled_mm", lhs=None, rhs=flagged, dtype=torch.bfloat16), CARDS[card])
    both = kernel_for(KernelSpec(op="scaled_mm", lhs=nvfp4, rhs=flagged, dtype=torch.bfloat16), CARDS[card])
    assert weight_only in ("cpu", "triton emulation")
    if CARDS[card].has_fp4_mma:
        assert isinstance(both, Unsupported)
        assert both.reason.startswith(f"no tensor core multiplies {name} blocks, those of {card} included") and "w4a16" in both.reason
    else:
        assert both == weight_only


@pytest.mark.parametrize("config", [QuantConfig(scale_rule="sweep"), QuantConfig(scale_rule="soar")], ids=QuantConfig.describe)
def test_a_searched_nvfp4_weight_runs_on_the_kernels_of_nvfp4(config: QuantConfig):
    for card in CARDS.values():
        specs = [
            KernelSpec(op="scaled_mm", lhs=lhs, rhs=rhs, dtype=torch.bfloat16)
            for lhs in (None, QuantConfig())
            for rhs in (config, QuantConfig())
        ]
        kernels = [kernel_for(spec, card) for spec in specs]
        assert kernels[0] == kernels[1] and kernels[2] == kernels[3]


ILLEGAL = [
    ({"scale_rule": "local_hessian"}, "scale_rule = local_hessian. It needs a calibration artefact"),
    ({"rounding": "gptq"}, "rounding = gptq. It needs a calibration artefact"),
    ({"scale_rule": "sweep", "rounding": "stochastic"}, "Choosing between two random draws is biased."),
    ({"format": "mixfp4", "rounding": "stochastic"}, "Choosing the kind of a block between two random draws is biased."),
    ({"format": "mixfp4", "scale_rule": "four_over_six_mae"}, "mixfp4 has amax or four_over_six or sweep or local_hessian."),
    ({"format": "if4", "scale_rule": "soar"}, "if4 has amax or sweep or local_hessian."),
    ({"format": "nvint4", "scale_rule": "four_over_six"}, "nvint4 has amax or sweep or local_hessian."),
    ({"format": "mixfp4", "block": "16x16"}, "mixfp4 has 1x16."),
    ({"format": "mxfp4", "scale_rule": "sweep"}, "MXFP4 scales are powers of two."),
    ({"scale_rule": "soar", "block": "16x16"}, "Its closed form solves blocks of one row."),
    ({"scale_rule": "soar", "global_scale": "static", "static_amax": 3.0}, "It chooses the global scale itself."),
]


@pytest.mark.parametrize(("fields", "said"), ILLEGAL, ids=[str(f) for f, _ in ILLEGAL])
def test_combinations_that_make_no_sense_are_refused(fields: dict[str, object], said: str):
    with pytest.raises(IllegalCombination) as refused:
        QuantConfig(**fields)
    assert said in str(refused.value)
