"""Whatever a policy holds, loading it gives a policy or an `Fp4CompileError`, and the policy decides."""

from __future__ import annotations

import tomllib

from hypothesis import given, settings
from hypothesis import strategies as st

from fp4compile.codegen.errors import Fp4CompileError
from fp4compile.passes.site import Decision
from fp4compile.policy.coverage import RuleHidden, RuleMatchesNothing
from fp4compile.policy.load import load_policy
from fp4compile.policy.rule import Policy
from tests.fp4compile.policy.sites import llama

SITES, TRAINING_SITES = llama(1), llama(1, training=True)
SCALARS = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=5)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=2)
)


def one_of(*names):
    return st.sampled_from(names)


def mostly(strategy):
    """A plausible value, or now and then anything at all."""
    return st.integers(0, 99).flatmap(lambda n: strategy if n else ANYTHING)


def tables(given=(), **keys):
    """Tables with the keys of `given`, and some of the others."""
    values = {key: mostly(value) for key, value in keys.items()}
    return st.fixed_dictionaries({key: values.pop(key) for key in given}, optional=values)


OPERAND = tables(
    format=one_of("nvfp4", "mxfp4"),
    block=one_of("1x16", "16x16", "1x32"),
    scale_rule=one_of("amax", "four_over_six"),
    global_scale=one_of("tensor", "row", "1x128", "static"),
    rounding=one_of("nearest", "stochastic"),
    hadamard=one_of(0, 16, 128),
    static_amax=st.floats(0.1, 10),
)
SETTING = {
    "precision": one_of("high", "bf16", "w4a4", "w4a16"),
    "format": one_of("nvfp4", "mxfp4"),
    "hadamard": one_of(0, 16),
    "activation": OPERAND,
    "weight": OPERAND,
    "gradient": OPERAND,
}
RULE = tables(
    given=("match", "precision"),
    match=one_of("q_proj", "layers.*.mlp.*", "**", "re:.*head", ["lm_head", "up_proj"], "nowhere"),
    role=one_of("fprop", "wgrad", "matmul", ["fprop", "dgrad"]),
    op=one_of("mm", "aten.bmm"),
    depth=one_of("last:2", "first:10%", "0..3", 2, -1),
    min_k=st.integers(0, 300),
    max_m=st.integers(0, 64),
    graph=one_of("training", "inference"),
    trait=one_of("tied", "attention"),
    reason=st.text(min_size=1, max_size=4),
    optional=st.booleans(),
    **SETTING,
)
SWITCH = tables(
    given=("from_step",),
    from_step=st.integers(0, 9),
    fprop=one_of("bf16", "w4a4") | tables(**SETTING),
    wgrad=tables(hadamard=one_of(0, 16), gradient=OPERAND),
    backward=one_of("high_precision", "dequantized", "quantized"),
    match=one_of("**", "up", "q_proj"),
    reason=st.text(min_size=1, max_size=4),
    **SETTING,
)
DOCUMENT = tables(
    given=("extends",),
    extends=one_of("nvfp4", "auto", "nvfp4_train", "bf16", "mxfp4"),
    description=st.text(min_size=1, max_size=4),
    name=st.text(min_size=1, max_size=4),
    unmatched=one_of("error", "warn"),
    default=tables(**SETTING),
    training=tables(fprop=tables(**SETTING), dgrad=one_of("high", "w4a4"), wgrad=tables(hadamard=one_of(0, 16), gradient=OPERAND)),
    rule=st.lists(RULE, max_size=3),
    schedule=st.lists(SWITCH, max_size=2),
).map(lambda document: {"version": 1, **document})


def load(document) -> Policy | None:
    try:
        return load_policy(document)
    except Fp4CompileError:
        return None


def check(policy: Policy) -> None:
    """It decides every site of both kinds of graph, and its text reads back to an equal policy."""
    for each in policy.choices.all if policy.choices else (policy,):
        for sites, training in ((SITES, False), (TRAINING_SITES, True)):
            try:
                decisions = each.decide(sites, training=training)
            except (RuleMatchesNothing, RuleHidden):
                continue
            assert len(decisions) == len(sites)
            assert all(isinstance(d, Decision) and d.rule and d.reason for d in decisions)
    assert load_policy(tomllib.loads(policy.to_toml())) == policy


@given(DOCUMENT)
@settings(max_examples=300)
def test_a_plausible_document_gives_a_policy_or_a_named_error(document):
    policy = load(document)
    if policy is not None:
        check(policy)


@given(
    st.dictionaries(
        one_of("version", "extends", "rule", "training", "default", "schedule", "match") | st.text(max_size=3), ANYTHING, max_size=4
    )
)
def test_a_wild_document_gives_a_policy_or_a_named_error(document):
    load(document)
    load({"version": 1, "extends": "nvfp4", **document})


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=40))
def test_any_text_gives_a_policy_or_a_named_error(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("fuzz") / "policy.toml"
    path.write_text(f"version = 1\nextends = 'nvfp4'\n{text}", encoding="utf-8")
    load(path)
