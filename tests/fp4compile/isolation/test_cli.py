"""`fp4compile sensitivity`: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fp4compile.cli import main
from fp4compile.policy.load import load_policy

SOURCE = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(20, 32), nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 20))
    return net.eval(), (torch.zeros(1, 12, dtype=torch.int64),)

def batches():
    return [torch.randint(0, 20, (2, 12), generator=torch.Generator().manual_seed(i)) for i in range(2)]
"""


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "net.py"
    path.write_text(SOURCE)
    return path


def test_table_json_pictures_and_policy(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sensitivity", str(file), "--policy", "nvfp4", "--isolate", "site", "role", "--role", "first=1", "--out", "out"]
    assert main([*command, "--keep", "0.7", "--keep-policy", "kept.toml"]) == 0
    said = capsys.readouterr()
    assert "one role at a time quantized" in said.out and "first" in said.out
    assert "kept.toml: 1 modules" in said.err
    assert {path.name for path in Path("out").iterdir()} == {"sensitivity.txt", "sensitivity.json", "sensitivity_roles.svg"}
    assert load_policy("kept.toml").rules[-1].setting.precision == "high"
    assert main([*command, "--limit", "1"]) == 1 and "another batches" in capsys.readouterr().err
    assert main([*command, "--json"]) == 0  # from the store
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["name"] for row in rows] == ["all", "1", "3", "first", "3"]
    assert Path("sensitivity.json").exists()


def test_a_loss_in_the_file_and_inputs_for_batches(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = SOURCE.partition("def batches")[0] + "\ndef loss(outputs, batch):\n    return outputs.square().mean()\n"
    file.write_text(own)
    assert main(["sensitivity", str(file), "--policy", "nvfp4_a16", "--no-estimate", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(row["kl"] is None and row["first_order"] is None for row in found["rows"])


def test_refusals(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sensitivity", str(file), "--role", "first"]) == 1
    assert "NAME=GLOB" in capsys.readouterr().err
    file.write_text(SOURCE.replace("return [torch.randint", "return []\n    [torch.randint"))
    assert main(["sensitivity", str(file)]) == 1
    assert "at least one batch" in capsys.readouterr().err
