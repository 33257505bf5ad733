"""A stand-in for the parts of Gluon that the Hopper kernels use, so that their own source runs on the CPU: Gluon has no interpreter.

Partitions are threads, barriers of memory are counters with phases, the copy engine copies at once, `wgmma` is a product in float32.
It shows that addresses, phases and orders are right. What the compiler makes of them is read elsewhere.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

PATIENCE = 20.0  # seconds, after which a barrier counts as dead
_CHANGED = threading.Condition()


class Value(torch.Tensor):
    """A tensor that has Gluon's methods."""

    @property
    def type(self) -> Any:  # type: ignore[override]
        return types.SimpleNamespace(layout=None)

    def to(self, dtype: Any, bitcast: bool = False) -> Tensor:  # type: ignore[override]
        dtype = torch.int64 if dtype == "i64" else dtype
        return self.contiguous().view(dtype) if bitcast else super().to(dtype)


class Barrier:
    """An mbarrier: a phase ends when `count` arrivals and all bytes that were announced have come."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0

    def _settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count
            _CHANGED.notify_all()

    def arrive(self, announced: int = 0) -> None:
        with _CHANGED:
            assert self.pending > 0, "more arrivals than a phase has"
            self.pending, self.bytes = self.pending - 1, self.bytes + announced
            self._settle()

    def receive(self, bytes_: int) -> None:
        with _CHANGED:
            self.bytes -= bytes_
            self._settle()

    def wait(self, phase: int) -> None:
        with _CHANGED:
            assert _CHANGED.wait_for(lambda: self.phase & 1 != phase, PATIENCE), "a barrier that nobody completes"


@dataclass
class Shared:
    """Shared memory, or a view of it; barriers live in `items`."""

    memory: Tensor | list[Barrier]
    dtype: Any = None
    layout: Any = None

    @property
    def shape(self) -> list[int]:
        return list(self.memory.shape) if isinstance(self.memory, Tensor) else [len(self.memory), 1]

    def index(self, i: int) -> Any:
        return self.memory[i] if isinstance(self.memory, list) else Shared(self.memory[i], self.dtype)

    def slice(self, start: int, length: int) -> Shared:
        assert isinstance(self.memory, Tensor)
        return Shared(self.memory[start : start + length], self.dtype)

    def load(self, layout: object) -> Tensor:
        assert isinstance(self.memory, Tensor)
        return self.memory.clone().as_subclass(Value)

    def store(self, value: Tensor) -> None:
        assert isinstance(self.memory, Tensor)
        self.memory.copy_(value)

    def permute(self, order: tuple[int, ...]) -> Tensor:
        assert isinstance(self.memory, Tensor)
        return self.memory.permute(order)


class Steps:
    """[stages, rows, 128] seen as [2 stages, rows, 64]."""

    def __init__(self, whole: Shared) -> None:
        self.whole = whole

    def index(self, i: int) -> Shared:
        assert isinstance(self.whole.memory, Tensor)
        return Shared(self.whole.memory[i // 2][:, i % 2 * 64 : i % 2 * 64 + 64], self.whole.dtype)


@dataclass
class Descriptor:
    """What the copy engine knows of a tensor."""

    base: Tensor
    block: list[int]
    layout: Any = None
    dtype: Any = field(init=False)
    block_type: Any = field(init=False)

    def __post_init__(self) -> None:
        self.dtype = self.base.dtype
        size = torch.Size(self.block).numel() * self.base.element_size()
        self.block_type = types.SimpleNamespace(nbytes=size)

    def load(self, at: list[int]) -> Tensor:
        """A block, zero past the ends of the tensor."""
        out = torch.zeros(self.block, dtype=self.base.dtype)
        inside = [slice(a, min(a + b, s)) for a, b, s in zip(at, self.block, self.base.shape, strict=True)]
        part = self.base[tuple(inside)]
        out[tuple(slice(0, s) for s in part.shape)] = part
        return out

    def store(self, at: list[int], value: Tensor) -> None:
        part = self.base[tuple(slice(a, a + b) for a, b in zip(at, self.block, strict=True))]
        part.copy_(value[tuple(slice(0, s) for s in part.shape)])


@dataclass
class Pointer:
    base: Tensor  # flat
    offset: Any = 0
    dtype: Any = None

    def __post_init__(self) -> None:
        self.dtype = types.SimpleNamespace(element_ty=self.base.dtype)

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.base, self.offset + more)


def _load(pointer: Pointer, mask: Tensor, other: float) -> Tensor:
    at = torch.as_tensor(pointer.offset).broadcast_to(mask.shape)
    return torch.where(mask, pointer.base[torch.where(mask, at, 0)], other)


def _store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
    at = torch.as_tensor(pointer.offset).broadcast_to(mask.shape)
    pointer.base[at[mask]] = value[mask]


class Wide(int):
    """A program id, which kernels make wide."""

    def to(self, dtype: object) -> int:
        return int(self)


def _load_tile(descriptor: Descriptor, at: list[int], barrier: Barrier, to: Shared, pred: bool = True) -> None:
    if pred:
        to.store(descriptor.load([int(a) for a in at]))
        barrier.receive(descriptor.block_type.nbytes)


def _warp_specialize(partitions: list[tuple[Callable[..., None], tuple[Any, ...]]], warps: list[int], registers: list[int]) -> None:
    assert len(partitions) == len(warps) + 1 == len(registers) + 1
    with ThreadPoolExecutor(len(partitions)) as pool:
        running = [pool.submit(function, *arguments) for function, arguments in partitions]
    for each in running:
        each.result()


def _allocate(dtype: Any, shape: list[int], layout: Any) -> Shared:
    if dtype == "i64":
        return Shared([Barrier() for _ in range(shape[0])])
    return Shared(torch.full(shape, 7, dtype=dtype), dtype)


def _init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.pending = count


def _wgmma(a: Any, b: Tensor, acc: Tensor, is_async: bool = False) -> Tensor:
    left: Any = a.memory if isinstance(a, Shared) else a
    return acc + left.float() @ b.float()


def _language(program: tuple[int, int], programs: int) -> types.SimpleNamespace:
    anything = lambda *args, **named: None  # noqa: E731
    return types.SimpleNamespace(
        constexpr=lambda value: value, static_range=range, cdiv=lambda a, b: -(-a // b), minimum=min, maximum=max, num_warps=lambda: 4,
        where=lambda c, a, b: torch.where(c, a, b) if isinstance(c, Tensor) else a if c else b, to_tensor=lambda value: value,
        program_id=lambda axis: Wide(program[axis]), num_programs=lambda axis: programs, static_assert=anything,
        allocate_shared_memory=_allocate, warp_specialize=_warp_specialize, load=_load, store=_store,
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype).as_subclass(Value),
        arange=lambda a, b, layout: torch.arange(a, b).as_subclass(Value),
        split=lambda x: x.unbind(-1), join=lambda a, b: torch.stack((a, b), -1), reshape=lambda x, shape: x.reshape(shape),
        permute=lambda x, order: x.permute(order), convert_layout=lambda x, layout, assert_trivial=False: x,
        NVMMADistributedLayout=anything, NVMMASharedLayout=anything, DotOperandLayout=anything, SliceLayout=anything,
        DistributedLinearLayout=anything, bfloat16=torch.bfloat16, float16=torch.float16, float32=torch.float32, int32=torch.int32,
        int16=torch.int16, int64="i64",
    )  # fmt: skip


def on_the_cpu(kernel: Any, program: tuple[int, int], programs: int, replaced: dict[str, Any]) -> Callable[..., None]:
    """The function of `kernel`, a Gluon kernel, and all that it calls, over the stand-in; `replaced` names what else is replaced."""
    barriers = types.SimpleNamespace(
        init=_init, wait=lambda b, phase, pred=True: b.wait(phase), MBarrierLayout=lambda: None,
        expect=lambda b, bytes_, pred=True: b.arrive(bytes_) if pred else None,
        arrive=lambda b, count, pred=True: b.arrive() if pred else None,
    )  # fmt: skip
    names = {
        "gl": _language(program, programs), "mbarrier": barriers, "_barrier": lambda: None, "_load_tile": _load_tile, "as_steps": Steps,
        "warpgroup_mma": _wgmma, "warpgroup_mma_wait": lambda left, deps: deps[0], "fence_async_shared": lambda: None,
        "tma": types.SimpleNamespace(store_wait=lambda left: None), "_store_tile": lambda d, at, s: d.store(at, s.memory),
        "tl": types.SimpleNamespace(extra=types.SimpleNamespace(cuda=types.SimpleNamespace(gdc_wait=lambda: None))),
    } | replaced  # fmt: skip
    return _bound(kernel, names, {})


def _bound(kernel: Any, names: dict[str, Any], known: dict[int, Callable[..., Any]]) -> Callable[..., Any]:
    """A copy of the Python function behind `kernel` whose globals, Gluon functions among them, are the stand-in's."""
    if id(kernel) in known:
        return known[id(kernel)]
    function = kernel.fn
    scope: dict[str, Any] = {}
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__)
    known[id(kernel)] = copy
    for name, value in function.__globals__.items():
        if name in names:
            scope[name] = names[name]
        elif hasattr(value, "fn") and hasattr(value, "arg_names"):
            scope[name] = _bound(value, names, known)
        else:
            scope[name] = getattr(value, "value", value) if type(value).__name__ == "constexpr" else value
    return copy
