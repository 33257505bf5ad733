"""Kernels compiled while Inductor compiles the rest: each operator of a graph runs once in another thread, on zeros, for nobody.

Triton compiles a kernel at its first call, 1 to 3 seconds each, one after another: for a training step as long again as Inductor takes.
Its compiler leaves Python's lock most of that time.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Final

import torch

from fp4compile.passes.operator_calls import OperatorCall

_log = logging.getLogger(__name__)
_MOST_THREADS: Final = 8  # each may hold the operands of one call


@dataclass(kw_only=True)
class KernelsAhead:
    """`start` as soon as a graph's calls are known, `finish` before it runs."""

    device: torch.device
    started: list[Future[None]] = field(default_factory=list)

    def start(self, calls: Iterable[OperatorCall]) -> None:
        """Begin to compile; on a CPU nothing is to be done, its kernels come compiled."""
        if self.device.type != "cuda":
            return
        pool = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="fp4compile-kernels")
        self.started += [pool.submit(_run, call, self.device) for call in calls]
        pool.shutdown(wait=False)

    def finish(self) -> None:
        """Wait. What failed is left to the call itself, which fails alike with the user's code in its traceback."""
        wait(self.started)
        for future in self.started:
            if error := future.exception():
                _log.info("a kernel was not compiled ahead: %s", error)
        self.started.clear()


@torch.no_grad()
def _run(call: OperatorCall, device: torch.device) -> None:
    with torch.cuda.device(device):
        call.run(device)
