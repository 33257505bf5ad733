"""The poison itself, for every dtype an fp4 operator allocates."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e8m0fnu])
def test_unwritten_floats_are_nan(dtype):
    x = torch.ones(4, dtype=torch.float32).to(dtype)
    for unwritten in (torch.empty(8, dtype=dtype), torch.empty_like(x), x.new_empty(3), torch.empty_strided((4,), (1,), dtype=dtype)):
        assert unwritten.float().isnan().all()


def test_unwritten_codes_are_all_ones():
    assert (torch.empty(8, dtype=torch.uint8) == 255).all()
