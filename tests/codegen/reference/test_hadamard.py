"""The random Hadamard transform: its matrix entry by entry, its rounding, and that it cancels inside a product."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from fp4compile.codegen.reference.hadamard import hadamard_ref, signs
from tests.codegen import oracle

SIZES = (16, 32, 64, 128)


def test_the_sign_vector_is_transformer_engines():
    expected = [1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1]
    assert signs(16).tolist() == expected
    assert signs(64).tolist() == expected * 4


@pytest.mark.parametrize("size", SIZES)
def test_unit_vectors_give_the_rows_of_the_matrix(size: int):
    expected = oracle.hadamard_matrix(size) * np.float32(1 / math.sqrt(size))
    assert np.array_equal(hadamard_ref(torch.eye(size), size).numpy(), expected)


@pytest.mark.parametrize("size", SIZES)
def test_integers_rotate_exactly_and_round_once(size: int):
    x = torch.randint(-100, 100, (6, 3 * size), generator=torch.Generator().manual_seed(size)).float()
    sums = x.double().numpy().reshape(6, 3, size) @ oracle.hadamard_matrix(size).astype(np.float64)
    expected = (sums.astype(np.float32) * np.float32(1 / math.sqrt(size))).reshape(6, 3 * size)
    assert np.array_equal(hadamard_ref(x, size).numpy(), expected)
    as_bf16 = hadamard_ref(x.bfloat16(), size)
    assert as_bf16.dtype == torch.bfloat16
    assert np.array_equal(as_bf16.float().numpy(), expected.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_random_bf16_equals_float64_rounded_to_bf16():
    x = torch.randn(512, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.double().numpy().reshape(512, 16, 16) @ oracle.hadamard_matrix(16).astype(np.float64) / 4
    expected = exact.reshape(512, 256).astype(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(hadamard_ref(x, 16).float().numpy(), expected)


@pytest.mark.parametrize("size", SIZES)
def test_it_is_orthogonal(size: int):
    gen = torch.Generator().manual_seed(1)
    a, b = (torch.randn(5, 2 * size, generator=gen, dtype=torch.float32) for _ in range(2))
    rotated = hadamard_ref(a, size).double() @ hadamard_ref(b, size).double().T
    plain = a.double() @ b.double().T
    # log2(size) float32 additions an element: far below 1e-5 of the norms.
    assert (rotated - plain).abs().max() < 1e-5 * a.norm() * b.norm()


@pytest.mark.parametrize("size", SIZES)
def test_groups_do_not_mix(size: int):
    x = torch.zeros(1, 4 * size)
    x[0, size : 2 * size] = torch.arange(size) + 1.0
    rotated = hadamard_ref(x, size)[0]
    assert rotated[size : 2 * size].abs().sum() > 0
    assert rotated[:size].abs().sum() == 0 and rotated[2 * size :].abs().sum() == 0


def test_non_finite_values_spread_over_their_group_only():
    x = torch.ones(1, 32)
    x[0, 3] = math.inf
    rotated = hadamard_ref(x, 16)[0]
    assert not rotated[:16].isfinite().any()
    assert rotated[16:].isfinite().all()
