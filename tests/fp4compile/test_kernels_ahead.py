"""Kernels compiled ahead: every call runs before `finish` returns, off the main thread; a failing one does not stop the compilation."""

from __future__ import annotations

import contextlib
import logging
import threading

import pytest
import torch

from fp4compile.kernels_ahead import KernelsAhead
from fp4compile.passes.operator_calls import OperatorCall


@pytest.fixture
def no_device(monkeypatch) -> torch.device:
    """A CUDA device by name, on which nothing is allocated here."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return torch.device("cuda")


def test_every_call_has_run_off_the_main_thread_without_gradients(no_device) -> None:
    seen: list[tuple[int, bool, bool]] = []

    def operator(number: int) -> None:
        seen.append((number, threading.current_thread() is threading.main_thread(), torch.is_grad_enabled()))

    ahead = KernelsAhead(device=no_device)
    ahead.start([OperatorCall(operator, (number,), ()) for number in range(20)])
    ahead.finish()
    assert sorted(seen) == [(number, False, False) for number in range(20)]


def test_a_failure_is_told_and_left_to_the_call_itself(no_device, caplog) -> None:
    def operator() -> None:
        raise torch.OutOfMemoryError("no room")

    ahead = KernelsAhead(device=no_device)
    ahead.start([OperatorCall(operator, (), ())])
    with caplog.at_level(logging.INFO, logger="fp4compile"):
        ahead.finish()
    assert "no room" in caplog.text


def test_nothing_runs_for_a_cpu() -> None:
    ahead = KernelsAhead(device=torch.device("cpu"))
    ahead.start([OperatorCall(lambda: pytest.fail("ran"), (), ())])
    ahead.finish()
