"""Peers compute the product they are compared by; one that cannot is named with its reason, and none ends the bench."""

from __future__ import annotations

import multiprocessing
import time

import pytest
import torch

from fp4compile.bench import peers
from fp4compile.bench.case import MatmulCase
from fp4compile.bench.ours import activation, dense_weight, dense_weights, offsets
from fp4compile.bench.peers import BASELINE, PEERS, PeerCannot, describe, noting_failure, probe
from tests.fp4compile.bench import foreign_peers as foreign

CPU = torch.device("cpu")
CASE = MatmulCase(n=64, k=128, m=3)


@pytest.mark.parametrize("name", [BASELINE, "compiled bf16"])
def test_a_dense_peer_computes_the_product_of_each_copy(name) -> None:
    torch.compiler.reset()
    x = activation(CASE.m, CASE.k, CPU)
    calls = PEERS[name].calls(CASE, x)
    assert len(calls) >= 2
    for i in (0, 1):
        expected = x.double() @ dense_weight(CASE.n, CASE.k, CPU, i).double().mT
        assert (calls[i]().double() - expected).norm() < 0.01 * expected.norm()
    torch.compiler.reset()


def test_grouped_bf16_meets_each_group_with_its_rows() -> None:
    case = MatmulCase(n=64, k=128, m=20, groups=3)
    x, weights = activation(case.m, case.k, CPU), dense_weights(case, CPU, 1)
    ends = [0, *offsets(case, CPU).tolist()]
    expected = torch.cat([x[a:b].double() @ w.double().mT for a, b, w in zip(ends, ends[1:], weights, strict=False)])
    assert (PEERS[BASELINE].calls(case, x)[1]().double() - expected).norm() < 0.01 * expected.norm()
    assert probe(foreign.peer(foreign.aborting), case, CPU) == ""
    with pytest.raises(PeerCannot, match="grouped"):
        PEERS["int4"].calls(case, x)


def test_int4_gives_a_product_and_refuses_what_its_groups_do_not_divide() -> None:
    for case in (CASE, MatmulCase(n=64, k=96, m=3)):
        assert PEERS["int4"].calls(case, activation(case.m, case.k, CPU))[0]().shape == (case.m, case.n)
    odd = MatmulCase(n=64, k=100, m=3)
    with pytest.raises(PeerCannot, match="K=100 is no multiple of 32, the smallest"):
        PEERS["int4"].calls(odd, activation(odd.m, odd.k, CPU))


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (foreign.aborting, "it ended the process in which it was tried: Thing.cpp:12: Assertion `isInt()' failed."),
        (foreign.refusing, "RuntimeError: at 34:12: ... no such instruction on this device"),
        (foreign.misshapen, "its result has the shape (1,)"),
    ],
)
def test_what_a_foreign_peer_does_wrong_becomes_a_reason(prepare, said) -> None:
    assert said in probe(foreign.peer(prepare), CASE, CPU)


def test_what_a_compiler_dumps_before_it_dies_is_not_printed(capfd) -> None:
    probe(foreign.peer(foreign.aborting), CASE, CPU)
    assert "dump" not in capfd.readouterr().err


def test_a_foreign_peer_that_hangs_is_given_up(monkeypatch) -> None:
    monkeypatch.setattr(peers, "_PROBE_SECONDS", 3)
    assert probe(foreign.peer(foreign.hanging), CASE, CPU) == "no result after 3 seconds"


def test_a_foreign_peer_that_hangs_when_it_ends_is_ended() -> None:
    start = time.monotonic()
    assert probe(foreign.peer(foreign.lingering), CASE, CPU) == ""
    assert time.monotonic() - start < 300, "its thread sleeps for 600 seconds"
    assert not multiprocessing.active_children()


def test_a_foreign_peer_that_works_gives_no_reason() -> None:
    assert probe(foreign.peer(foreign.working), CASE, CPU) == ""


def test_an_absent_package_is_named_without_starting_a_process() -> None:
    assert probe(foreign.peer(foreign.aborting, package="no_such_package"), CASE, CPU) == "not installed"


def test_torchs_own_peers_are_not_tried_apart() -> None:
    assert [probe(PEERS[name], CASE, CPU) for name in (BASELINE, "int4")] == ["", ""]


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ('File "/home/someone/site-packages/gemlite/core.py", line 3', 'File "core.py", line 3'),
        ("error: /tmp/abc/main.c:1: no", "error: main.c:1: no"),
        ("see https://github.com/triton-lang/triton/issues/9433", "see https://github.com/triton-lang/triton/issues/9433"),
        ("../aten/src/ATen/x.cpp: 3 / 4 GB/s", "../aten/src/ATen/x.cpp: 3 / 4 GB/s"),
    ],
)
def test_reasons_name_files_without_their_folders(said, kept) -> None:
    assert describe(RuntimeError(said)) == f"RuntimeError: {kept}"


def test_failures_are_noted_and_other_exceptions_pass() -> None:
    failed: dict[str, str] = {}
    with noting_failure("a", failed):
        raise ValueError("first\n\nlast")
    assert failed == {"a": "ValueError: first ... last"}
    with pytest.raises(KeyboardInterrupt), noting_failure("b", failed):
        raise KeyboardInterrupt
    assert set(failed) == {"a"}
    assert describe(NotImplementedError()) == "NotImplementedError"
