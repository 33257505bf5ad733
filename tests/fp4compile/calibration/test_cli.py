"""`fp4compile calibrate` as a person types it, and the page about it."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
import torch

from fp4compile.calibration.record import load_calibration
from fp4compile.cli import main
from fp4compile.policy.load import load_policy

MODEL = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16)), (torch.ones(4, 32),)
"""
BATCHES = """
def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 32, generator=generator) for _ in range(3)]
"""
POLICY = 'version = 1\nextends = "nvfp4_a16"\ncalibration = "made.pt"\n[default]\nweight = { rounding = "gptq" }\n'


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def test_the_policy_says_where_to_and_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "a_model.py").write_text(MODEL + BATCHES)
    (tmp_path / "p.toml").write_text(POLICY)
    assert main(["policy", "check", str(tmp_path / "p.toml")]) == 1
    assert "made.pt does not exist. Make it with `fp4compile calibrate MODEL.py --policy p.toml`" in capsys.readouterr().err
    assert main(["calibrate", str(tmp_path / "a_model.py"), "--policy", str(tmp_path / "p.toml"), "--limit", "2"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^ *0 +32 +12 +\S+ +full$", said, re.MULTILINE) and "made.pt: 2 values, 2 batches" in said
    assert load_calibration(tmp_path / "made.pt").statistics_for("2").moments is not None
    assert main(["policy", "check", str(tmp_path / "p.toml")]) == 0


def test_json_and_batches_of_another_module(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a_model.py").write_text(MODEL)
    (tmp_path / "some_data.py").write_text("import torch\n" + BATCHES)
    monkeypatch.syspath_prepend(tmp_path)
    file, out = str(tmp_path / "a_model.py"), str(tmp_path / "c.pt")
    assert main(["calibrate", file, "--batches", "some_data:batches", "--out", out, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["batches"] == 3 and [v["value read by"] for v in said["values"]] == [["0"], ["2"]] and said["unreached"] == []
    assert said["values"][0]["tokens"] == 18 and said["values"][0]["moments"] == "block"
    for given, message in (
        (["--out", out, "--batches", "some_data"], "no module and function"),
        (["--out", out, "--batches", "no_such_data:batches"], "No module named 'no_such_data'"),
        (["--out", out, "--batches", "some_data:windows"], "some_data has no function windows"),
        ([], "where to? Give --out FILE"),
    ):
        assert main(["calibrate", file, *given]) == 1
        assert message in capsys.readouterr().err


def test_batches_that_are_a_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "a_model.py").write_text(MODEL + BATCHES + "\nbatches = batches()[:2]\n")
    assert main(["calibrate", str(tmp_path / "a_model.py"), "--out", str(tmp_path / "c.pt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["batches"] == 2


def test_the_page_is_true():
    page = (Path(__file__).parents[3] / "docs" / "calibration.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```toml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert load_policy(tomllib.loads(example), calibrated=False).calibrated_by == "smollm2.pt"
