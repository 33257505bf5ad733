"""Median times of calls that are made in turns: on a GPU from CUDA graphs, on the CPU by the wall clock.

Calls of one contender work on copies of the weights, together larger than the last cache, so that each finds its own in memory, as a
decoder does. Contenders take turns within every round, so that a clock that changes, changes for all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final, Protocol

import torch

Call = Callable[[], object]
_CPU_CACHE: Final = 32 << 20  # torch does not say how large the last cache of a CPU is
_CALLS_A_TURN: Final = 8  # on the CPU


@dataclass(frozen=True, kw_only=True)
class Effort:
    """`rounds` of turns, the median of which counts; a turn on a GPU lasts at least `turn` microseconds."""

    rounds: int
    turn: float


FULL: Final = Effort(rounds=15, turn=2000.0)
QUICK: Final = Effort(rounds=5, turn=300.0)


class Timed(Protocol):
    """Something ready to be timed."""

    def turn(self) -> float:
        """Microseconds of one call."""
        ...


def copies_for(bytes_each: int, device: torch.device) -> int:
    """How many copies of `bytes_each` are four times as large as the last cache: at least 2, at most 64."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else _CPU_CACHE
    return max(2, min(64, -(-4 * cache // max(bytes_each, 1))))


def prepare(calls: Sequence[Call], device: torch.device, effort: Effort) -> Timed:
    """Run some of `calls`, which compiles what compiles when it first runs, and record all of them."""
    if device.type == "cpu":
        for call in calls[:2]:
            call()
        return _WallClock(calls)
    return _Graph(calls, device, effort.turn)


def in_turns(contenders: Mapping[str, Timed], effort: Effort) -> dict[str, float]:
    """Median microseconds of one call of each."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(effort.rounds):
        for name, contender in contenders.items():
            taken[name].append(contender.turn())
    return {name: median(times) for name, times in taken.items()}


def microseconds(calls: Sequence[Call], device: torch.device, effort: Effort) -> float:
    """Median time of one of `calls`."""
    return in_turns({"": prepare(calls, device, effort)}, effort)[""]


class _WallClock:
    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = calls
        self._next = 0

    def turn(self) -> float:
        start = time.perf_counter_ns()
        for _ in range(_CALLS_A_TURN):
            self._calls[self._next % len(self._calls)]()
            self._next += 1
        return (time.perf_counter_ns() - start) / 1e3 / _CALLS_A_TURN


class _Graph:
    """All calls in one CUDA graph, replayed so often that the start of the first replay does not count."""

    def __init__(self, calls: Sequence[Call], device: torch.device, turn: float) -> None:
        self._calls = calls  # kept for what they refer to: the graph reads that memory again, and does not hold it
        self._device, self._count, self._replays = device, len(calls), 1
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for call in calls[:2]:
                call()
        stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            for call in calls:
                call()
        self.turn()
        self._replays = max(1, round(turn / max(self.turn() * self._count, 1.0)))

    def turn(self) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.device(self._device):
            start.record()
            for _ in range(self._replays):
                self._graph.replay()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / self._count / self._replays
