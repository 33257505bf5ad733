"""Rules that match nothing and rules that others hide are errors, which say what would have been right."""

from __future__ import annotations

import warnings

import pytest

from fp4compile.passes.site import Role
from fp4compile.policy.coverage import RuleHidden, RuleMatchesNothing, RuleWarning
from fp4compile.policy.load import load_policy
from tests.fp4compile.policy.sites import llama, site

HIGH = {"precision": "high"}


def decide(*rules, sites=None, training=False, **more):
    return load_policy({"version": 1, "extends": "nvfp4", "rule": list(rules), **more}).decide(sites or llama(), training=training)


def refusal(kind, *rules, **more) -> str:
    with pytest.raises(kind) as refused:
        decide(*rules, **more)
    return str(refused.value)


def test_a_rule_that_matches_nothing_is_an_error_that_names_the_nearest_modules():
    said = refusal(RuleMatchesNothing, {"match": "lm_head", **HIGH}, {"match": "model.layers.*.mlp.down_porj", **HIGH})
    assert said == (
        'inline policy, rule 2: match = "model.layers.*.mlp.down_porj" matches none of the 19 matmuls of this graph. '
        "Nearest modules: model.layers.0.mlp.down_proj, model.layers.0.mlp.up_proj, model.layers.0.mlp.gate_proj. "
        "Correct or delete the rule. Where the graph is only part of the model, or the policy serves several models, "
        'give the rule optional = true, or set unmatched = "warn" in the file.'
    )


@pytest.mark.parametrize(
    ("match", "said"),
    [
        ("lm_haed", "Nearest modules: lm_head."),
        ("q_prj", "Nearest modules: model.layers.0.self_attn.q_proj"),
        ("model.layers.1.mlp.downproj", "Nearest modules: model.layers.1.mlp.down_proj"),
        (r"re:model\.layers\..*\.mlp\.downproj", "Nearest modules: model.layers.0.mlp.down_proj"),
        ("layers.0.mlp", "'layers.0.mlp' is a module that holds some, as 'model.layers.0.mlp.down_proj': write \"layers.0.mlp.**\"."),
        ("transformer.h.*.attn.c_attn", "The graph has module 'lm_head', 'model.layers.1.self_attn.v_proj'. Correct or delete the rule."),
    ],
)
def test_the_nearest_modules_are_those_that_read_most_like_the_pattern(match, said):
    assert said in refusal(RuleMatchesNothing, {"match": match, **HIGH})


def test_a_module_that_matches_but_not_in_this_role():
    said = refusal(RuleMatchesNothing, {"match": "down_proj", "role": "matmul", **HIGH})
    assert "Its modules have matmuls, but in no role that it covers (found: fprop; covered: matmul)." in said


def test_a_module_that_matches_but_not_the_other_keys():
    said = refusal(RuleMatchesNothing, {"match": "down_proj", "op": "_grouped_mm", **HIGH})
    assert 'match = "down_proj", op = "_grouped_mm" matches none' in said
    assert "2 match the module pattern, as 'model.layers.0.mlp.down_proj' does, but none all the other keys." in said


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"op": "_grouped_mm"}, "The graph has op 'bmm', 'mm'. Correct"),
        ({"class": "Conv1D"}, "The graph has class 'Linear'. Correct"),
        ({"trait": "router"}, "The graph has trait 'attention'. Correct"),
        ({"role": "wgrad"}, "The graph has role 'fprop', 'matmul'. Correct"),
        ({"depth": "20..30"}, "It has 15 layers with a weight. Correct"),
    ],
)
def test_a_rule_without_pattern_is_told_what_the_graph_has(keys, said):
    forward_only = llama()
    assert said in refusal(RuleMatchesNothing, {**keys, **HIGH}, sites=forward_only, training=True)


def test_a_rule_that_later_rules_hide_is_an_error_that_names_them():
    rules = [{"match": "mlp.*", **HIGH}, {"match": "*_proj", "precision": "w4a16"}, {"match": "q_proj", **HIGH}]
    assert refusal(RuleHidden, *rules) == (
        'inline policy, rule 1: later rules decide every matmul that match = "mlp.*" matches (6): '
        'inline policy, rule 2 (match = "*_proj"). '
        "The last match wins: move the rule behind them, narrow them, or delete it."
    )


def test_a_rule_hidden_in_part_is_fine():
    decide({"match": "mlp.*", **HIGH}, {"match": "down_proj", "precision": "w4a16"})


def test_hiding_a_rule_of_an_extended_file_is_what_extends_is_for(tmp_path):
    (tmp_path / "base.toml").write_text('version = 1\nextends = "nvfp4"\n[[rule]]\nmatch = "q_proj"\nprecision = "high"\n')
    (tmp_path / "mine.toml").write_text('version = 1\nextends = "base.toml"\n[[rule]]\nmatch = "q_proj"\nprecision = "w4a16"\n')
    load_policy(tmp_path / "mine.toml").decide(llama(), training=False)


def test_rules_of_presets_may_match_nothing():
    for preset in ("nvfp4", "nvfp4_train", "mxfp4_a16"):
        load_policy(preset).decide([site("a"), site("b")], training=False)


def test_an_optional_rule_may_match_nothing_or_be_hidden():
    decide({"match": "nowhere", "optional": True, **HIGH})
    decide({"match": "q_proj", "optional": True, **HIGH}, {"match": "q_proj", "precision": "w4a16"})


@pytest.mark.parametrize(
    "rules", [[{"match": "nowhere", **HIGH}], [{"match": "q_proj", **HIGH}, {"match": "q_proj", "precision": "w4a16"}]]
)
def test_unmatched_warn_makes_it_a_warning(rules):
    with pytest.warns(RuleWarning, match=r"inline policy, rule 1: .*(matches none|later rules decide)"):
        assert len(decide(*rules, unmatched="warn")) == len(llama())


def test_unmatched_is_inherited(tmp_path):
    (tmp_path / "base.toml").write_text('version = 1\nextends = "nvfp4"\nunmatched = "warn"\n')
    (tmp_path / "mine.toml").write_text('version = 1\nextends = "base.toml"\n[[rule]]\nmatch = "nowhere"\nprecision = "high"\n')
    with pytest.warns(RuleWarning, match=r"mine\.toml, rule 1: .* matches none"):
        load_policy(tmp_path / "mine.toml").decide(llama(), training=False)


def test_rules_about_the_backward_are_not_asked_of_an_inference_graph():
    rule = {"match": "q_proj", "role": ["dgrad", "wgrad"], **HIGH}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decide(rule)
        decide({"match": "q_proj", "graph": "training", **HIGH})
    decide(rule, sites=llama(training=True), training=True)
    forward_only = [s for s in llama(training=True) if s.role is Role.FPROP]
    assert "matches none" in refusal(RuleMatchesNothing, rule, sites=forward_only, training=True)


def test_a_graph_without_matmuls_asks_nothing_of_the_rules():
    policy = load_policy({"version": 1, "extends": "nvfp4", "rule": [{"match": "lm_head", **HIGH}]})
    assert policy.decide([], training=False) == []
