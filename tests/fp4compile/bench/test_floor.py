"""Floors are the bytes and operations of the case, and nothing else."""

from __future__ import annotations

import pytest
import torch

from fp4compile.bench.case import MatmulCase, QuantizeCase
from fp4compile.bench.floor import Speeds, matmul_floor, measure_speeds, quantize_floor
from fp4compile.codegen.target import Target
from fp4compile.codegen.timing import Effort

CPU = torch.device("cpu")
HOPPER = Target(name="sm_90", device_type="cuda", capability=90)
BLACKWELL = Target(name="sm_100", device_type="cuda", capability=100)
SPEEDS = Speeds(copy=1000.0, matmul=1e6)


def test_floor_of_a_product_in_bytes_is_weight_input_and_output() -> None:
    case = MatmulCase(n=64, k=32, m=2)
    assert matmul_floor(case, SPEEDS, HOPPER) == ((64 * 32 * 4.5 / 8 + 2 * 2 * (64 + 32)) / 1000.0, "bytes")
    mx = MatmulCase(n=64, k=32, m=2, format="mxfp4")
    assert matmul_floor(mx, SPEEDS, HOPPER)[0] == pytest.approx((64 * 32 * 4.25 / 8 + 2 * 2 * (64 + 32)) / 1000.0)


def test_of_several_weights_those_without_rows_are_not_read() -> None:
    one, few, many = (matmul_floor(MatmulCase(n=64, k=32, m=m, groups=8), SPEEDS, HOPPER)[0] for m in (1, 3, 100))
    io = 2 * (64 + 32) / 1000.0
    assert [one - io, few - 3 * io, many - 100 * io] == pytest.approx([64 * 32 * 4.5 / 8 / 1000.0 * groups for groups in (1, 3, 8)])


def test_floor_of_a_large_product_is_operations_unless_fp4_has_instructions() -> None:
    case = MatmulCase(n=4096, k=4096, m=4096, activation="fp4")
    assert matmul_floor(case, SPEEDS, HOPPER) == (2 * 4096**3 / 1e6, "operations")
    assert matmul_floor(case, SPEEDS, BLACKWELL)[1] == "bytes"
    assert matmul_floor(MatmulCase(n=4096, k=4096, m=4096), SPEEDS, BLACKWELL)[1] == "operations"


@pytest.mark.parametrize(
    ("options", "bytes_an_element"),
    [
        ({}, 4.5625),
        ({"global_scale": "row"}, 2.5625),
        ({"format": "mxfp4"}, 2.53125),
        ({"global_scale": "static", "static_amax": 2.0}, 2.5625),
    ],
)
def test_floor_of_a_quantizer_reads_twice_where_a_tensor_shares_a_scale(options, bytes_an_element) -> None:
    floor, by = quantize_floor(QuantizeCase(rows=100, columns=64, options=options), SPEEDS)
    assert by == "bytes" and floor == pytest.approx(6400 * bytes_an_element / 1000.0)


def test_floor_of_both_axes_reads_once_and_writes_two_copies() -> None:
    row = {"global_scale": "row"}
    assert quantize_floor(QuantizeCase(rows=100, columns=64, axis=None), SPEEDS)[0] == pytest.approx(6400 * 5.125 / 1000.0)
    both = QuantizeCase(rows=100, columns=64, axis=None, options=row, column_options={**row, "hadamard": 16})
    assert quantize_floor(both, SPEEDS)[0] == pytest.approx(6400 * 3.125 / 1000.0)


def test_measured_speeds_are_those_of_a_machine() -> None:
    """Between a tenth of a GB/s and a PB/s, and from 10 MFLOP/s to an EFLOP/s: units are right."""
    speeds = measure_speeds(CPU, Effort(rounds=1, turn=0), small=True)
    assert 1e2 < speeds.copy < 1e9 and 10 < speeds.matmul < 1e12
    assert "GB/s" in str(speeds) and "TFLOP/s" in str(speeds)
