"""Commands as a person types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fp4compile.cli import main

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_help_lists_commands_and_environment(capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    assert all(name in text for name in ("demo", "explain", "policy", "passes", "doctor", "bench", "FP4COMPILE_POLICY", "FP4COMPILE_DUMP"))


def test_errors_end_in_one_line_and_exit_code_1(capsys) -> None:
    assert main(["explain", "no_such_file.py"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("fp4compile explain: ") and "does not exist" in message and "Traceback" not in message


def test_explain_prints_table_and_json(capsys) -> None:
    file = str(EXAMPLES / "explain_a_policy.py")
    assert main(["explain", file, "--policy", str(EXAMPLES / "policy.toml"), "--all"]) == 0
    assert "closest to the embedding" in capsys.readouterr().out
    assert main(["explain", file, "--policy", "nvfp4_a16", "--json"]) == 0
    sites = json.loads(capsys.readouterr().out)["graphs"][0]["sites"]
    assert {site["precision"] for site in sites} == {"nvfp4 W4A16"}


def test_explain_wants_a_model_function(tmp_path, capsys) -> None:
    (tmp_path / "empty.py").write_text("")
    assert main(["explain", str(tmp_path / "empty.py")]) == 1
    assert "has no function model()" in capsys.readouterr().err
    (tmp_path / "module.py").write_text("from torch import nn\nmodel = nn.Linear(2, 2)\n")
    assert main(["explain", str(tmp_path / "module.py")]) == 1
    assert "module.py has a module named model, not a function. Define a function `model()`" in capsys.readouterr().err


def test_doctor_names_versions_and_target(capsys) -> None:
    assert main(["doctor", "--json"]) in (0, 1)
    rows = {row["what"]: row for row in json.loads(capsys.readouterr().out)}
    # A wheel from PyPI calls itself 2.11.0 where torch says 2.11.0+cu130.
    assert torch.__version__.startswith(rows["torch"]["found"]) and rows["cpu"]["verdict"] == "ok"


@pytest.fixture
def program(tmp_path) -> Path:
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))
    torch.export.save(torch.export.export(model, (torch.randn(4, 32),)), tmp_path / "graph.pt2")
    return tmp_path / "graph.pt2"


def test_passes_run_over_an_exported_program(program, capsys) -> None:
    assert main(["passes", str(program), "--policy", "nvfp4"]) == 0
    text = capsys.readouterr().out
    assert text.count("torch.ops.fp4.scaled_mm.default(") == 2 and "aten.addmm" not in text
    assert main(["passes", str(program), "--run", "normalize,find-matmuls", "--json"]) == 0
    assert [p["pass"] for p in json.loads(capsys.readouterr().out)] == ["normalize", "find-matmuls"]


def test_passes_without_a_program_lists_them(capsys) -> None:
    assert main(["passes"]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("normalize ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("find-matmul", "unknown pass 'find-matmul'. Did you mean 'find-matmuls'"),
        ("normalize{deep=true}", "unknown option 'deep' in pass normalize"),
        ("normalize;cleanup", "cannot read 'normalize;cleanup'"),
    ],
)
def test_bad_pass_lists_are_named(program, capsys, text, message) -> None:
    assert main(["passes", str(program), "--run", text]) == 1
    assert message in capsys.readouterr().err
