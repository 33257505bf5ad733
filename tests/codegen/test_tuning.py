"""The winner of a search is found again by later processes of the same device and versions, and by nothing else."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass

import pytest
import torch

from fp4compile.codegen import tuning
from fp4compile.codegen.tuning import TuningKey, lookup, record, rows_up_to, search, table_file

CPU = torch.device("cpu")
KEY = TuningKey(family="decode bf16", m=1, n=64, k=128)


@dataclass(frozen=True, kw_only=True)
class Small:
    rows: int = 1
    warps: int = 4


@dataclass(frozen=True, kw_only=True)
class Large:
    block: int
    stages: int | None = None


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "folder", lambda: tmp_path / "tuning")
    tuning._lookup.cache_clear()
    yield tmp_path
    tuning._lookup.cache_clear()


def test_nothing_recorded_is_none_and_writes_nothing(home) -> None:
    assert lookup(CPU, KEY, (Small,)) is None and list(home.iterdir()) == []


def test_a_winner_is_found_again_with_its_kind_and_fields() -> None:
    record(CPU, KEY, Large(block=32), 1.5)
    record(CPU, TuningKey(family="decode bf16", m=2, n=64, k=128), Small(rows=2), 2.5)
    tuning._lookup.cache_clear()  # as a later process
    assert lookup(CPU, KEY, (Small, Large)) == Large(block=32)
    assert lookup(CPU, TuningKey(family="decode bf16", m=2, n=64, k=128), (Small, Large)) == Small(rows=2)
    stored = json.loads(table_file(CPU).read_text())["winners"]["decode bf16 1x64x128"]
    assert stored == {"tile": {"kind": "Large", "block": 32, "stages": None}, "microseconds": 1.5}


@pytest.mark.parametrize("change", [{"family": "other"}, {"n": 65}, {"k": 256}, {"m": 2}])
def test_another_shape_or_family_has_no_winner(change) -> None:
    record(CPU, KEY, Small(), 1.0)
    assert lookup(CPU, TuningKey(**{"family": KEY.family, "m": 1, "n": 64, "k": 128} | change), (Small,)) is None


def test_many_rows_share_a_winner_up_to_a_power_of_two() -> None:
    assert [rows_up_to(m) for m in (1, 3, 8, 9, 16, 17, 100, 128, 129)] == [1, 3, 8, 16, 16, 32, 128, 128, 256]
    record(CPU, TuningKey(family="f", m=100, n=1, k=1), Small(), 1.0)
    assert lookup(CPU, TuningKey(family="f", m=128, n=1, k=1), (Small,)) == Small()
    assert lookup(CPU, TuningKey(family="f", m=129, n=1, k=1), (Small,)) is None


def test_other_versions_and_devices_have_files_of_their_own(monkeypatch) -> None:
    record(CPU, KEY, Small(), 1.0)
    here = table_file(CPU)
    monkeypatch.setattr(tuning, "installed", lambda package: "3.99")
    tuning._lookup.cache_clear()
    assert table_file(CPU) != here and lookup(CPU, KEY, (Small,)) is None
    assert set(here.name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-")


def test_tiles_of_kernels_that_changed_are_not_taken() -> None:
    record(CPU, KEY, Small(), 1.0)

    @dataclass(frozen=True, kw_only=True)
    class Small2:
        rows: int
        warps: int

    Small2.__name__ = "Small"
    assert lookup(CPU, KEY, (Small2,)) == Small2(rows=1, warps=4)

    @dataclass(frozen=True, kw_only=True)
    class Small3:
        rows: int

    Small3.__name__ = "Small"
    assert lookup(CPU, KEY, (Small3,)) is None and lookup(CPU, KEY, (Large,)) is None


@pytest.mark.parametrize("text", ["", "no json", "[]", '{"version": 0, "winners": {"decode bf16 1x64x128": {}}}'])
def test_a_broken_or_older_file_counts_as_none_and_is_replaced(text) -> None:
    file = table_file(CPU)
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert lookup(CPU, KEY, (Small,)) is None
    record(CPU, KEY, Small(warps=8), 1.0)
    assert lookup(CPU, KEY, (Small,)) == Small(warps=8)


def test_the_fastest_that_fits_wins_and_is_recorded() -> None:
    times = {1: 3.0, 2: None, 4: 1.0, 8: 1.0}

    def time(tile: Small) -> float:
        if times[tile.warps] is None:
            raise ValueError("out of shared memory")
        return times[tile.warps]

    found = search(CPU, KEY, [Small(warps=w) for w in times], time, (ValueError,))
    assert found == Small(warps=4) == lookup(CPU, KEY, (Small,))


def test_where_none_fits_none_is_recorded_and_other_errors_pass() -> None:
    def broken(tile: Small) -> float:
        raise ValueError

    assert search(CPU, KEY, [Small()], broken, (ValueError,)) is None and lookup(CPU, KEY, (Small,)) is None
    with pytest.raises(ValueError):
        search(CPU, KEY, [Small()], broken, (TypeError,))


def test_a_reader_never_meets_half_a_file() -> None:
    record(CPU, KEY, Small(), 1.0)
    stop, seen = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            seen.append(json.loads(table_file(CPU).read_text())["version"])

    reader = threading.Thread(target=read)
    reader.start()
    for n in range(40):
        record(CPU, TuningKey(family="f", m=1, n=n, k=1), Small(), 1.0)
    stop.set()
    reader.join()
    assert len(set(seen)) == 1 and lookup(CPU, TuningKey(family="f", m=1, n=39, k=1), (Small,)) == Small()
