"""Weight methods as policy lines: what a matmul gets from the example policies, what is refused, the numbers of a compiled model."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

import fp4compile
from fp4compile.codegen.errors import IllegalCombination
from fp4compile.codegen.formats import FORMATS, QuantConfig, ScaleRule
from fp4compile.demo.fake_quant import FakeQuantLinear
from fp4compile.passes.site import OperandKind
from fp4compile.policy.load import load_policy
from tests.fp4compile.policy.sites import llama

POLICIES = Path(__file__).parents[3] / "examples" / "policies"
FOUR_OVER_SIX = QuantConfig(scale_rule="four_over_six")
MEANING = {
    "sweep": (QuantConfig(scale_rule="sweep"), FOUR_OVER_SIX),
    "sweep_a16": (QuantConfig(scale_rule="sweep"), None),
    "soar_a16": (QuantConfig(scale_rule="soar_decoupled"), None),
    "mixfp4": (QuantConfig(format="mixfp4", scale_rule="sweep"), FOUR_OVER_SIX),
    "mixfp4_a16": (QuantConfig(format="mixfp4", scale_rule="sweep"), None),
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def test_every_example_policy_is_tested_here():
    assert {path.stem for path in POLICIES.glob("*.toml")} >= set(MEANING)


@pytest.mark.parametrize("name", MEANING)
def test_what_an_example_policy_means(name: str):
    policy = load_policy(POLICIES / f"{name}.toml")
    weight, activation = MEANING[name]
    expected = {OperandKind.WEIGHT: weight} | ({OperandKind.ACTIVATION: activation} if activation else {})
    decisions = policy.decide(llama(), training=False)
    assert expected in [d.configs for d in decisions] and {} in [d.configs for d in decisions]  # heads stay high
    assert load_policy({"version": 1, "extends": str(POLICIES / f"{name}.toml")}).base == policy.base


def test_the_page_of_methods_is_true():
    page = (POLICIES.parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```toml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert examples and all(load_policy(tomllib.loads(example)).fingerprint() for example in examples)
    offline = [rule for rule in ScaleRule if not rule.startswith(("amax", "four_over_six"))]
    assert all(f'"{name}"' in page for name in (*offline, *(f for f, fmt in FORMATS.items() if fmt.flagged_values)))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("name", MEANING)
def test_a_compiled_model_computes_what_the_policy_says(name: str):
    model, x = Mlp().bfloat16(), torch.randn(5, 64).bfloat16()
    weight, activation = MEANING[name]
    compiled = torch.compile(model, backend="fp4", options={"policy": str(POLICIES / f"{name}.toml"), "strict": True})
    with torch.no_grad():
        found = compiled(x)
        eager = Mlp().bfloat16()
        eager.load_state_dict(model.state_dict())
        for part in ("up", "down"):
            setattr(eager, part, FakeQuantLinear(getattr(eager, part), weight, activation))
        expected = eager(x)
    assert torch.allclose(found.float(), expected.float(), rtol=2e-2, atol=2e-2)
    rows = fp4compile.last_report().sites
    assert {row.precision for row in rows} == {f"{weight.format} {'W4A4' if activation else 'W4A16'}"} and not any(r.fallback for r in rows)


def test_freed_weights_come_back_from_flagged_codes():
    model = nn.Linear(64, 48, bias=False).bfloat16()
    original = model.weight.detach().clone()
    compiled = torch.compile(model, backend="fp4", options={"policy": str(POLICIES / "mixfp4_a16.toml"), "free_weights": True})
    with torch.no_grad():
        compiled(torch.randn(3, 64).bfloat16())
    assert model.weight.isnan().all() and fp4compile.restore(model) == 1
    expected = fp4compile.quantize(original, "mixfp4", scale_rule="sweep").dequantize()
    assert torch.equal(model.weight, expected)


REFUSED = {
    "a searched activation": (
        {"extends": "nvfp4", "default": {"activation": {"scale_rule": "sweep"}}},
        "inline policy, [default] (fprop): scale_rule = sweep on the activation. It has no kernel and runs once per weight; this "
        'operand is quantized in every call. Give it to the weight alone, and use scale_rule = "four_over_six" here.',
    ),
    "a mixed activation": (
        {"extends": "nvfp4", "default": {"format": "mixfp4"}},
        "inline policy, [default] (fprop): format = mixfp4 on the activation. It has no kernel and runs once per weight; this "
        'operand is quantized in every call. Give it to the weight alone, as in weight = { format = "mixfp4" }, '
        'or use precision = "w4a16".',
    ),
    "a searched gradient": (
        {"extends": "nvfp4_train", "training": {"wgrad": {"gradient": {"scale_rule": "soar", "rounding": "nearest"}}}},
        "inline policy, [training] wgrad (wgrad): scale_rule = soar on the gradient.",
    ),
    "products of two searched activations": (
        {"extends": "nvfp4", "rule": [{"role": "matmul", "precision": "w4a4", "format": "if4"}]},
        "inline policy, rule 1 (matmul): format = if4 on the activation.",
    ),
    "gptq": (
        {"extends": "nvfp4_a16", "default": {"weight": {"rounding": "gptq"}}},
        "inline policy, [default] (fprop weight): rounding = gptq. It needs a calibration artefact, the second moments of the layer's "
        "input. Run `fp4compile calibrate` and name its file in the policy, calibration = 'file.pt'; or use scale_rule = 'sweep', "
        "which needs no data.",
    ),
    "local_hessian": (
        {"extends": "nvfp4_a16", "default": {"weight": {"scale_rule": "local_hessian"}}},
        "inline policy, [default] (fprop weight): scale_rule = local_hessian. It needs a calibration artefact",
    ),
    "blocks of two lengths": (
        {"extends": "mxfp4", "rule": [{"match": "a", "weight": {"format": "mixfp4"}}]},
        "inline policy, rule 1 (fprop): the operands of one matmul have the formats mixfp4 and mxfp4.",
    ),
    "SOAR on shared codes": (
        {"extends": "nvfp4_train", "default": {"weight": {"scale_rule": "soar"}}},
        "inline policy, [default] (fprop weight): scale_rule = soar with block = 16x16. Its closed form solves blocks of one row.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_when_the_policy_is_loaded(case: str):
    document, said = REFUSED[case]
    with pytest.raises(IllegalCombination) as refused:
        load_policy({"version": 1, **document})
    assert str(refused.value).startswith(said), str(refused.value)


@pytest.mark.parametrize("document", [
    {"extends": "nvfp4_a16", "default": {"format": "if4"}},
    {"extends": "nvfp4_train", "default": {"weight": {"scale_rule": "sweep"}}},
    {"extends": "nvfp4", "rule": [{"match": "a", "weight": {"format": "nvint4"}}]},
    {"extends": "nvfp4", "rule": [{"match": "a", "hadamard": 16, "weight": {"scale_rule": "sweep"}}]},
], ids=str)  # fmt: skip
def test_what_is_sound_is_let_through(document: dict[str, object]):
    assert load_policy({"version": 1, **document}).fingerprint()
