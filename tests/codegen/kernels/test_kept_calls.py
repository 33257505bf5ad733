"""Launches that skip Triton's dispatcher: the same kernel, grid and arguments as it would get, and none for another variant.

Of products, and of what decodes and tiles for them.
What Triton compiles is stood for by a recorder, so nothing runs.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing, so it keeps nothing", allow_module_level=True)

from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

from fp4compile.codegen.kernels import decode_mm as decode
from fp4compile.codegen.kernels import launch_dequantize, launch_half_hopper, launch_hopper, launch_register
from fp4compile.codegen.kernels.decode_mm import NarrowTile, decode_mm
from fp4compile.codegen.kernels.hopper_tiles import HALF_TILES, REGISTER_TILES, TILES, choose_hopper_tile, choose_register_tile
from fp4compile.codegen.kernels.launch_dequantize import dequantize, dequantize_tiled, tile_on_device
from fp4compile.codegen.kernels.launch_half_hopper import multiply_halves_hopper
from fp4compile.codegen.kernels.launch_hopper import multiply_groups_hopper

M, N, K, GROUPS = 40, 256, 1024, 3
NARROW = NarrowTile()
KEPT = [
    decode._narrow_call, launch_register._product, launch_register._pairing, launch_register._pairing_words,
    launch_half_hopper._product, launch_hopper._product, launch_hopper._summing,
    launch_dequantize._decoding, launch_dequantize._decoding_tiles, launch_dequantize._tiling,
]  # fmt: skip


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    dispatched: bool

    def shown(self) -> tuple[object, ...]:
        return self.kernel, self.grid, {name: _shown(value) for name, value in self.arguments.items()}


def _shown(value: Any) -> object:
    if isinstance(value, TensorDescriptor):
        return value.base.dtype, value.shape, value.strides, value.block_shape, value.layout
    return (value.dtype, value.shape, value.stride()) if isinstance(value, Tensor) else value


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    found: list[Launch] = []

    class Compiled:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *values: found.append(
                Launch(self.kernel.__name__, grid, dict(zip(self.kernel.arg_names, values, strict=True)), False)
            )

    def dispatch(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Compiled:
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | named
        found.append(Launch(kernel.__name__, grid, {name: values[name] for name in kernel.arg_names}, True))
        return Compiled(kernel)

    _forget()
    monkeypatch.setattr(JITFunction, "run", dispatch)
    yield found
    _forget()


def _forget() -> None:
    for kept in KEPT:
        kept.cache_clear()


def weight(*groups: int) -> tuple[Tensor, Tensor]:
    codes = torch.zeros(*groups, N // 16, K // 128, 1024, dtype=torch.uint8)
    return codes, torch.zeros(*groups, N // 16, K // 128, 128, dtype=torch.uint8).view(torch.float8_e4m3fn)


def product(tile: Any, m: int = M, k: int = K, **named: Any) -> Tensor:
    given = {"dtype": torch.bfloat16, "bias": torch.zeros(N), "b_global": torch.ones(()), "early": False} | named
    x = torch.zeros(m, k, dtype=given["dtype"])
    return decode_mm(x, *weight(), given["b_global"], given["bias"], torch.bfloat16, n=N, weight_is_old=given["early"], tile=tile)


def halves(n: int) -> Tensor:
    a, b, out = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((M, K), (n, K), (M, n)))
    multiply_halves_hopper(a, b, torch.ones(M), torch.ones(()), None, out, HALF_TILES[0])
    return out


def groups() -> Tensor:
    x, out = torch.zeros(M, K, dtype=torch.bfloat16), torch.zeros(M, N, dtype=torch.bfloat16)
    multiply_groups_hopper(x, *weight(GROUPS), None, torch.ones(GROUPS), torch.zeros(GROUPS, dtype=torch.int32), out, TILES[1])
    return out


def plain() -> tuple[Tensor, Tensor]:
    return torch.zeros(N, K // 2, dtype=torch.uint8), torch.zeros(N, K // 16, dtype=torch.uint8).view(torch.float8_e4m3fn)


SPLIT = choose_register_tile(M, N, K, 132)
CALLS: dict[str, Callable[[], Tensor]] = {
    "few rows": functools.partial(product, NARROW, 1),
    "few rows, a weight that is old": functools.partial(product, NARROW, 8, early=True),
    "few rows, padded": functools.partial(product, NARROW, 3, K - 6),
    "registers, k in splits": functools.partial(product, SPLIT),
    "registers": functools.partial(product, REGISTER_TILES[0]),
    "registers, an odd K": functools.partial(product, REGISTER_TILES[0], M, K - 5),
    "shared memory, k in splits": functools.partial(product, choose_hopper_tile(M, N, K, 132)),
    "halves": functools.partial(halves, N),
    "halves whose rows no copy engine stores": functools.partial(halves, N + 4),
    "groups": groups,
    "decoding": lambda: dequantize(*plain(), K, torch.bfloat16),
    "decoding tiles": lambda: dequantize_tiled(*weight(), N, torch.float16),
    "tiling": lambda: tile_on_device(*plain())[0],
}


@pytest.mark.parametrize("name", CALLS)
def test_a_second_launch_is_the_first_without_the_dispatcher(name: str, launches: list[Launch]) -> None:
    CALLS[name]()
    first, launches[:] = list(launches), []
    out = CALLS[name]()
    assert [each.shown() for each in launches] == [each.shown() for each in first]
    assert all(each.dispatched for each in first)
    assert {each.kernel for each in launches if each.dispatched} <= {"group_tiles_kernel"}
    written = launches[-1].arguments
    assert written.get("out_ptr", written.get("tiled_codes_ptr")).data_ptr() == out.data_ptr()


def test_the_splits_and_the_flags_above_are_what_they_say(launches: list[Launch]) -> None:
    for name, kernels in (
        ("registers, k in splits", 3),
        ("shared memory, k in splits", 2),
        ("registers", 2),
        ("few rows", 1),
        ("groups", 2),
    ):
        launches.clear()
        CALLS[name]()
        assert len(launches) == kernels, name
    launches.clear()
    for name in ("halves", "halves whose rows no copy engine stores"):
        CALLS[name]()
    assert [each.arguments["out_desc"] is None for each in launches] == [False, True]


def shifted(dtype: torch.dtype) -> Tensor:
    """A vector that does not begin at a multiple of 16 bytes."""
    return torch.zeros(N + 1, dtype=dtype)[1:]


CHANGES: dict[str, dict[str, Any]] = {
    "no bias": {"bias": None},
    "a bias of another dtype": {"bias": torch.zeros(N, dtype=torch.bfloat16)},
    "a bias that begins elsewhere": {"bias": shifted(torch.float32)},
    "no global scale": {"b_global": None},
    "a global scale a row": {"b_global": torch.ones(N)},
    "x of another dtype": {"dtype": torch.float16},
    "another number of rows": {"m": 2},
    "a weight that is old": {"early": True},
}


@pytest.mark.parametrize(
    ("change", "tile"),
    [
        pytest.param(change, tile, id=f"{type(tile).__name__}, {change}")
        for change in CHANGES
        for tile in (NARROW, REGISTER_TILES[4], TILES[0])
        if tile is NARROW or "early" not in CHANGES[change]  # the others say themselves whether they start early
    ],
)
def test_another_variant_is_dispatched(tile: Any, change: str, launches: list[Launch]) -> None:
    product(tile, m=1)
    launches.clear()
    product(tile, **({"m": 1} | CHANGES[change]))
    assert launches[-1].dispatched
    launches.clear()
    product(tile, m=1)
    assert not launches[-1].dispatched, "the first variant is still kept"


def test_nothing_keeps_a_tensor_alive(launches: list[Launch]) -> None:
    bias = torch.zeros(N)
    gone = weakref.ref(bias)
    product(NARROW, 1, bias=bias)
    product(NARROW, 1, bias=bias)
    launches.clear()
    del bias
    assert gone() is None
