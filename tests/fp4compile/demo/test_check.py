"""The check itself must be able to fail: wrong numerics in a layer, or a perplexity that is off."""

from __future__ import annotations

import pytest
import torch

from fp4compile.demo.check import LAYER_TOLERANCE, Check, layer_differences
from fp4compile.demo.fake_quant import NVFP4_ACTIVATION, NVFP4_WEIGHT, fake_quantized
from tests.fp4compile.demo.tiny_llama import TOKENS, tiny_llama


def differences(policy) -> list[float]:
    model = tiny_llama().bfloat16()
    eager = fake_quantized(model, NVFP4_WEIGHT, NVFP4_ACTIVATION)
    return layer_differences(model, eager, torch.randint(len(TOKENS), (48,)), {"policy": policy}, lambda: None)


def test_layers_of_the_right_policy_agree():
    found = differences("nvfp4")
    assert len(found) == 2
    assert max(found) <= LAYER_TOLERANCE


@pytest.mark.parametrize(
    "change",
    [
        {"default": {"activation": {"scale_rule": "four_over_six"}}},
        {"default": {"precision": "w4a16"}},
        {"rule": [{"match": "v_proj", "precision": "high"}]},
    ],
    ids=["other scales", "activations kept", "one projection kept"],
)
def test_layers_of_another_policy_do_not(change):
    assert min(differences({"version": 1, "extends": "nvfp4", **change})) > LAYER_TOLERANCE


def check(**changed) -> Check:
    right = {
        "layers": (0.01, 0.05),
        "compiled_perplexity": 32.0,
        "eager_perplexity": 32.3,
        "loss_difference": -0.01,
        "standard_error": 0.01,
    }
    return Check(**right | changed)


def test_verdict():
    assert check().agrees
    assert check(loss_difference=0.029).agrees
    assert not check(loss_difference=-0.031).agrees
    assert check(loss_difference=0.009, standard_error=0.0).agrees
    one_of_ten = (0.01,) * 9 + (0.3,)
    assert check(layers=one_of_ten).agrees
    assert not check(layers=one_of_ten[1:]).agrees
    assert "1.0% of FP4's own error in the median, 30.0% at most\n  (1 above 10%" in str(check(layers=one_of_ten))
    assert "THEY DISAGREE" in str(check(layers=one_of_ten[1:]))
