"""A global scale each 1x128: bits against the oracle, products against float64 and the order of roundings, targets that have none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fp4compile.codegen import ops
from fp4compile.codegen.formats import Layout, QuantConfig
from fp4compile.codegen.kernel_spec import KernelSpec, Unsupported
from fp4compile.codegen.reference.block import dequantize_ref, quantize_ref
from fp4compile.codegen.reference.e2m1 import unpack_ref
from fp4compile.codegen.reference.hadamard import hadamard_ref
from fp4compile.codegen.reference.matmul import scaled_mm_ref
from fp4compile.codegen.registry import kernel_for, layouts_for
from fp4compile.codegen.target import Target
from tests.codegen import oracle

RUNS = QuantConfig(global_scale="1x128")  # type: ignore[arg-type]
ROW = QuantConfig(global_scale="row")  # type: ignore[arg-type]
SHAPES = ((5, 300), (2, 3, 7, 128), (17, 1), (0, 40), (4, 0))


def spread(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Runs of one row, and rows, of very different size; one run is zero and one holds an Inf."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-20, 15, shape[-1])
    if shape[-1] > 256:
        x[0, :128], x[1, 200] = 0, torch.inf
    return x


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("hadamard", [0, 16])
def test_every_run_is_quantized_by_its_own_maximum(shape: tuple[int, ...], rounding: str, hadamard: int) -> None:
    x, seed = spread(shape), torch.tensor(-77)
    config = QuantConfig(global_scale="1x128", rounding=rounding, hadamard=hadamard)  # type: ignore[arg-type]
    padded = torch.nn.functional.pad(x, (0, -shape[-1] % 128))
    rotated = hadamard_ref(padded, hadamard) if hadamard else padded
    runs = rotated.reshape(-1, 128).numpy()
    want = oracle.nvfp4(runs, granularity="row", random_bytes=oracle.random_bytes(-77, runs.shape) if rounding == "stochastic" else None)
    for axis, source in ((-1, x), (-2, x.mT.contiguous())):
        by_reference = quantize_ref(source, config, axis=axis, seed=seed)
        by_operator = ops.QUANTIZE(source, axis, *ops.quantize_args(config), seed)
        shapes = ops.SHAPE_RULES[ops.QUANTIZE](source, axis, *ops.quantize_args(config), seed)
        for (codes, scales, decode), like in ((by_reference, shapes), (by_operator, shapes)):
            assert [(t.shape, t.dtype) for t in (codes, scales, decode)] == [(t.shape, t.dtype) for t in like]
            assert decode.shape == (*shape[:-1], -(-shape[-1] // 128))
            flat = unpack_ref(codes).reshape(-1, 128).numpy(), scales.view(torch.uint8).reshape(-1, 8).numpy()
            assert oracle.mismatches(want, *flat) == (0, 0)
            assert np.array_equal(decode.reshape(-1).numpy(), want.decode)


@pytest.mark.parametrize(
    "configs", [(RUNS, RUNS), (RUNS, QuantConfig()), (ROW, RUNS)], ids=lambda pair: "x".join(c.describe() for c in pair)
)
@pytest.mark.parametrize("size", [(3, 70, 300), (40, 20, 64), (20, 33, 1024)], ids=str)
def test_products_sum_scaled_runs_in_their_order(configs: tuple[QuantConfig, QuantConfig], size: tuple[int, int, int]) -> None:
    (m, n, k), generator = size, torch.Generator().manual_seed(3)
    sources = (torch.randn(rows, k, generator=generator) * torch.logspace(-3, 3, k) for rows in (m, n))
    a, b = (ops.QUANTIZE(x, -1, *ops.quantize_args(c)) for x, c in zip(sources, configs, strict=True))
    bias = torch.randn(n, generator=generator)
    left, right = (dequantize_ref(*side)[:, :k].double() for side in (a, b))
    exact, magnitude = left @ right.T + bias.double(), left.abs() @ right.abs().T + bias.abs()
    for product in (scaled_mm_ref, ops.SCALED_MM):
        out = product(*a, *b, bias, k, torch.float32)
        assert ((out.double() - exact).abs() <= 160 * torch.finfo(torch.float32).eps * magnitude).all()
        assert torch.equal(product(*a, *b, bias, k, torch.bfloat16), out.bfloat16())
    total = np.zeros((m, n), np.float32)
    for run in range(-(-k // 128)):
        at = slice(run * 128, min(k, (run + 1) * 128))
        part = dequantize_ref(*a[:2])[:, at] @ dequantize_ref(*b[:2])[:, at].T
        outer = [decode[:, run] if decode.ndim == 2 else decode.expand(rows) for decode, rows in ((a[2], m), (b[2], n))]
        total = total + part.numpy() * np.multiply.outer(outer[0].numpy(), outer[1].numpy())
    assert np.array_equal(scaled_mm_ref(*a, *b, bias, k, torch.float32).numpy(), total + bias.numpy())


def test_batches_decoded_values_and_both_axes() -> None:
    x, w = spread((2, 5, 150)), torch.randn(7, 150)
    a, b = (ops.QUANTIZE(t, -1, *ops.quantize_args(RUNS)) for t in (x, w))
    assert torch.equal(ops.DEQUANTIZE(*a, 150, torch.bfloat16), dequantize_ref(*a)[..., :150].bfloat16())
    out = ops.SCALED_MM(*a, *b, None, 150, torch.float32)
    for i in range(2):
        assert torch.allclose(out[i], scaled_mm_ref(*(t[i] for t in a), *b, None, 150, torch.float32), rtol=1e-5)
    both = ops.QUANTIZE_BOTH(x, *ops.quantize_both_args(RUNS, ROW))
    apart = (*a, *ops.QUANTIZE(x, -2, *ops.quantize_args(ROW)))
    assert all(torch.equal(p.view(torch.uint8), q.view(torch.uint8)) for p, q in zip(both, apart, strict=True))


@pytest.mark.parametrize(
    ("op", "lhs", "rhs", "capability", "reason"),
    [
        ("scaled_mm", RUNS, RUNS, 100, "no tensor core scales a sum each 1x128, those of sm_100 included"),
        ("scaled_mm", ROW, RUNS, 121, "no tensor core"),
        ("scaled_grouped_mm", RUNS, RUNS, 90, "not in grouped ones"),
        ("scaled_mm", None, RUNS, 90, "both operands in 4 bits"),
        ("scaled_mm", RUNS, QuantConfig(format="mixfp4"), 90, "both operands in nvfp4"),
    ],
    ids=str,
)
def test_what_no_kernel_computes_is_refused_by_name(op: str, lhs, rhs, capability: int, reason: str) -> None:
    target = Target(name=f"sm_{capability}", device_type="cuda", capability=capability)
    found = kernel_for(KernelSpec(op=op, lhs=lhs, rhs=rhs, dtype=torch.bfloat16), target)
    assert isinstance(found, Unsupported) and reason in found.reason and 'global_scale = "row"' in found.reason


def test_emulation_reads_plain_codes() -> None:
    for capability, device_type, family in ((80, "cuda", "triton emulation"), (90, "cuda", "triton emulation"), (0, "cpu", "cpu")):
        target = Target(name="here", device_type=device_type, capability=capability)
        for pair in ((RUNS, RUNS), (RUNS, QuantConfig()), (ROW, RUNS)):
            spec = KernelSpec(op="scaled_mm", lhs=pair[0], rhs=pair[1], dtype=torch.bfloat16)
            assert kernel_for(spec, target) == family and layouts_for(spec, target) == (Layout.PLAIN, Layout.PLAIN)
