"""The `fp4::` operators: torch's own contract check, fake shapes against real ones, also with symbolic sizes."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fp4compile.codegen import ops
from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.reference.block import quantize_ref
from fp4compile.codegen.reference.hadamard import hadamard_ref
from fp4compile.codegen.reference.matmul import scaled_mm_ref

CONFIGS = (
    QuantConfig(),
    QuantConfig(global_scale="row", scale_rule="four_over_six"),
    QuantConfig(block="16x16"),
    QuantConfig(global_scale="static", static_amax=3.0),
    QuantConfig(rounding="stochastic"),
    QuantConfig(hadamard=64),
    QuantConfig(format="mxfp4"),
    QuantConfig(format="mxfp4", hadamard=16),
)


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _seed(config: QuantConfig) -> Tensor | None:
    return torch.tensor(5) if config.draws else None


def _quantize(x: Tensor, config: QuantConfig, axis: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    return ops.QUANTIZE(x, axis, *ops.quantize_args(config), _seed(config))


def _described(tensors: Tensor | tuple[Tensor, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]:
    tensors = (tensors,) if isinstance(tensors, Tensor) else tensors
    return [(tuple(t.shape), tuple(t.stride()) if t.numel() else (), t.dtype) for t in tensors]


def _check_contract(op: OpOverload, args: tuple[object, ...]) -> None:
    """torch's opcheck, whose schema test cannot compare float8 inputs; that no input is written to is checked here instead."""
    before = [t.view(torch.uint8).clone() for t in args if isinstance(t, Tensor) and t.ndim]
    torch.library.opcheck(op, args, test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"))
    out = op(*args)
    tensors = [t for t in args if isinstance(t, Tensor)]
    assert all(torch.equal(b, t.view(torch.uint8)) for b, t in zip(before, [t for t in tensors if t.ndim], strict=True))
    assert out.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in tensors}


@pytest.mark.parametrize("config", CONFIGS, ids=QuantConfig.describe)
def test_config_survives_the_operator_arguments(config: QuantConfig):
    assert ops.config_of(*ops.quantize_args(config)) == config


@pytest.mark.parametrize("config", CONFIGS, ids=QuantConfig.describe)
@pytest.mark.parametrize("axis", [-1, -2])
def test_quantize_keeps_the_operator_contract(config: QuantConfig, axis: int):
    x = _randn(19, 40, dtype=torch.bfloat16)
    torch.library.opcheck(ops.QUANTIZE, (x, axis, *ops.quantize_args(config), _seed(config)))


@pytest.mark.parametrize("config", [None, CONFIGS[0], CONFIGS[1], CONFIGS[6]], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_scaled_mm_keeps_the_operator_contract(config: QuantConfig | None, with_bias: bool):
    a = _randn(5, 40, dtype=torch.bfloat16)
    a_args = (a, None, None) if config is None else _quantize(a, config)
    b_args = _quantize(_randn(7, 40, seed=1), config or QuantConfig())
    bias = _randn(7, seed=2, dtype=torch.bfloat16) if with_bias else None
    _check_contract(ops.SCALED_MM, (*a_args, *b_args, bias, 40, torch.bfloat16))


def test_scaled_grouped_mm_keeps_the_operator_contract():
    offs = torch.tensor([2, 5], dtype=torch.int32)
    a_args, b_args = _quantize(_randn(5, 32), QuantConfig(global_scale="row")), _quantize(_randn(2, 7, 32), QuantConfig())
    _check_contract(ops.SCALED_GROUPED_MM, (*a_args, *b_args, offs, 32, torch.bfloat16))


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("size", [16, 128])
def test_hadamard_keeps_the_operator_contract(axis: int, size: int):
    torch.library.opcheck(ops.HADAMARD, (_randn(20, 40, dtype=torch.bfloat16), axis, size))


@pytest.mark.parametrize("config", CONFIGS, ids=QuantConfig.describe)
@pytest.mark.parametrize(("shape", "axis"), list(itertools.product([(3, 40), (2, 3, 17), (2, 1, 33, 5), (0, 16), (4, 0)], (-1, -2))))
def test_fake_quantize_agrees_with_the_real_one(config: QuantConfig, shape: tuple[int, ...], axis: int):
    real = _quantize(_randn(*shape), config, axis)
    with FakeTensorMode() as mode:
        fake = ops.QUANTIZE(mode.from_tensor(_randn(*shape)), axis, *ops.quantize_args(config), None)
    assert _described(tuple(fake)) == _described(tuple(real))


def test_fake_and_real_agree_on_a_transposed_view():
    x = _randn(40, 6).T
    with FakeTensorMode() as mode:
        fake = ops.QUANTIZE(mode.from_tensor(x), -1, *ops.quantize_args(QuantConfig()), None)
    assert _described(tuple(fake)) == _described(tuple(_quantize(x, QuantConfig())))


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("config", [QuantConfig(), QuantConfig(global_scale="row"), QuantConfig(format="mxfp4")], ids=QuantConfig.describe)
def test_one_symbolic_trace_serves_other_sizes(axis: int, config: QuantConfig):
    def program(x: Tensor, w: Tensor) -> Tensor:
        k = x.shape[axis]
        return ops.SCALED_MM(*_quantize(x, config, axis), *_quantize(w, config, axis), None, k, torch.float32)

    def inputs(m: int, n: int, k: int) -> tuple[Tensor, Tensor]:
        pair = _randn(m, k), _randn(n, k, seed=1)
        return pair if axis == -1 else (pair[0].T.contiguous(), pair[1].T.contiguous())

    graph = make_fx(program, tracing_mode="symbolic")(*inputs(5, 7, 40))
    output = next(n for n in graph.graph.nodes if n.op == "call_function" and n.target is ops.SCALED_MM)
    assert [isinstance(s, torch.SymInt) for s in output.meta["val"].shape] == [True, True]
    for m, n, k in ((5, 7, 40), (3, 9, 100), (17, 2, 17)):
        assert torch.equal(graph(*inputs(m, n, k)), program(*inputs(m, n, k)))


def test_the_cpu_operators_are_the_reference():
    x, w = _randn(6, 50, dtype=torch.bfloat16), _randn(9, 50, seed=1)
    for config in CONFIGS:
        ours, expected = _quantize(x, config), quantize_ref(x, config, seed=_seed(config))
        assert torch.equal(ours[0], expected[0]) and torch.equal(ours[2], expected[2])
        assert torch.equal(ours[1].view(torch.uint8), expected[1].view(torch.uint8))
    args = (*_quantize(x, CONFIGS[1]), *_quantize(w, CONFIGS[0]), None, 50, torch.float32)
    assert torch.allclose(ops.SCALED_MM(*args), scaled_mm_ref(*args), rtol=1e-5, atol=1e-5)  # float32 sums in another order


@pytest.mark.parametrize("axis", [-1, -2])
def test_hadamard_pads_with_zeros(axis: int):
    x = _randn(16, 16) if axis == -1 else _randn(16, 16).T
    padded = torch.nn.functional.pad(x if axis == -1 else x.T, (0, 48))
    out = ops.HADAMARD(x, axis, 64)
    expected = hadamard_ref(padded, 64)
    assert torch.equal(out, expected if axis == -1 else expected.T)
    with FakeTensorMode() as mode:
        fake = ops.HADAMARD(mode.from_tensor(x), axis, 64)
    assert _described(fake) == _described(out)


def test_importing_the_operators_loads_neither_triton_nor_inductor():
    program = "import sys, fp4compile.codegen.ops; print([m for m in ('triton', 'torch._inductor') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    assert loaded == "[]"
