"""The `arc` table of a policy: what it spells, and what is refused with its reason."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from fp4compile.calibration.outliers import OutlierRule, Statistic
from fp4compile.codegen.errors import Fp4CompileError, IllegalCombination, UnknownName
from fp4compile.passes.site import Role
from fp4compile.policy.describe import details_of
from fp4compile.policy.load import load_policy
from fp4compile.policy.reading import WrongValue
from fp4compile.policy.rule import Policy
from tests.fp4compile.policy.sites import llama

ARC = {"channels": 64}


def load(extends: str = "nvfp4", calibration: str = "c.pt", **given: Any) -> Policy:
    named = {"calibration": calibration} if calibration else {}
    return load_policy({"version": 1, "extends": extends, **named, **given}, calibrated=False)


def test_a_policy_reads_back_and_an_exception_has_none() -> None:
    arc = {"statistic": "rms", "token_threshold": 0.25, "multiple": 128, "reorder": False, "most": 0.1}
    rule = {"match": "down_proj", "activation": {"arc": False}}
    policy = load(default={"activation": {"arc": arc}}, rule=[rule])
    again = load_policy(tomllib.loads(policy.to_toml()), calibrated=False)
    assert again.default == policy.default and again.rules == policy.rules
    table = policy.setting_for(None, Role.FPROP, training=False).activation.arc
    assert table is not None
    assert table.rule == OutlierRule(statistic=Statistic.RMS, token_threshold=0.25, multiple=128, reorder=False, most=0.1)
    exception = policy.setting_for(policy.rules[-1], Role.FPROP, training=False).activation.arc
    assert exception is not None and exception.rule is None
    assert details_of(policy)["settings"]["inference"] == "activation nvfp4+arc, weight nvfp4"
    assert all(decision.outliers is None for decision in policy.decide(llama(), training=False))  # no artefact was read


@pytest.mark.parametrize(
    ("arc", "error", "said"),
    [
        ({}, WrongValue, "one of threshold, element_threshold, token_threshold, channels, fraction is needed"),
        ({"channels": 64, "fraction": 0.1}, WrongValue, "one of threshold"),
        (True, WrongValue, "a table is needed"),
        ({"tau": 0.1}, UnknownName, "unknown key 'tau'"),
        ({"channels": -1}, WrongValue, "a whole number"),
        ({"threshold": 1.5}, WrongValue, "a share is needed"),
        ({"channels": 64, "most": 0}, WrongValue, "a share is needed"),
        ({"channels": 64, "multiple": 48}, WrongValue, "one of 16, 32, 64, 128"),
        ({"channels": 64, "statistic": "mean"}, UnknownName, "Valid: amax, rms"),
        ({"channels": 64, "reorder": 1}, WrongValue, "true or false"),
    ],
    ids=str,
)
def test_a_wrong_table_is_named(arc: object, error: type[Fp4CompileError], said: str) -> None:
    with pytest.raises(error) as caught:
        load(default={"activation": {"arc": arc}})
    assert said in str(caught.value) and "inline policy, [default], activation, arc" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"calibration": "", "default": {"activation": {"arc": ARC}}}, "arc without a calibration. Which channels are outliers"),
        ({"default": {"hadamard": 16, "activation": {"arc": ARC}}}, "arc with hadamard = 16. A rotation spreads outliers"),
        ({"default": {"activation": {"block": "16x16", "arc": ARC}}}, "arc with block = 16x16. Residual blocks lie between"),
        ({"default": {"activation": {"arc": ARC}, "weight": {"global_scale": "1x128"}}}, "arc with global_scale = 1x128. Residuals"),
        ({"extends": "mxfp4", "default": {"activation": {"arc": {**ARC, "multiple": 16}}}}, "arc with multiple = 16 and format = mxfp4"),
        ({"training": {"fprop": {"activation": {"arc": ARC}}}}, "[training] fprop: arc in a graph with a backward"),
        ({"rule": [{"match": "**", "graph": "training", "activation": {"arc": ARC}}]}, "rule 1: arc in a graph with a backward"),
        (
            {"default": {"activation": {"arc": ARC}}, "rule": [{"op": "bmm", "role": "matmul", "precision": "w4a4"}]},
            "rule 1 (matmul): arc in matmul. A residual of the activation needs a weight",
        ),
        (
            {"rule": [{"match": "**", "precision": "w4a16", "activation": {"arc": ARC}}]},
            "no matmul that the rule covers has a 4-bit activation",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_makes_no_sense_is_refused_with_the_reason(given: dict[str, Any], said: str) -> None:
    with pytest.raises(IllegalCombination) as caught:
        load(**given)
    assert said in str(caught.value)


def test_it_belongs_to_the_activation() -> None:
    with pytest.raises(WrongValue, match="it belongs to the activation"):
        load(default={"weight": {"arc": ARC}})
