"""Every example runs as its first lines say, and shows what it claims."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dynamo looks a function's module up by name
    spec.loader.exec_module(module)
    return module


def test_every_example_has_a_test_here_and_a_main() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"quickstart", "explain_a_policy", "train", "distill"}
    assert all(callable(load(name).main) for name in names)


def test_quickstart(tmp_path, capsys) -> None:
    difference = load("quickstart").main(["--dump", str(tmp_path), "--device", "cpu"])
    assert 0.01 < difference < 0.3
    assert "nvfp4 W4A4" in capsys.readouterr().out and list(tmp_path.rglob("graph.svg"))


def test_explain_a_policy() -> None:
    rows = {row.name: row for row in load("explain_a_policy").main([]).sites}
    assert rows["0.up"].precision == "bfloat16" and rows["0.up"].reason == "closest to the embedding"
    assert rows["1.down"].precision == "nvfp4 W4A4" and "outliers" in rows["1.down"].reason
    assert rows["2.up"].rule.startswith("preset nvfp4")


def test_train_learns_in_4_bits() -> None:
    final = load("train").main(["--steps", "40", "--device", "cpu"])
    assert final["bf16"] < 0.2 and final["nvfp4_train"] < 0.2  # the loss starts at 0.40


def test_distillation_wins_back_what_quantization_costs() -> None:
    found = load("distill").main(["--device", "cpu"])
    assert 0.005 < found["quantized"] < 0.1 and found["distilled"] < 0.95 * found["quantized"]
