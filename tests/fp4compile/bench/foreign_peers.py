"""Peers that go wrong in the ways foreign packages do. A module of its own, for the process that tries them imports it."""

from __future__ import annotations

import os
import sys
import threading
import time

import torch

from fp4compile.bench.peers import Peer


def aborting(case, weights):
    print("dump\nThing.cpp:12: Assertion `isInt()' failed.\nmore dump", file=sys.stderr, flush=True)  # noqa: T201 (as a compiler does)
    os.abort()


def hanging(case, weights):
    time.sleep(600)


def lingering(case, weights):
    threading.Thread(target=time.sleep, args=(600,)).start()  # no process ends before its threads
    return working(case, weights)


def refusing(case, weights):
    raise RuntimeError("at 34:12:\n  tl.dot_scaled(...)\n\nno such instruction on this device")


def misshapen(case, weights):
    return [lambda x: torch.zeros(1)]


def working(case, weights):
    return [lambda x, w=w: x @ w.mT for w in weights]


def peer(prepare, package: str = "torch") -> Peer:
    return Peer(name=prepare.__name__, prepare=prepare, bits=16, package=package)
