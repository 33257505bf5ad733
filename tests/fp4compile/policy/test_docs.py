"""The reference page is true: its examples load, and it names every key there is."""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from fp4compile.passes.site import Role
from fp4compile.policy import layer
from fp4compile.policy.load import load_policy
from fp4compile.policy.pattern import compile_pattern
from fp4compile.policy.presets import preset_names
from fp4compile.policy.rule import TRAITS
from fp4compile.policy.setting import KINDS, OperandTable, Precision
from tests.fp4compile.policy.sites import llama

PAGE = (Path(__file__).parents[3] / "docs" / "policy.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_there_are_examples():
    assert len(EXAMPLES) == 4


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_load_and_decide_a_llama(example):
    policy = load_policy(tomllib.loads(example))
    assert policy.schedule or any(not rule.optional for rule in policy.rules)
    policy.decide(llama(training=True), training=True)
    if "role" not in example:
        policy.decide(llama(), training=False)


@pytest.mark.parametrize(
    "name",
    [
        *layer.MATCH_KEYS,
        *KINDS,
        *Role,
        *Precision,
        *TRAITS,
        *preset_names(),
        *(f.name for f in fields(OperandTable)),
        "version extends description name unmatched calibration calibration_digest reason optional origin",
    ],
)
def test_every_key_and_name_is_on_the_page(name):
    for word in name.split():
        assert re.search(rf"[`\"\[ ]{word}[`\"\] ]", PAGE), word


def test_the_table_of_patterns_is_true():
    rows = re.findall(r"^\| `([^`]+)` \| (`[^|]+) \| (`[^|]+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 5
    for pattern, matching, others in rows:
        assert all(compile_pattern(pattern).fullmatch(path) for path in re.findall("`([^`]+)`", matching))
        assert not any(compile_pattern(pattern).fullmatch(path) for path in re.findall("`([^`]+)`", others))
