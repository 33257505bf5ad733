"""`fp4::quantize_both` on the CPU: two quantizations in one operator, its shapes, and what no kernel computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.ops import QUANTIZE, QUANTIZE_BOTH, SHAPE_RULES, quantize_args, quantize_both_args

SIDES = [
    (QuantConfig(), QuantConfig(hadamard=16, rounding="stochastic")),  # type: ignore[arg-type]
    (QuantConfig(global_scale="row"), QuantConfig(format="mxfp4")),  # type: ignore[arg-type]
    (QuantConfig(scale_rule="sweep"), QuantConfig()),  # type: ignore[arg-type]
]
SEED = torch.tensor(4)


def as_bits(tensors: tuple[Tensor, ...]) -> list[list[int]]:
    return [t.contiguous().view(torch.uint8).flatten().tolist() for t in tensors]


@pytest.mark.parametrize("layout", ["plain", "swizzled"])
@pytest.mark.parametrize(("row", "column"), SIDES)
def test_it_is_two_quantizations(row: QuantConfig, column: QuantConfig, layout: str) -> None:
    x = torch.randn(2, 35, 48, generator=torch.Generator().manual_seed(1)).bfloat16()
    got = QUANTIZE_BOTH(x, *quantize_both_args(row, column), None, SEED, row_layout=layout, column_layout=layout)
    want = (
        *QUANTIZE(x, -1, *quantize_args(row), layout=layout),
        *QUANTIZE(x, -2, *quantize_args(column), SEED, layout=layout),
    )
    assert as_bits(got) == as_bits(want)


@pytest.mark.parametrize("layout", ["plain", "swizzled"])
@pytest.mark.parametrize(("row", "column"), SIDES)
def test_fake_shapes_are_the_real_ones(row: QuantConfig, column: QuantConfig, layout: str) -> None:
    x, sides = torch.randn(3, 20, 70), quantize_both_args(row, column)
    layouts = {"row_layout": layout, "column_layout": layout}
    real = QUANTIZE_BOTH(x, *sides, None, SEED, **layouts)
    with FakeTensorMode() as mode:
        fake_x, fake_seed = mode.from_tensor(x), mode.from_tensor(SEED)
        fakes = [rule(fake_x, *sides, None, fake_seed, **layouts) for rule in (QUANTIZE_BOTH, SHAPE_RULES[QUANTIZE_BOTH])]
    for fake in fakes:
        assert [(f.shape, f.dtype, f.stride()) for f in fake] == [(r.shape, r.dtype, r.stride()) for r in real]


def test_the_operator_is_well_formed() -> None:
    torch.library.opcheck(QUANTIZE_BOTH, (torch.randn(32, 48), *quantize_both_args(*SIDES[0]), None, SEED))
