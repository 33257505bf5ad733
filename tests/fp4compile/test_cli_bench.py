"""`fp4compile bench` as a person types it: it measures, goes on where it was stopped, and times nothing that is wrong."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
import torch

from fp4compile.bench import measure
from fp4compile.bench import run as bench_run
from fp4compile.cli import build_parser, main
from fp4compile.codegen import ops

SMALL = ["bench", "matmul", "--device", "cpu", "--quick", "--shapes", "64x32", "--peers", "none", "--activation", "bf16"]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "results"


def run(folder, *more: str, what: list[str] = SMALL) -> int:
    return main([*what, "--rows", "1,3", "--out", str(folder), *more])


def stored(folder) -> dict:
    return json.loads((folder / "bench.json").read_text())


def test_a_run_writes_json_markdown_and_picture(folder, capsys) -> None:
    assert run(folder) == 0
    printed = capsys.readouterr().out
    found = stored(folder)
    assert [row["case"]["m"] for row in found["rows"]] == [1, 3]
    for row in found["rows"]:
        assert set(row["times"]) == {"ours", "bf16"} and all(time > 0 for time in row["times"].values())
        assert row["wrong"] == "" and row["floor"] > 0 and row["errors"]["float32"] < 5e-4 and row["notes"]["kernel"] == "cpu"
    environment = found["environment"]
    assert environment["torch"] == torch.__version__ and environment["target"] == "cpu" and environment["python"] and environment["device"]
    assert found["speeds"]["copy"] > 0 and found["started"][:2] == "20"
    assert "64 x 32" in printed and "x bf16" in printed and environment["device"] in printed
    assert "| 64 x 32" in (folder / "bench.md").read_text()
    assert ElementTree.parse(folder / "speed.svg").getroot().tag.endswith("svg")


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, "--rows", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["key"] == "matmul 64x32 m=2 nvfp4 W4A16"
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_was_stopped_goes_on_where_it_was(folder, monkeypatch, capsys) -> None:
    measured: list[str] = []
    right = bench_run._measure

    def stopping(case, *rest):
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(case.key)
        return right(case, *rest)

    monkeypatch.setattr(bench_run, "_measure", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    first = stored(folder)
    assert [row["case"]["m"] for row in first["rows"]] == [1]
    monkeypatch.setattr(bench_run, "_measure", lambda case, *rest: measured.append(case.key) or right(case, *rest))
    assert run(folder) == 0
    assert measured == ["matmul 64x32 m=1 nvfp4 W4A16", "matmul 64x32 m=3 nvfp4 W4A16"]
    second = stored(folder)
    assert second["rows"][0] == first["rows"][0] and len(second["rows"]) == 2
    assert second["speeds"] == first["speeds"] and second["started"] == first["started"]
    assert run(folder) == 0 and len(measured) == 2


def test_a_peer_that_is_asked_for_later_is_measured_then(folder) -> None:
    assert run(folder) == 0
    before = {row["case"]["m"]: row["times"]["ours"] for row in stored(folder)["rows"]}
    assert main([*SMALL[:-4], "--activation", "bf16", "--rows", "1", "--peers", "int4", "--out", str(folder)]) == 0
    rows = {row["case"]["m"]: row for row in stored(folder)["rows"]}
    assert "int4" in rows[1]["times"] and "int4" not in rows[3]["times"] and rows[3]["times"]["ours"] == before[3]


def test_grouped_products_have_a_table_of_their_own(folder, capsys) -> None:
    what = [
        "bench",
        "grouped",
        "--device",
        "cpu",
        "--quick",
        "--shapes",
        "32x64",
        "--groups",
        "3",
        "--peers",
        "none",
        "--activation",
        "bf16",
    ]
    assert run(folder, what=what) == 0
    assert [row["kind"] for row in stored(folder)["rows"]] == ["grouped"] * 2
    assert "3 of 32 x 64" in capsys.readouterr().out and "3 of 32 x 64, nvfp4 W4A16" in (folder / "speed.svg").read_text()


@pytest.mark.parametrize(("field", "value"), [("torch", "2.9.1"), ("device", "NVIDIA B200"), ("sources", "0123"), ("rounds", "15")])
def test_a_folder_of_another_machine_or_version_is_refused_by_name(folder, capsys, field, value) -> None:
    assert run(folder) == 0
    found = stored(folder)
    found["environment"][field] = value
    (folder / "bench.json").write_text(json.dumps(found))
    assert run(folder) == 1
    message = capsys.readouterr().err
    assert f"{field} '{value}' there" in message and "another folder" in message
    assert stored(folder) == found


@pytest.mark.parametrize("text", ["not json", "[]", '{"version": 99}'])
def test_a_file_that_holds_something_else_is_refused_and_kept(folder, capsys, text) -> None:
    folder.mkdir()
    (folder / "bench.json").write_text(text)
    assert run(folder) == 1
    assert "holds no results" in capsys.readouterr().err and (folder / "bench.json").read_text() == text


def test_a_wrong_product_is_named_not_timed_and_fails_the_command(folder, monkeypatch, capsys) -> None:
    right = ops.SCALED_MM
    monkeypatch.setattr(ops, "SCALED_MM", lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    monkeypatch.setattr(measure, "prepare", lambda *_: pytest.fail("something wrong was timed"))
    assert run(folder) == 1
    out, err = capsys.readouterr()
    assert "WRONG, and not timed: matmul 64x32 m=1 nvfp4 W4A16: float32 output: error 1.00e-02" in out
    assert "2 of 2 cases are wrong" in err
    assert all(row["times"] == {} and row["wrong"] for row in stored(folder)["rows"])


def test_a_wrong_quantizer_fails_the_command(folder, monkeypatch, capsys) -> None:
    right = ops.QUANTIZE

    def off_by_one(*args, **kwargs):
        codes, *rest = right(*args, **kwargs)
        return (codes ^ 1, *rest)

    monkeypatch.setattr(ops, "QUANTIZE", off_by_one)
    assert run(folder, what=["bench", "quantize", "--device", "cpu", "--quick", "--shapes", "32x64", "--format", "mxfp4"]) == 1
    assert "codes: " in capsys.readouterr().out and stored(folder)["rows"][0]["times"] == {}


def test_an_operator_that_raises_is_wrong_with_what_it_said(folder, monkeypatch, capsys) -> None:
    def broken(*args, **kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(ops, "SCALED_MM", broken)
    assert run(folder) == 1
    assert "RuntimeError: no such kernel" in capsys.readouterr().out


def test_quantizers_are_timed_beside_a_copy(folder, capsys) -> None:
    assert run(folder, what=["bench", "quantize", "--device", "cpu", "--quick", "--shapes", "32x64"]) == 0
    rows = stored(folder)["rows"]
    assert len(rows) == 14 and {row["kind"] for row in rows} == {"quantize"} and len({row["key"] for row in rows}) == 14
    assert all(set(row["times"]) == {"ours", "copy"} for row in rows)
    assert "nvfp4+row" in capsys.readouterr().out and not (folder / "speed.svg").exists()


def test_a_peer_that_cannot_is_listed_with_its_reason(folder, capsys) -> None:
    given = ["--rows", "1", "--activation", "bf16", "--peers", "int4,gemlite", "--shapes", "64x48"]
    assert main([*SMALL[:-4], *given, "--out", str(folder)]) == 0
    row = stored(folder)["rows"][0]
    assert row["failed"] == {"int4": "PeerCannot: K=48 is no multiple of 32, the smallest of its groups", "gemlite": "not installed"}
    assert "gemlite, 1 case: not installed" in capsys.readouterr().out


def test_layers_are_chosen_by_phase_mode_and_policy() -> None:
    given = ["bench", "layer", "--device", "cpu", "--phase", "decode", "--mode", "reduce-overhead", "--policy", "nvfp4_a16"]
    chosen = bench_run.Request.of(build_parser().parse_args(given)).cases
    assert [(case.phase, case.mode, case.policy) for case in chosen] == [
        ("decode", "reduce-overhead", "bf16"),
        ("decode", "reduce-overhead", "nvfp4_a16"),
    ]
    every = bench_run.Request.of(build_parser().parse_args(given[:4])).cases
    assert len({case.key for case in every}) == 12 and set(chosen) < set(every)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--shapes", "64"], "'64' is no shape"),
        (["--shapes", "64x0"], "sizes are at least 1"),
        (["--rows", "1,many"], "something else than whole numbers"),
        (["--peers", "int5"], "unknown peer 'int5'. Did you mean 'int4'"),
    ],
)
def test_bad_arguments_are_named(capsys, given, said) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["bench", "matmul", *given])
    assert raised.value.code == 2 and said in capsys.readouterr().err
