"""`fp4::quantize` by the statistics of a calibration: the codes of `quantize_for_inputs`, under names that say their content."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp4compile.codegen.calibrated import quantize_for_inputs, second_moments
from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.ops import QUANTIZE, quantize_args
from fp4compile.codegen.reference.gptq import UnusableMoments
from fp4compile.codegen.statistics import InputMoments, StaleCalibration, UnknownStatistics, checksum, remember

K = 72  # no multiple of 16
WEIGHT = torch.randn(40, K, generator=torch.Generator().manual_seed(0)).bfloat16()
CHOSEN = {
    "gptq": {"rounding": "gptq", "scale_rule": "sweep"},
    "local_hessian": {"scale_rule": "local_hessian"},
    "gptq_local_hessian": {"rounding": "gptq", "scale_rule": "local_hessian"},
}


def inputs(k: int = K) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(600, 20, generator=g) @ torch.randn(20, k, generator=g) + 0.1 * torch.randn(600, k, generator=g)


def blocks(moments: Tensor) -> Tensor:
    """Diagonal blocks (ceil(K/16), 16, 16), by the definition."""
    x = torch.nn.functional.pad(moments, (0, -len(moments) % 16, 0, -len(moments) % 16))
    return torch.stack([x[i : i + 16, i : i + 16] for i in range(0, len(x), 16)])


def call(weight: Tensor, axis: int, config: QuantConfig, key: str) -> tuple[Tensor, ...]:
    return QUANTIZE(weight, axis, *quantize_args(config), None, calibration=key)


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("fields", [{}, {"format": "mixfp4"}, {"hadamard": 16}], ids=str)
@pytest.mark.parametrize("method", CHOSEN)
def test_the_operator_gives_the_codes_of_quantize_for_inputs(method: str, fields: dict[str, object], axis: int):
    moments = second_moments(inputs())
    config = QuantConfig(**CHOSEN[method], **fields, calibration="anything")
    key = f"{method} {fields}"
    given = InputMoments(site="a", calibration="c.pt", blocks=blocks(moments), full=moments, checksum=checksum(WEIGHT))
    remember(key, given)
    expected = quantize_for_inputs(WEIGHT, moments, QuantConfig(scale_rule="sweep", **fields), method=method)
    found = call(WEIGHT if axis == -1 else WEIGHT.mT.contiguous(), axis, config, key)
    for got, want in zip(found, (expected.codes, expected.scales, expected.global_scale), strict=True):
        assert torch.equal(got.view(torch.uint8) if got.ndim == 2 else got, want.view(torch.uint8) if want.ndim == 2 else want)


@pytest.mark.parametrize("hadamard", [0, 16])
def test_local_hessian_needs_the_diagonal_blocks_alone(hadamard: int):
    moments, config = second_moments(inputs()), QuantConfig(hadamard=hadamard)
    whole = quantize_for_inputs(WEIGHT, moments, config, method="local_hessian")
    parts = quantize_for_inputs(WEIGHT, blocks(moments), config, method="local_hessian")
    assert torch.equal(whole.scales.view(torch.uint8), parts.scales.view(torch.uint8)) and torch.equal(whole.codes, parts.codes)


def test_what_takes_more_than_the_blocks_says_so():
    only_blocks = blocks(second_moments(inputs()))
    with pytest.raises(UnusableMoments, match="hadamard = 32 mixes more; all are needed"):
        quantize_for_inputs(WEIGHT, only_blocks, QuantConfig(hadamard=32), method="local_hessian")
    remember("blocks only", InputMoments(site="mlp.up", calibration="c.pt", blocks=only_blocks, full=None, checksum=None))
    config = QuantConfig(rounding="gptq", calibration="blocks only")
    with pytest.raises(UnusableMoments, match=r'mlp.up: gptq: .* moments = "full"'):
        call(WEIGHT, -1, config, "blocks only")


def test_each_of_several_matrices_is_rounded_by_itself():
    several, moments = torch.stack([WEIGHT, WEIGHT.flip(0)]), second_moments(inputs())
    remember("experts", InputMoments(site="e", calibration="c.pt", blocks=blocks(moments), full=moments, checksum=None))
    for chosen in CHOSEN.values():
        config = QuantConfig(**chosen, calibration="experts")
        together = call(several, -1, config, "experts")
        for i, each in enumerate(several):
            for got, want in zip(together, call(each, -1, config, "experts"), strict=True):
                assert torch.equal(got[i].float(), want.float())


def test_other_weights_and_unknown_names_are_refused():
    moments = second_moments(inputs())
    remember("stale", InputMoments(site="mlp.up", calibration="c.pt", blocks=blocks(moments), full=moments, checksum=checksum(WEIGHT)))
    config = QuantConfig(rounding="gptq", calibration="stale")
    changed = WEIGHT.clone()
    changed[3, 5] += 1
    with pytest.raises(StaleCalibration, match=r"^mlp.up: its weight is not the one that c.pt was calibrated with"):
        call(changed, -1, config, "stale")
    with pytest.raises(UnknownStatistics, match="'nobody' names statistics"):
        call(WEIGHT, -1, config, "nobody")


def test_checksums():
    weight = torch.randn(37, 50, generator=torch.Generator().manual_seed(2))
    assert checksum(weight) == checksum(weight.bfloat16()) == checksum(weight.mT.contiguous().mT)
    others = [weight.flip(0), weight.mT, weight[:-1], weight.roll(4, 1), -weight, weight.double().add(1e-2).float()]
    assert len({checksum(w) for w in (weight, *others)}) == 7
