"""e2m1: every code, every tie, both float32 neighbours of each tie, the special values, packing."""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp4compile.codegen.reference.e2m1 import decode_ref, encode_nearest_ref, encode_stochastic_ref, pack_ref, unpack_ref
from tests.codegen import oracle

TIES = {0.25: 0, 0.75: 2, 1.25: 2, 1.75: 4, 2.5: 4, 3.5: 6, 5.0: 6}
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _codes(*values: float) -> list[int]:
    return encode_nearest_ref(torch.tensor(values, dtype=torch.float32)).tolist()


def test_decode_lists_the_sixteen_values():
    decoded = decode_ref(torch.arange(16, dtype=torch.uint8))
    assert decoded.tolist() == [*VALUES, *(-v for v in VALUES)]
    assert torch.signbit(decoded[8])


def test_encode_inverts_decode():
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(encode_nearest_ref(decode_ref(codes)), codes)


@pytest.mark.parametrize(("tie", "code"), TIES.items())
def test_ties_go_to_the_even_code_and_neighbours_to_their_side(tie: float, code: int):
    below, above = (float(np.nextafter(np.float32(tie), np.float32(to))) for to in (0, 100))
    lower = list(TIES).index(tie)
    assert _codes(below, tie, above) == [lower, code, lower + 1]
    assert _codes(-below, -tie, -above) == [8 + lower, 8 + code, 8 + lower + 1]
    assert code % 2 == 0


def test_special_values():
    assert _codes(0.0, -0.0, 1e-45, -1e-45, -0.1) == [0, 8, 0, 8, 8]
    assert _codes(6, 6.5, 7, 8.94, 1e38, math.inf) == [7] * 6
    assert _codes(-6, -7, -8.94, -1e38, -math.inf) == [15] * 5
    negative_nan = torch.tensor([-4194304], dtype=torch.int32).view(torch.float32)
    assert encode_nearest_ref(negative_nan).tolist() == [7]
    assert _codes(math.nan) == [7]


def test_every_bfloat16_matches_ml_dtypes():
    y = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).float()
    y = y[~y.isnan()]
    expected = y.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    assert np.array_equal(encode_nearest_ref(y).numpy(), expected)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=64))
def test_any_float32_goes_to_a_nearest_value(numbers: list[float]):
    y = torch.tensor(numbers, dtype=torch.float32)
    chosen = decode_ref(encode_nearest_ref(y)).double()
    grid = decode_ref(torch.arange(16, dtype=torch.uint8)).double()
    clipped = y.double().clamp(-6, 6)
    assert torch.equal((chosen - clipped).abs(), (grid - clipped[:, None]).abs().amin(-1))
    assert torch.equal(torch.signbit(chosen), torch.signbit(y))


def test_pack_puts_the_even_index_in_the_low_nibble():
    assert pack_ref(torch.tensor([0x1, 0xF, 0x8, 0x2], dtype=torch.uint8)).tolist() == [0xF1, 0x28]


def test_unpack_inverts_pack_for_every_byte():
    packed = torch.arange(256, dtype=torch.uint8).view(4, 64)
    assert unpack_ref(packed).shape == (4, 128)
    assert torch.equal(pack_ref(unpack_ref(packed)), packed)


def test_stochastic_moves_up_with_probability_floor_256_f():
    every_byte = torch.arange(256, dtype=torch.uint8)
    for lower, upper in itertools.pairwise(VALUES):
        for eighths in range(8):
            fraction = eighths / 8 + 1 / 1024
            y = torch.full((256,), lower + fraction * (upper - lower))
            code = encode_stochastic_ref(y, every_byte)
            assert set(decode_ref(code).tolist()) <= {lower, upper}
            assert int((decode_ref(code) == upper).sum()) == math.floor(256 * fraction), (lower, fraction)
            assert torch.equal(encode_stochastic_ref(-y, every_byte), code + 8)


def test_stochastic_special_values():
    y = torch.tensor([6.0, 6.4, math.inf, -math.inf, math.nan, -0.0, 0.0, 2.0**-9 - 2.0**-20])
    for byte in (0, 128, 255):
        assert encode_stochastic_ref(y, torch.full((8,), byte, dtype=torch.uint8)).tolist() == [7, 7, 7, 15, 7, 8, 0, 0]


def test_stochastic_leaves_grid_values_alone():
    y = decode_ref(torch.arange(16, dtype=torch.uint8))
    for byte in (0, 1, 255):
        assert torch.equal(encode_stochastic_ref(y, torch.full((16,), byte, dtype=torch.uint8)), torch.arange(16, dtype=torch.uint8))


def test_stochastic_matches_the_oracle():
    rng = np.random.default_rng(0)
    y = (rng.standard_normal(1 << 16) * 3).astype(np.float32)
    byte = rng.integers(0, 256, y.size, dtype=np.uint8)
    ours = encode_stochastic_ref(torch.from_numpy(y), torch.from_numpy(byte)).numpy()
    assert np.array_equal(ours, oracle.stochastic_codes(y, byte))
