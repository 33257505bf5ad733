"""Policies as TOML text. It reads back to an equal policy, so a dump can be replayed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from fp4compile.policy.setting import KINDS, OperandTable, Setting

if TYPE_CHECKING:
    from fp4compile.policy.rule import Match, Policy, Rule, Switch

_HEADER = "# Resolved by fp4compile; it loads as a policy file. `origin` says where each part came from."
_TRAINING_ROLES = ("fprop", "dgrad", "wgrad")
_MATCH_KEYS = ("match", "role", "op", "class", "trait", "graph", "depth", "min_m", "max_m", "min_n", "max_n", "min_k", "max_k")


def policy_text(policy: Policy) -> str:
    top: list[tuple[str, object]] = [("version", 1), ("name", policy.name)]
    top += [("description", policy.description)] if policy.description else []
    top += [("extends", "auto")] if policy.choices is not None else []
    if policy.calibration is not None:
        top += [("calibration", policy.calibration.label)]
        top += [("calibration_digest", policy.calibration.digest)] if policy.calibration.digest else []
    lines = [_HEADER, *_assignments([*top, ("unmatched", policy.unmatched)])]
    parts: list[tuple[str, Setting | None]] = [("default", policy.default)]
    parts += [(f"training.{role}", getattr(policy.training, role)) for role in _TRAINING_ROLES]
    for name, setting in parts:
        if setting is not None and setting != Setting():
            lines += ["", f"[{name}]", *_assignments([("origin", setting.origin), *setting_items(setting)])]
    for rule in policy.rules:
        lines += ["", "[[rule]]", *_assignments(_rule_items(rule))]
    for switch in policy.schedule:
        lines += ["", "[[schedule]]", *_assignments([("origin", switch.label), ("from_step", switch.from_step)])]
        lines += _assignments(_switch_items(switch))
        for role in _TRAINING_ROLES:
            own = getattr(switch.training, role)
            if own is not None:
                lines += ["", f"[schedule.{role}]", *_assignments([("origin", own.origin), *setting_items(own)])]
    return "\n".join(lines) + "\n"


def _rule_items(rule: Rule) -> Iterable[tuple[str, object]]:
    yield "origin", rule.label
    if rule.optional:
        yield "optional", True
    yield from match_items(rule.match)
    yield from setting_items(rule.setting)
    if rule.reason:
        yield "reason", rule.reason


def _switch_items(switch: Switch) -> Iterable[tuple[str, object]]:
    if switch.rule is not None:
        yield from ((key, value) for key, value in _rule_items(switch.rule) if key != "origin")


def match_items(match: Match) -> Iterable[tuple[str, object]]:
    """The keys that are given, one value without its list."""
    for key in _MATCH_KEYS:
        value = getattr(match, "class_name" if key == "class" else key)
        if value not in ((), "", None):
            yield key, value[0] if isinstance(value, tuple) and len(value) == 1 else value


def setting_items(setting: Setting) -> Iterable[tuple[str, object]]:
    for key in ("precision", "format", "hadamard", "signs"):
        if getattr(setting, key) is not None:
            yield key, getattr(setting, key)
    for kind in KINDS:
        if getattr(setting, kind.value) != OperandTable():
            yield kind.value, getattr(setting, kind.value)


def match_text(match: Match) -> str:
    return ", ".join(f"{key} = {inline(value)}" for key, value in match_items(match))


def setting_text(setting: Setting) -> str:
    return ", ".join(f"{key} = {inline(value)}" for key, value in setting_items(setting))


def _assignments(items: Iterable[tuple[str, object]]) -> list[str]:
    return [f"{key} = {inline(value)}" for key, value in items]


def inline(value: object) -> str:
    """`value` as TOML: text, numbers, lists, and operand tables as inline tables."""
    if isinstance(value, OperandTable):
        return inline(value.plain())
    if isinstance(value, dict):
        return "{ " + ", ".join(_assignments(value.items())) + " }"
    if isinstance(value, tuple):
        return "[" + ", ".join(inline(v) for v in value) + "]"
    if isinstance(value, str):
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)
