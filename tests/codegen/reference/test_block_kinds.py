"""The kinds of blocks: integers beside e2m1, the flag in the scale byte, and which dtype holds the decoded values exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fp4compile.codegen.formats import FORMATS
from fp4compile.codegen.reference.block import dequantize_ref
from fp4compile.codegen.reference.block_kinds import FORMAT_OF_SCALES, encode_integer_ref, nearest_e2m1_ref
from fp4compile.codegen.reference.e2m1 import decode_ref, encode_nearest_ref, pack_ref
from tests.codegen import oracle

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
FLAGGED = ("mixfp4", "if4", "nvint4")


def _neighbours(values: list[float]) -> Tensor:
    """Each value and the two float32 next to it, both signs."""
    x = np.array(values, np.float32)
    near = np.concatenate([x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(-np.inf))])
    return torch.from_numpy(np.concatenate([near, -near]))


def test_integers_round_to_nearest_with_ties_to_even_and_saturate():
    y = _neighbours([i / 2 for i in range(20)] + [100.0, 3e38])
    expected = np.clip(np.rint(y.double().numpy()), -7, 7)  # rint: ties to even
    codes = encode_integer_ref(y)
    values = np.where(codes.numpy() >= 8, -1.0, 1.0) * (codes.numpy() & 7)
    assert (values == expected).all()
    assert encode_integer_ref(torch.tensor([0.0, -0.0, -0.4, torch.inf, -torch.inf, torch.nan])).tolist() == [0, 8, 8, 7, 15, 7]


def test_e2m1_values_without_codes_are_those_with_codes():
    thresholds = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    y = torch.cat([_neighbours(thresholds + E2M1 + [7.0, 1e30]), torch.linspace(-8, 8, 4001)])
    assert torch.equal(nearest_e2m1_ref(y), decode_ref(encode_nearest_ref(y)))


def _decoded(name: str) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Values (256, 16) of all 16 codes under each scale byte; flags and e4m3 magnitudes of the bytes."""
    codes = torch.arange(16, dtype=torch.uint8).expand(256, 16)
    bytes_ = np.arange(256, dtype=np.uint8)
    scales = torch.from_numpy(bytes_.copy())[:, None].view(FORMATS[name].scale_dtype)
    return dequantize_ref(pack_ref(codes), scales), bytes_ >= 0x80, oracle.e4m3_values(bytes_ & 0x7F).astype(np.float64)


@pytest.mark.parametrize("name", FLAGGED)
def test_every_code_under_every_scale_byte(name: str):
    values, flags, scales = _decoded(name)
    floats, integers = np.array(E2M1), np.arange(8.0)
    if name == "if4":
        floats, integers = floats * 7, integers * 6
    magnitudes = np.where(flags[:, None], integers, floats) * scales[:, None]
    finite = np.isfinite(scales)
    assert (values[:, :8].double().numpy() == magnitudes)[finite].all()
    assert (values[:, 8:].double().numpy() == -magnitudes)[finite].all()
    assert values[~torch.from_numpy(finite)].isnan().all() and (~finite).sum() == 2


@pytest.mark.parametrize(("name", "exact"), [
    ("mixfp4", {torch.bfloat16, torch.float16}), ("nvint4", {torch.bfloat16, torch.float16}), ("if4", {torch.float16}),
])  # fmt: skip
def test_which_dtypes_hold_the_values(name: str, exact: set[torch.dtype]):
    """Kernels multiply decoded operands in these dtypes; TF32, where IF4 meets bfloat16, has float16's mantissa and float32's range."""
    values, _, scales = _decoded(name)
    finite = values[torch.from_numpy(np.isfinite(scales))]
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(finite.to(dtype).float(), finite) is (dtype in exact)
    assert torch.equal((finite.view(torch.int32) & ~0x1FFF).view(torch.float32), finite)  # TF32: the low 13 bits are zero


def test_the_dtype_of_scales_names_how_to_decode():
    assert {f.scale_dtype for f in FORMATS.values()} == set(FORMAT_OF_SCALES)
    for fmt in FORMATS.values():
        known = FORMAT_OF_SCALES[fmt.scale_dtype]
        assert (known.values, known.flagged_values, known.block) == (fmt.values, fmt.flagged_values, fmt.block)
        assert bool(fmt.flagged_values) is (fmt.scale_dtype != torch.float8_e4m3fn and fmt.scale_dtype != torch.float8_e8m0fnu)


def test_a_negative_e4m3_scale_is_still_a_negative_number():
    scales = torch.tensor([[0xB8]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = torch.full((1, 8), 0x22, dtype=torch.uint8)
    assert dequantize_ref(codes, scales).tolist() == [[-1.0] * 16]
    assert dequantize_ref(codes, scales.view(torch.uint8)).tolist() == [[2.0] * 16]
