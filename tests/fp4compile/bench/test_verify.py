"""What is wrong is seen, however little it is; what is right passes, for every format, layout and odd shape."""

from __future__ import annotations

import pytest
import torch

from fp4compile.bench.case import MatmulCase, QuantizeCase, quantize_cases
from fp4compile.bench.ours import Product, activation, dense_weight, dense_weights
from fp4compile.bench.verify import verify_product
from fp4compile.bench.verify_quantize import verify_quantize
from fp4compile.codegen import ops
from fp4compile.codegen.formats import Layout
from fp4compile.codegen.target import Target, target_of

CPU = torch.device("cpu")
CASES = [
    MatmulCase(n=n, k=k, m=m, format=format, activation=act)
    for n, k, m in ((64, 128, 1), (33, 100, 70))
    for format in ("nvfp4", "mxfp4")
    for act in ("bf16", "fp4")
]
GROUPED = [MatmulCase(n=33, k=96, m=m, activation=act, groups=5) for m in (2, 90) for act in ("bf16", "fp4")]


def verdict(case: MatmulCase):
    product = Product.of(case, target_of(CPU), CPU)
    return verify_product(product, activation(case.m, case.k, CPU), dense_weights(case, CPU, 0))


@pytest.mark.parametrize("case", [*CASES, *GROUPED], ids=lambda case: case.key)
def test_right_products_pass(case) -> None:
    found = verdict(case)
    assert found.wrong == ""
    assert 0 <= found.errors["float32"] < 1e-6 and 1e-4 < found.errors["bfloat16"] < 4e-3
    assert case.activation == "fp4" or found.errors["float32, x from 2^-100 to 2^100"] < 1e-6


def test_a_tiled_weight_is_measured_as_the_hopper_kernel_reads_it() -> None:
    hopper = Target(name="sm_90", device_type="cuda", capability=90)
    tiled = Product.of(MatmulCase(n=64, k=256, m=2), hopper, CPU)
    assert tiled.b_layout is Layout.TILED and tiled.weight(dense_weight(64, 256, CPU, 0))[0].ndim == 3
    assert verify_product(tiled, activation(2, 256, CPU), dense_weight(64, 256, CPU, 0)).wrong == ""
    assert Product.of(MatmulCase(n=63, k=256, m=2), hopper, CPU).b_layout is Layout.PLAIN


def spoiled(monkeypatch, name: str, spoil) -> None:
    right = getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *args, **kwargs: spoil(right(*args, **kwargs)))


def one_column_off(out: torch.Tensor) -> torch.Tensor:
    out = out.clone()
    out[:, 5] *= 1.02
    return out


def test_one_column_that_is_two_percent_off_is_wrong(monkeypatch) -> None:
    spoiled(monkeypatch, "SCALED_MM", one_column_off)
    assert "float32 output: error" in verdict(CASES[0]).wrong


def test_one_row_that_meets_another_group_is_wrong(monkeypatch) -> None:
    case = MatmulCase(n=33, k=96, m=60, groups=5)  # all of its rows are looked at
    right = ops.SCALED_GROUPED_MM

    def shifted(*args, **kwargs):
        offs = args[6].clone()
        offs[1] += 1
        return right(*args[:6], offs, *args[7:], **kwargs)

    monkeypatch.setattr(ops, "SCALED_GROUPED_MM", shifted)
    assert "float32 output: error" in verdict(case).wrong


def test_a_bfloat16_output_rounded_towards_zero_is_wrong(monkeypatch) -> None:
    """Twice the error of a dense product, and yet below one part in a hundred."""
    right = ops.SCALED_MM

    def truncating(*args, **kwargs):
        full = right(*args[:-1], torch.float32, **kwargs)
        return full if args[-1] == torch.float32 else (full.view(torch.int32) & -(1 << 16)).view(torch.float32).bfloat16()

    monkeypatch.setattr(ops, "SCALED_MM", truncating)
    found = verdict(MatmulCase(n=256, k=128, m=16))
    assert "bfloat16 output: error" in found.wrong and found.errors["bfloat16"] < 0.01


def test_results_that_differ_from_run_to_run_are_wrong(monkeypatch) -> None:
    runs = iter(range(10))
    spoiled(monkeypatch, "SCALED_MM", lambda out: out + (out.dtype == torch.bfloat16) * next(runs))
    assert verdict(CASES[0]).wrong == "two runs differ"


def test_a_product_that_goes_through_float16_is_wrong(monkeypatch) -> None:
    right = ops.SCALED_MM
    monkeypatch.setattr(ops, "SCALED_MM", lambda x, *args, **kwargs: right(x.half().bfloat16(), *args, **kwargs))
    for m in (1, 9):
        found = verdict(MatmulCase(n=64, k=128, m=m))
        assert found.errors["float32"] <= 5e-4 and "2^-100 to 2^100: error" in found.wrong


def test_nan_is_wrong(monkeypatch) -> None:
    spoiled(monkeypatch, "SCALED_MM", lambda out: torch.full_like(out, float("nan")))
    assert "error nan" in verdict(CASES[0]).wrong


@pytest.mark.parametrize("case", quantize_cases([(50, 96)], ("nvfp4", "mxfp4")), ids=lambda case: case.scheme)
def test_right_quantizers_pass(case) -> None:
    assert verify_quantize(case, CPU).wrong == ""


@pytest.mark.parametrize(("part", "name"), [(0, "codes"), (1, "scales"), (2, "global scale")])
def test_one_bit_of_a_quantizer_is_seen(monkeypatch, part, name) -> None:
    def flip(parts):
        parts = [t.clone() for t in parts]
        bits = parts[part].view(torch.int32 if part == 2 else torch.uint8)
        bits.view(-1)[-1] ^= 1
        return tuple(parts)

    spoiled(monkeypatch, "QUANTIZE", flip)
    found = verify_quantize(QuantizeCase(rows=50, columns=96), CPU)
    assert found.wrong.startswith(f"{name}: 1 of ") and "differ from the reference" in found.wrong


def test_one_bit_of_the_column_copy_is_seen(monkeypatch) -> None:
    def flip(parts):
        parts = [t.clone() for t in parts]
        parts[3].view(-1)[7] ^= 1
        return tuple(parts)

    spoiled(monkeypatch, "QUANTIZE_BOTH", flip)
    assert verify_quantize(QuantizeCase(rows=64, columns=96, axis=None), CPU).wrong.startswith("codes of columns: 1 of ")


def test_a_missing_row_is_seen(monkeypatch) -> None:
    spoiled(monkeypatch, "QUANTIZE", lambda parts: (parts[0][:-1], *parts[1:]))
    assert "where the reference has" in verify_quantize(QuantizeCase(rows=50, columns=96), CPU).wrong


@pytest.mark.parametrize("case", quantize_cases([(200, 144)], ("nvfp4", "mxfp4")), ids=lambda case: case.scheme)
def test_parts_of_a_right_quantizer_agree_with_the_whole(case) -> None:
    assert verify_quantize(case, CPU).wrong == ""


@pytest.mark.parametrize("axis", [-1, -2])
def test_a_wrong_last_row_of_a_large_tensor_is_seen(monkeypatch, axis) -> None:
    """In the sample, which is smaller, all is well."""

    def spoil(parts):
        codes = parts[0].clone()
        if codes.shape[0] > 1024:
            codes[-1, -1] ^= 1
        return (codes, *parts[1:])

    spoiled(monkeypatch, "QUANTIZE", spoil)
    shape = {"rows": 1040, "columns": 32} if axis == -1 else {"rows": 32, "columns": 1040}
    assert (
        "codes: 1 of 1024 differ from the reference, in the tensor that is timed"
        in verify_quantize(QuantizeCase(**shape, axis=axis), CPU).wrong
    )
