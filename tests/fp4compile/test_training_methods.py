"""Training by published methods other than the preset's: their gradients against eager references of the same recipe."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fp4compile
from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.reference.block import dequantize_ref, quantize_ref
from fp4compile.policy.describe import settings_of
from fp4compile.policy.load import load_policy
from tests.fp4compile.eager_recipe import Recipe, with_recipe
from tests.fp4compile.test_training import gradients, relative

FOLDER = Path(__file__).parents[2] / "examples"
PLAIN = QuantConfig()
EVERY_LAYER = {"version": 1, "extends": "bf16", "default": {"precision": "w4a4"}}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch.manual_seed(0)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(40, 72), nn.GELU(), nn.Linear(72, 56, bias=False), nn.GELU(), nn.Linear(56, 24))


def compiled(model: nn.Module, training: dict) -> nn.Module:
    policy = {**EVERY_LAYER, "training": {"fprop": "w4a4", **training}}
    return torch.compile(model, backend="fp4", options={"policy": policy, "verify": True, "strict": True})


def test_backward_operands_from_the_codes_of_the_forward_equal_the_eager_recipe() -> None:
    of_forward = {"source": "forward"}
    model, x = mlp(), torch.randn(3, 7, 40)
    got = gradients(model, compiled(model, {"dgrad": {"weight": of_forward}, "wgrad": {"hadamard": 16, "activation": of_forward}}), x)
    rotated = QuantConfig(hadamard=16)
    recipe = Recipe(dgrad_dy=PLAIN, dgrad_w=PLAIN, wgrad_x=rotated, wgrad_dy=rotated, of_forward=True)
    reference, other = (with_recipe(copy.deepcopy(model), Recipe(**{**vars(recipe), "of_forward": o})) for o in (True, False))
    want, not_want = gradients(reference, reference, x), gradients(other, other, x)
    for name in ("x", "0.weight", "2.weight", "4.weight"):
        assert relative(got[name], want[name]) < 2e-3 < relative(got[name], not_want[name]), name


def test_training_in_mxfp4_equals_the_eager_recipe() -> None:
    mxfp4, rotated = QuantConfig(format="mxfp4"), QuantConfig(format="mxfp4", hadamard=32)
    model, x = mlp(), torch.randn(3, 7, 40)
    policy = {**EVERY_LAYER, "default": {"precision": "w4a4", "format": "mxfp4"}}
    policy["training"] = {"fprop": "w4a4", "dgrad": "w4a4", "wgrad": {"hadamard": 32}}
    got = gradients(model, torch.compile(model, backend="fp4", options={"policy": policy, "strict": True}), x)
    recipe = Recipe(fprop_x=mxfp4, fprop_w=mxfp4, dgrad_dy=mxfp4, dgrad_w=mxfp4, wgrad_x=rotated, wgrad_dy=rotated)
    reference = with_recipe(copy.deepcopy(model), recipe)
    for name, value in gradients(reference, reference, x).items():
        assert relative(got[name], value) < 2e-3, name
    assert all(row.precision == "mxfp4 W4A4" for row in fp4compile.last_report().sites)


def test_training_with_a_global_scale_each_128_values_equals_the_eager_recipe() -> None:
    outer = {"global_scale": "1x128"}
    runs, rotated = QuantConfig(**outer), QuantConfig(**outer, hadamard=16)
    model = nn.Sequential(nn.Linear(300, 72), nn.GELU(), nn.Linear(72, 24, bias=False))
    x = torch.randn(3, 50, 300) * torch.logspace(-2, 2, 300)
    policy = {**EVERY_LAYER, "default": {"precision": "w4a4", "activation": outer, "weight": outer, "gradient": outer}}
    policy["training"] = {"fprop": "w4a4", "dgrad": "w4a4", "wgrad": {"hadamard": 16}}
    got = gradients(model, torch.compile(model, backend="fp4", options={"policy": policy, "strict": True, "verify": True}), x)
    recipe = Recipe(fprop_x=runs, fprop_w=runs, dgrad_dy=runs, dgrad_w=runs, wgrad_x=rotated, wgrad_dy=rotated)
    by_tensor = Recipe(dgrad_dy=PLAIN, dgrad_w=PLAIN, wgrad_x=QuantConfig(hadamard=16), wgrad_dy=QuantConfig(hadamard=16))
    reference, other = (with_recipe(copy.deepcopy(model), r) for r in (recipe, by_tensor))
    not_want = gradients(other, other, x)
    for name, value in gradients(reference, reference, x).items():
        assert relative(got[name], value) < 2e-3, name
        assert "bias" in name or relative(got[name], not_want[name]) > 2e-3, name
    assert "1x128" in fp4compile.last_report().to_table()


def test_weights_with_a_global_scale_each_128_values_are_stored_once_and_come_back() -> None:
    model, x = nn.Sequential(nn.Linear(300, 48)), torch.randn(4, 300)
    weight, bias, config = model[0].weight.detach().clone(), model[0].bias.detach(), QuantConfig(global_scale="1x128")
    policy = {**EVERY_LAYER, "default": {"precision": "w4a4", "activation": {"global_scale": "1x128"}, "weight": {"global_scale": "1x128"}}}
    with torch.no_grad():
        run = torch.compile(model, backend="fp4", options={"policy": policy, "strict": True, "free_weights": True})
        values, of_weight = (dequantize_ref(*quantize_ref(t, config))[:, :300] for t in (x, weight))
        for _ in range(2):
            assert relative(run(x), values @ of_weight.T + bias) < 1e-5
        assert fp4compile.restore(model) == 1
        assert torch.equal(model[0].weight, of_weight)


RANDOM_128, RANDOM_16 = {"hadamard": 128, "signs": "random"}, {"hadamard": 16, "signs": "random"}
WIDE = {"rounding": "stochastic", "scale_rule": "amax_17_16"}


def unbiased(rotation: dict, how: dict) -> dict:
    """All operands of the backward drawn, those of the forward from its codes."""
    of_forward = {**how, "source": "forward"}
    return {"dgrad": {**rotation, "gradient": how, "weight": of_forward}, "wgrad": {**rotation, "gradient": how, "activation": of_forward}}


METHODS = {"eden": unbiased(RANDOM_128, {"rounding": "eden"}), "stochastic": unbiased(RANDOM_16, WIDE)}


@pytest.fixture(scope="module")
def draws() -> dict[str, tuple[dict[str, Tensor], list[dict[str, Tensor]]]]:
    """Of each method the gradient of the forward's operands, and many draws of it. Compiled once for all tests."""
    found = {}
    for method in METHODS:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, x = mlp(), torch.randn(64, 40)
        reference = with_recipe(copy.deepcopy(model), Recipe(dequantized=True))
        want, run = gradients(reference, reference, x), compiled(model, METHODS[method])
        found[method] = want, [gradients(model, run, x) for _ in range(64)]
    return found


@pytest.mark.parametrize("method", METHODS)
def test_mean_over_draws_approaches_the_gradient_of_the_forwards_operands(method: str, draws) -> None:
    want, steps = draws[method]
    for name in ("x", "0.weight", "2.weight", "4.weight"):
        one = sum(relative(step[name], want[name]) for step in steps) / len(steps)
        mean = relative(torch.stack([step[name] for step in steps]).mean(0), want[name])
        # Stochastic rounding cuts its random numbers to 8 bits, which takes up to 1/256 of a step.
        assert one > 0.02 and mean < 1.3 * one / len(steps) ** 0.5 + (0.004 if method == "stochastic" else 0.0), name


def test_eden_is_less_noisy_than_stochastic_rounding(draws) -> None:
    for name in ("x", "0.weight", "2.weight", "4.weight"):
        noise = {method: sum(relative(step[name], want[name]) for step in steps) for method, (want, steps) in draws.items()}
        assert noise["eden"] < 0.8 * noise["stochastic"], name


def test_the_same_seed_draws_the_same_eden() -> None:
    model, x = mlp(), torch.randn(64, 40)
    run = compiled(model, METHODS["eden"])
    steps = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        steps.append([gradients(model, run, x) for _ in range(2)])
    for name in ("x", "0.weight", "2.weight", "4.weight"):
        assert torch.equal(steps[0][0][name], steps[1][0][name]) and torch.equal(steps[0][1][name], steps[1][1][name])
        assert not torch.equal(steps[0][0][name], steps[0][1][name]) and not torch.equal(steps[0][0][name], steps[2][0][name])
        assert steps[0][0][name].abs().sum() > 0
    assert fp4compile.last_report().to_table().count("eden") >= 2


def test_example_policies_are_the_recipes_of_the_pretraining_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER / "pretrain"))
    from recipes import RECIPES

    sys.modules.pop("recipes")
    for name in ("quartet2", "tetrajet2", "mxfp4_train"):
        file, recipe = (load_policy(source) for source in (FOLDER / "policies" / f"{name}.toml", RECIPES[name].full_policy(10)))
        assert settings_of(file) == settings_of(recipe), name
