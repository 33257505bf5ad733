"""SOAR: what its closed forms promise, what they reach, and why the decoupled search needs no ratios."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.reference.block import dequantize_ref, quantize_ref
from fp4compile.codegen.reference.e2m1 import decode_ref, unpack_ref
from fp4compile.codegen.reference.soar import quantize_soar_ref

SOAR, DECOUPLED = QuantConfig(scale_rule="soar"), QuantConfig(scale_rule="soar_decoupled")


def weight(seed: int = 0, rows: int = 96) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_t(5, (rows, 256)).astype(np.float32)) * 0.02


def loss(x: Tensor, config: QuantConfig) -> float:
    return (x - dequantize_ref(*quantize_ref(x, config))).double().square().sum().item()


def test_it_lies_between_plain_rounding_and_the_sweep():
    for seed in range(3):
        x = weight(seed)
        plain, soar, decoupled, sweep = (loss(x, QuantConfig(scale_rule=r)) for r in ("amax", "soar", "soar_decoupled", "sweep"))
        assert plain > soar > decoupled > sweep


def test_more_rounds_are_never_worse():
    x = weight()
    losses = []
    for rounds in (0, 1, 2, 5, 15):
        codes, scales, decode = quantize_soar_ref(x, SOAR, rounds=rounds)
        values = decode_ref(codes) * scales.float().repeat_interleave(16, -1) * decode
        losses.append((x - values).double().square().sum().item())
    # Rounds are compared by float32 sums of the closed form, whose last digits are not those of the losses here.
    assert all(later < 1.00001 * earlier for earlier, later in itertools.pairwise(losses)) and losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_the_global_scale_is_stationary_at_the_end(granularity: str):
    """At a fixed point a = sum(W Q d) / sum(Q^2 d^2); the rounds end near one."""
    x = weight(1)
    codes, scales, decode = quantize_ref(x, QuantConfig(scale_rule="soar", global_scale=granularity))
    values = decode_ref(unpack_ref(codes)).double() * scales.double().repeat_interleave(16, -1)
    dims = (-2, -1) if granularity == "tensor" else (-1,)
    best = (x * values).sum(dims) / values.square().sum(dims)
    assert decode.shape == best.shape and torch.allclose(decode.double(), best, rtol=1e-2)
    assert not torch.allclose(decode, quantize_ref(x, QuantConfig(scale_rule="sweep", global_scale=granularity))[2], rtol=1e-4)


def test_no_ratio_beats_choosing_codes_by_the_stored_scale():
    """All 101 of the published search, beside the one that this package tries: the same stored scales, codes and global scale."""
    x = weight(2, rows=16)
    ratios = tuple(b / 100 for b in range(50, 151))
    published, ours = quantize_soar_ref(x, DECOUPLED, ratios=ratios), quantize_soar_ref(x, DECOUPLED)
    assert torch.equal(published[0], ours[0]) and torch.equal(published[1].view(torch.uint8), ours[1].view(torch.uint8))
    assert torch.equal(published[2], ours[2])


def test_a_batch_has_a_global_scale_each():
    x = torch.stack([weight(seed) * 100**seed for seed in range(2)])
    codes, scales, decode = quantize_ref(x, SOAR)
    for i in range(2):
        alone = quantize_ref(x[i], SOAR)
        assert torch.equal(codes[i], alone[0]) and decode[i] == alone[2]
        assert torch.equal(scales[i].view(torch.uint8), alone[1].view(torch.uint8))
