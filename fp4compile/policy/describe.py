"""A policy for readers: what each kind of matmul gets without a rule, and the rules in order, as data and as a table."""

from __future__ import annotations

from typing import Any

from tabulate import tabulate

from fp4compile.passes.site import OperandKind, Role
from fp4compile.policy.render import match_items, match_text, setting_items, setting_text
from fp4compile.policy.rule import Policy, Rule
from fp4compile.policy.setting import OPERANDS, OperandTable, configs_of

_SITUATIONS = {
    "inference": (Role.FPROP, False),
    "training fprop": (Role.FPROP, True),
    "training dgrad": (Role.DGRAD, True),
    "training wgrad": (Role.WGRAD, True),
}


def variants_of(policy: Policy) -> tuple[Policy, ...]:
    """The policy itself, or each that the device may choose."""
    return policy.choices.all if policy.choices else (policy,)


def settings_of(policy: Policy) -> dict[str, str]:
    """What a matmul gets where no rule matches, for each kind of matmul."""
    found: dict[str, str] = {}
    for name, (role, training) in _SITUATIONS.items():
        setting = policy.setting_for(None, role, training=training)
        configs = configs_of(setting, role, policy.name, policy.calibrated_by)
        described = {kind: config.describe() for kind, config in configs.items()}
        arc = None if training else setting.activation.arc
        if arc is not None and arc.rule is not None and OperandKind.ACTIVATION in described:
            described[OperandKind.ACTIVATION] += "+arc"
        operands = (f"{kind} {described.get(kind, 'high')}" for kind in OPERANDS[role])
        found[name] = ", ".join(operands) if configs else "high"
    return found


def details_of(policy: Policy) -> dict[str, Any]:
    """Plain data for JSON."""
    return {
        "name": policy.name,
        "description": policy.description,
        "fingerprint": policy.fingerprint(),
        "unmatched": policy.unmatched,
        "settings": settings_of(policy),
        "rules": [_rule_details(rule) for rule in policy.rules],
    }


def _rule_details(rule: Rule) -> dict[str, Any]:
    sets = {key: value.plain() if isinstance(value, OperandTable) else value for key, value in setting_items(rule.setting)}
    return {"from": rule.label, "matches": dict(match_items(rule.match)), "sets": sets, "reason": rule.reason, "optional": rule.optional}


def settings_table(policies: tuple[Policy, ...]) -> str:
    rows = [(policy.name, *settings_of(policy).values()) for policy in policies]
    return tabulate(rows, headers=("without a rule", *_SITUATIONS))


def rules_table(policy: Policy) -> str:
    rows = [(i, rule.label, match_text(rule.match), setting_text(rule.setting), rule.reason) for i, rule in enumerate(policy.rules, 1)]
    if not rows:
        return "no rules"
    table = tabulate(rows, headers=("#", "from", "matches", "sets", "reason"), maxcolwidths=[None, None, 60, 40, 40])
    return f"{table}\nOf the rules that match a matmul the last one decides alone."
