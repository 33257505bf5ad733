"""The whole demo on a one-layer model: what it prints, what it writes, when it says no."""

from __future__ import annotations

import json

import pytest
import torch

from fp4compile.cli import build_parser
from fp4compile.demo import run
from fp4compile.demo.measure import TextScore
from fp4compile.demo.model import load_tokenizer, open_gguf
from fp4compile.demo.rows import Row, quality_table
from fp4compile.policy.load import load_policy
from tests.fp4compile.demo.tiny_llama import TOKENS, tiny_llama, write_gguf


@pytest.fixture
def tiny_world(monkeypatch, tmp_path):
    model = tiny_llama(layers=1).bfloat16()
    write_gguf(tiny_llama(layers=1), tmp_path / "tiny.gguf")
    tokenizer = load_tokenizer(open_gguf(tmp_path / "tiny.gguf"))
    text = torch.randint(len(TOKENS), (2, 64))
    monkeypatch.setattr(run, "PROMPT", "the cat")
    monkeypatch.setattr(run, "_load", lambda cache, count: (model, tokenizer, text))
    return model


def test_demo_measures_checks_and_writes(tiny_world, tmp_path, capsys):
    args = build_parser().parse_args([
        "demo",
        "--policy",
        "nvfp4",
        "--tokens",
        "3",
        "--device",
        "cpu",
        "--json",
        str(tmp_path / "out.json"),
    ])
    assert args.run(args) == 0
    printed = capsys.readouterr().out
    assert "model.layers.{0}" in printed or "model.layers.0.mlp.down_proj" in printed
    assert "without the compiler: they agree" in printed
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["check"]["agrees"]
    bf16, nvfp4 = figures["rows"]
    assert nvfp4["perplexity"] != bf16["perplexity"]
    # 7 Linears of 16-bit weights become 4.5 bits; one float32 global scale each.
    values = sum(layer.weight.numel() for name, layer in tiny_world.named_modules() if name.endswith("_proj"))
    assert bf16["weight_bytes"] - nvfp4["weight_bytes"] == values * (16 - 4.5) / 8 - 7 * 4
    assert nvfp4["generated"].startswith("the cat")


def test_the_shipped_policy_file_loads():
    plans = run._plans(build_parser().parse_args(["demo", "--tokens", "5"]))
    assert [(plan.name, plan.tokens) for plan in plans] == [("nvfp4", 5), ("four_over_six", 0), ("nvfp4_a16", 5)]
    assert {config.scale_rule for config in load_policy(plans[1].policy).base.values()} == {"four_over_six"}


def row(name: str, policy: str, loss: float, size: int = 100) -> Row:
    return Row(name=name, policy=policy, weight_bytes=size, text=TextScore(nll=torch.full((1, 4), loss), seconds=(1.0,)), generation=None)


def test_tables_compare_with_the_first_row():
    table = quality_table([row("bf16", "", 2.0, 1000), row("nvfp4", "nvfp4", 2.25, 250)])
    assert table.splitlines()[-1].split() == ["nvfp4", "9.49", "+0.2500", "(0.0000)", "0.0", "4.00x"]
    assert table.splitlines()[-2].split() == ["bf16", "7.39", "0.0"]


@pytest.mark.parametrize("given", [["--windows", "0"], ["--tokens", "-1"], ["--device", "tpu"]])
def test_bad_arguments_are_refused(given, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["demo", *given])
    assert given[0] in capsys.readouterr().err
