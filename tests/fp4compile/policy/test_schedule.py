"""A policy with a schedule is another one from each of its steps on, and everything about it is checked when it is loaded."""

from __future__ import annotations

import tomllib

import pytest

from fp4compile.codegen.errors import IllegalCombination
from fp4compile.passes.site import OperandKind, Role
from fp4compile.policy.coverage import RuleMatchesNothing
from fp4compile.policy.load import load_policy
from fp4compile.policy.reading import WrongValue
from fp4compile.policy.rule import Policy
from tests.fp4compile.policy.sites import site

TRAINED = (Role.FPROP, Role.DGRAD, Role.WGRAD)


def scheduled(*switches: dict, **more) -> Policy:
    return load_policy({"version": 1, "extends": "nvfp4_train", "schedule": list(switches), **more})


def roles_in_four_bits(policy: Policy, module: str = "layers.0.up", **site_fields) -> set[str]:
    sites = [site(module, role, depth=0, layers=20, **site_fields) for role in TRAINED]
    return {str(s.role) for s, d in zip(sites, policy.decide(sites, training=True), strict=True) if d.configs}


def test_forward_alone_switches_and_the_backward_goes_on() -> None:
    policy = scheduled({"from_step": 90, "fprop": "bf16"})
    assert roles_in_four_bits(policy.at(89)) == {"fprop", "dgrad", "wgrad"}
    assert roles_in_four_bits(policy.at(90)) == {"dgrad", "wgrad"}
    decision = policy.at(90).decide([site("up", Role.FPROP)], training=True)[0]
    assert (decision.rule, decision.reason) == ("inline policy, schedule 1", "in high precision from step 90 on")
    # Evaluation follows the forward.
    assert not policy.at(90).decide([site("up", Role.FPROP)], training=False)[0].configs


def test_switches_add_up_and_the_order_of_the_file_does_not_matter() -> None:
    policy = scheduled({"from_step": 20, "backward": "high_precision"}, {"from_step": 10, "fprop": "bf16"})
    assert [policy.phase(step) for step in (0, 9, 10, 19, 20)] == [0, 0, 1, 1, 2]
    assert roles_in_four_bits(policy.at(10)) == {"dgrad", "wgrad"} and roles_in_four_bits(policy.at(20)) == set()


def test_layers_switch_by_the_keys_of_a_rule() -> None:
    policy = scheduled({"from_step": 5, "match": "layers.0.**", "precision": "high"})
    assert roles_in_four_bits(policy.at(5)) == set()
    assert roles_in_four_bits(policy.at(5), "layers.1.up") == set(TRAINED)


def test_a_role_given_as_a_table_is_laid_over_training() -> None:
    policy = scheduled({"from_step": 5, "wgrad": {"hadamard": 64}})
    late = policy.at(5).decide([site("up", Role.WGRAD, depth=0, layers=20)], training=True)[0].configs
    assert {config.hadamard for config in late.values()} == {64}
    assert late[OperandKind.GRADIENT].rounding == "stochastic"  # as before


def test_a_rule_that_a_switch_hides_is_no_mistake() -> None:
    rule = {"match": "layers.0.up", "role": "fprop", "weight": {"scale_rule": "four_over_six"}}
    policy = scheduled({"from_step": 5, "fprop": "bf16"}, rule=[rule])
    assert roles_in_four_bits(policy.at(5)) == {"dgrad", "wgrad"}


def test_a_switch_that_matches_nothing_is_told_at_the_first_compilation() -> None:
    policy = scheduled({"from_step": 90_000, "match": "layer.0.**", "precision": "high"})
    with pytest.raises(RuleMatchesNothing, match=r"inline policy, schedule 1.*matches none.*layers.0.up"):
        roles_in_four_bits(policy)


@pytest.mark.parametrize("extends", ["nvfp4_train", "auto"])
def test_the_resolved_text_reads_back(extends: str) -> None:
    switches = [
        {"from_step": 5, "match": ["a", "b"], "precision": "high", "reason": "late"},
        {"from_step": 7, "fprop": "bf16", "wgrad": {"hadamard": 32, "signs": "random"}, "role": "dgrad", "precision": "dequantized"},
    ]
    policy = scheduled(*switches, extends=extends)
    assert load_policy(tomllib.loads(policy.to_toml())) == policy and len(policy.schedule) == 2
    base = scheduled(extends=extends)
    assert policy.fingerprint() != base.fingerprint()


@pytest.mark.parametrize(
    ("switch", "error", "said"),
    [
        ({"from_step": 3}, WrongValue, "schedule 1: schedule = {'from_step': 3}; something that changes is needed"),
        ({"from_step": 3, "fprop": {"activation": {"rounding": "stochastic"}}}, IllegalCombination, "Training diverges with it"),
        ({"from_step": 3, "backward": "dequantized", "dgrad": "bf16"}, IllegalCombination, "It decides both roles"),
        ({"from_step": 3, "fprop": "dequantized"}, IllegalCombination, "A forward has no values that were quantized before it"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_when_loaded(switch: dict, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        scheduled(switch)
    assert said in str(caught.value)


@pytest.mark.parametrize(("name", "dequantized"), [("high_precision", False), ("dequantized", True)])
def test_backward_as_a_whole(name: str, dequantized: bool) -> None:
    policy = load_policy({"version": 1, "extends": "nvfp4_train", "training": {"backward": name}})
    assert roles_in_four_bits(policy) == {"fprop"}
    dgrad = policy.decide([site("up", Role.DGRAD)], training=True)[0]
    assert dgrad.dequantized is dequantized


def test_backward_quantized_turns_on_what_the_base_leaves_out() -> None:
    policy = load_policy({"version": 1, "extends": "nvfp4", "training": {"backward": "quantized", "wgrad": {"hadamard": 16}}})
    assert roles_in_four_bits(policy) == set(TRAINED)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_four_over_six_is_for_forward_operands(rounding: str) -> None:
    gradient = {"scale_rule": "four_over_six_mae", "rounding": rounding}
    with pytest.raises(IllegalCombination, match=r"on the gradient|biased"):
        load_policy({"version": 1, "extends": "nvfp4_train", "training": {"dgrad": {"gradient": gradient}}})
    both = {"activation": {"scale_rule": "four_over_six_mae"}, "weight": {"scale_rule": "four_over_six_mae"}}
    rotated = {"activation": {"scale_rule": "four_over_six_mae"}}
    policy = load_policy({"version": 1, "extends": "nvfp4_train", "default": both, "training": {"wgrad": rotated}})
    assert roles_in_four_bits(policy) == set(TRAINED)
