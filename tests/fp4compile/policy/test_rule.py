"""Which rule decides, and what it starts from."""

from __future__ import annotations

import pytest
import torch
from torch import SymInt
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fp4compile.codegen.formats import QuantConfig
from fp4compile.passes.site import OperandKind, Role
from fp4compile.policy.load import load_policy
from tests.fp4compile.policy.sites import site

A, W, G = OperandKind.ACTIVATION, OperandKind.WEIGHT, OperandKind.GRADIENT
PLAIN = {A: QuantConfig(), W: QuantConfig()}
W4A4, HIGH = {"precision": "w4a4"}, {"precision": "high"}


def policy(*rules, default=W4A4, extends=None, **more):
    start = {"extends": extends} if extends else {"default": default}
    return load_policy({"version": 1, **start, "rule": [{"optional": True, **rule} for rule in rules], **more})


def decide(rules, *sites, training=False, **more):
    return policy(*rules, **more).decide(list(sites), training=training)


def test_the_last_matching_rule_decides_and_is_named():
    rules = [{"match": "**", **HIGH}, {"match": "up", "precision": "w4a16"}, {"match": "u*", "reason": "mine", **W4A4}]
    up, down = decide(rules, site("up"), site("down"))
    assert (up.configs, up.rule, up.reason) == (PLAIN, "inline policy, rule 3", "mine")
    assert (down.configs, down.rule, down.reason) == ({}, "inline policy, rule 1", 'rule on match = "**"')


def test_rules_are_whole_and_never_merged():
    rules = [{"match": "up", "weight": {"scale_rule": "four_over_six"}}, {"match": "up", "activation": {"global_scale": "row"}}]
    assert decide(rules, site("up"))[0].configs == {A: QuantConfig(global_scale="row"), W: QuantConfig()}


def test_a_rule_starts_from_the_default_tables():
    default = {"precision": "w4a4", "activation": {"global_scale": "row"}, "weight": {"scale_rule": "four_over_six"}}
    (decision,) = decide([{"match": "up", "weight": {"block": "16x16"}}], site("up"), default=default)
    assert decision.configs == {A: QuantConfig(global_scale="row"), W: QuantConfig(block="16x16", scale_rule="four_over_six")}


def test_bf16_is_another_word_for_high():
    assert decide([{"match": "up", "precision": "bf16"}], site("up"))[0].configs == {}


def test_w4a16_quantizes_the_weight_alone():
    assert decide([{"match": "up", "precision": "w4a16"}], site("up"))[0].configs == {W: QuantConfig()}


def test_format_and_hadamard_hold_for_every_operand():
    (decision,) = decide([{"match": "up", "format": "mxfp4", "hadamard": 32}], site("up"))
    assert decision.configs == {k: QuantConfig(format="mxfp4", hadamard=32) for k in (A, W)}


def test_a_rule_over_bf16_quantizes_what_it_names():
    up, head = decide([{"match": "up", **W4A4}], site("up"), site("lm_head"), extends="bf16")
    assert (up.configs, head.configs) == (PLAIN, {})


KEYS = [
    ({"match": ["a", "b"]}, {"module": "x.b"}, {"module": "c"}),
    ({"op": "bmm"}, {"op": "bmm"}, {"op": "mm"}),
    ({"op": "aten.bmm"}, {"op": "bmm"}, {"op": "mm"}),
    ({"op": ["mm", "_grouped_mm"]}, {"op": "_grouped_mm"}, {"op": "bmm"}),
    ({"class": "Linear"}, {"class_name": "Linear"}, {"class_name": "LoraLinear"}),
    ({"class": "*Linear"}, {"class_name": "LoraLinear"}, {"class_name": "LinearAttention"}),
    ({"trait": "tied"}, {"traits": frozenset({"tied", "router"})}, {"traits": frozenset({"router"})}),
    ({"trait": ["tied", "router"]}, {"traits": frozenset({"router"})}, {"traits": frozenset()}),
    ({"depth": "last:2"}, {"depth": 8, "layers": 10}, {"depth": 7, "layers": 10}),
    ({"depth": "first:2"}, {"depth": 1, "layers": 10}, {"depth": 2, "layers": 10}),
    ({"depth": "2..4"}, {"depth": 4, "layers": 10}, {"depth": 5, "layers": 10}),
    ({"depth": 0}, {"depth": 0, "layers": 10}, {"depth": 0, "layers": 0}),
    ({"depth": -1}, {"depth": 9, "layers": 10}, {"depth": 8, "layers": 10}),
    ({"min_k": 512}, {"k": 512}, {"k": 511}),
    ({"max_m": 16}, {"m": 16}, {"m": 17}),
    ({"min_n": 8, "max_n": 64}, {"n": 64}, {"n": 7}),
    ({"match": "a", "op": "mm", "min_k": 2}, {"module": "a"}, {"module": "a", "op": "bmm"}),
]


@pytest.mark.parametrize(("keys", "inside", "outside"), KEYS, ids=[str(keys) for keys, *_ in KEYS])
def test_every_key_matches_what_it_says(keys, inside, outside):
    sites = [site(**{"module": "m", **fields}) for fields in (inside, outside)]
    assert [not d.configs for d in decide([{**keys, **HIGH}], *sites)] == [True, False]


@pytest.mark.parametrize("role", ["fprop", "dgrad", "wgrad", "matmul"])
def test_role_matches_that_role_alone(role):
    sites = [site("m", r) for r in Role]
    rules = [{"match": "**", "role": ["fprop", "dgrad", "wgrad", "matmul"], **W4A4}, {"role": role, **HIGH}]
    assert [s.role for s, d in zip(sites, decide(rules, *sites, training=True), strict=True) if not d.configs] == [role]


def test_graph_tells_training_from_inference():
    rules = [{"match": "**", "graph": "training", **HIGH}]
    assert decide(rules, site("up"), training=True)[0].configs == {}
    assert decide(rules, site("up"), training=False)[0].configs == PLAIN


def test_a_rule_without_role_protects_every_matmul_but_quantizes_only_layers_with_a_weight():
    sites = [site("attn", role) for role in (Role.FPROP, Role.MATMUL)]
    quantizing = decide([{"match": "attn", **W4A4}], *sites, default=HIGH)
    assert [set(d.configs) for d in quantizing] == [{A, W}, set()]
    named = [{"match": "attn", "role": "matmul", **W4A4}]
    assert decide(named, *sites, default=HIGH)[1].configs == {A: QuantConfig()}
    protected = decide([*named, {"match": "attn", **HIGH}], *sites)
    assert [d.configs for d in protected] == [{}, {}]


TRAINING = {"wgrad": {"hadamard": 16, "gradient": {"rounding": "stochastic"}}}


def test_training_names_the_roles_of_the_backward_that_are_quantized():
    sites = [site("up", role) for role in (Role.FPROP, Role.DGRAD, Role.WGRAD)]
    fprop, dgrad, wgrad = policy(training=TRAINING).decide(sites, training=True)
    assert fprop.configs == PLAIN
    assert (dgrad.configs, dgrad.reason) == ({}, "backward in high precision (straight-through): [training] leaves out dgrad")
    assert wgrad.configs == {G: QuantConfig(rounding="stochastic", hadamard=16), A: QuantConfig(hadamard=16)}
    assert (wgrad.rule, wgrad.reason) == ("inline policy, [training] wgrad", "default of inline policy")


def test_a_rule_starts_from_its_role_in_training():
    rules = policy({"match": "up", "activation": {"scale_rule": "four_over_six"}}, training=TRAINING)
    sites = [site("up", role) for role in (Role.FPROP, Role.DGRAD, Role.WGRAD)]
    fprop, dgrad, wgrad = rules.decide(sites, training=True)
    assert fprop.configs == {A: QuantConfig(scale_rule="four_over_six"), W: QuantConfig()}
    assert dgrad.configs == {}
    assert wgrad.configs == {G: QuantConfig(rounding="stochastic", hadamard=16), A: QuantConfig(scale_rule="four_over_six", hadamard=16)}


def test_a_rule_turns_a_role_of_the_backward_on_only_by_name():
    sites = [site("up", Role.DGRAD)]
    about_the_layer = policy({"match": "up", **W4A4}).decide(sites, training=True)[0]
    assert (about_the_layer.configs, about_the_layer.rule) == ({}, "inline policy, rule 1")
    assert about_the_layer.reason.startswith("backward in high precision (straight-through)")
    by_name = policy({"match": "up", "role": "dgrad", **W4A4}).decide(sites, training=True)[0]
    assert by_name.configs == {G: QuantConfig(), W: QuantConfig()}


def test_high_precision_holds_for_the_backward_too():
    decisions = policy({"match": "up", "reason": "fragile", **HIGH}, extends="nvfp4_train").decide(
        [site("up", role, layers=20) for role in (Role.FPROP, Role.DGRAD, Role.WGRAD)], training=True
    )
    assert [(d.configs, d.reason) for d in decisions] == [({}, "fragile")] * 3


def test_a_users_rule_overrides_an_exception_of_the_preset():
    (decision,) = decide([{"match": "lm_head", **W4A4}], site("lm_head"), extends="nvfp4")
    assert decision.configs == {A: QuantConfig(), W: QuantConfig()}


def dynamic(low: int, high: int) -> SymInt:
    """A size that Dynamo found to vary between `low` and `high`."""
    env = ShapeEnv()
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    fake = FakeTensorMode(shape_env=env).from_tensor(torch.empty(40, 8), symbolic_context=context)
    size = fake.shape[0]
    torch._check(size >= low)
    torch._check(size <= high)
    return size


def test_a_bound_on_a_dynamic_dimension_holds_only_where_it_always_does_and_adds_no_guard():
    m = dynamic(32, 4096)
    env = m.node.shape_env
    before = len(env.guards)
    bounds = [({"min_m": 32}, True), ({"min_m": 33}, False), ({"max_m": 4096}, True), ({"max_m": 100}, False), ({"max_m": 16}, False)]
    for keys, holds in bounds:
        assert (not decide([{**keys, **HIGH}], site("up", m=m))[0].configs) is holds, keys
    assert len(env.guards) == before


def test_equal_policies_are_equal_and_hashable():
    one, other = policy({"match": "up", **HIGH}), policy({"match": "up", **HIGH})
    assert one == other and hash(one) == hash(other)
    assert one != policy({"match": "down", **HIGH})
    assert one.fingerprint() != policy({"match": "down", **HIGH}).fingerprint()
