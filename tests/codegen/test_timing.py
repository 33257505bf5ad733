"""Contenders take turns and the median counts; copies exceed the cache."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fp4compile.codegen.timing import QUICK, Effort, copies_for, in_turns, prepare

CPU = torch.device("cpu")


class Told:
    """A contender whose times are told beforehand."""

    def __init__(self, name: str, times: list[float], log: list[str]) -> None:
        self.name, self.times, self.log = name, iter(times), log

    def turn(self) -> float:
        self.log.append(self.name)
        return next(self.times)


def test_contenders_take_turns_and_the_median_counts() -> None:
    log: list[str] = []
    found = in_turns({"a": Told("a", [9, 1, 2], log), "b": Told("b", [5, 5, 70], log)}, Effort(rounds=3, turn=0))
    assert found == {"a": 2, "b": 5}
    assert log == ["a", "b"] * 3


def test_every_copy_is_called_in_its_turn_on_the_cpu() -> None:
    called: list[int] = []
    timed = prepare([lambda i=i: called.append(i) for i in range(5)], CPU, QUICK)
    warm = len(called)
    assert timed.turn() > 0 and timed.turn() > 0
    assert called[warm:] == [i % 5 for i in range(16)]


def test_copies_exceed_the_cache_four_times_within_limits() -> None:
    assert copies_for(16 << 20, CPU) * (16 << 20) >= 4 * (32 << 20)
    assert copies_for(10**12, CPU) == 2 and copies_for(1, CPU) == 64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_graph_keeps_what_its_calls_read() -> None:
    device, out = torch.device("cuda"), torch.zeros(4, device="cuda")
    timed = prepare([partial(torch.add, torch.full((4,), float(i), device=device), 1, out=out) for i in range(3)], device, QUICK)
    torch.cuda.empty_cache()
    junk = [torch.full((4,), 99.0, device=device) for _ in range(100)]
    assert timed.turn() > 0 and out.tolist() == [3.0] * 4 and len(junk) == 100
