"""One policy file as values, before it is laid over what it extends. Every key is checked here, whether anything uses it or not."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Final

from fp4compile.calibration.source import CalibrationSource
from fp4compile.codegen.errors import IllegalCombination
from fp4compile.codegen.formats import FORMATS, FP32_MAX, HADAMARD_SIZES, Block, GlobalScale, Rounding, ScaleRule, Signs, Source
from fp4compile.passes.site import OperandKind, Role
from fp4compile.policy.arc import arc_at
from fp4compile.policy.pattern import compile_pattern, depth_range
from fp4compile.policy.reading import (
    Table,
    WrongValue,
    flag_at,
    name_at,
    names_at,
    refuse_unknown_keys,
    table_at,
    tables_at,
    text_at,
    texts_at,
    whole_number_at,
)
from fp4compile.policy.rule import OPS, TRAITS, Match, Rule, Switch, Training
from fp4compile.policy.setting import BACKWARD, KINDS, OPERANDS, OperandTable, Precision, Setting

VERSION: Final = 1
_TOP_KEYS = (
    "version", "name", "description", "extends", "unmatched", "calibration", "calibration_digest",
    "default", "rule", "training", "schedule",
)  # fmt: skip
_PRESET_KEYS = (*_TOP_KEYS, "auto")
_SETTING_KEYS = ("precision", "format", "hadamard", "signs")
_BOUNDS = ("min_m", "max_m", "min_n", "max_n", "min_k", "max_k")
MATCH_KEYS: Final = ("match", "role", "op", "class", "trait", "graph", "depth", *_BOUNDS)
_TRAINED: Final = (Role.FPROP, *BACKWARD)
_RULE_KEYS: Final = (*MATCH_KEYS, *_SETTING_KEYS, *KINDS, "reason", "optional", "origin")
_BACKWARD: Final = {"high_precision": Precision.HIGH, "dequantized": Precision.DEQUANTIZED, "quantized": Precision.W4A4}
_PRECISIONS = {**{str(p): p for p in Precision}, "bf16": Precision.HIGH}
_ORIGIN = re.compile(r"(?P<file>.+), (rule|schedule) (?P<number>\d{1,9})", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class AutoChoice:
    """Names of the presets that `auto` chooses from."""

    native: str
    other: str
    training: str


@dataclass(frozen=True, kw_only=True)
class Layer:
    label: str  # "preset nvfp4", "policy.toml"
    name: str
    description: str
    extends: str
    unmatched: str
    default: Setting
    training: Training
    rules: tuple[Rule, ...]
    schedule: tuple[Switch, ...] = ()
    auto: AutoChoice | None = None
    calibration: CalibrationSource | None = None

    def over(self, base: Layer) -> Layer:
        """Tables field by field, rules behind the base's."""
        return replace(
            self,
            unmatched=self.unmatched or base.unmatched,
            default=self.default.over(base.default),
            training=self.training.over(base.training),
            rules=(*base.rules, *self.rules),
            schedule=(*base.schedule, *self.schedule),
            calibration=self.calibration or base.calibration,
        )


def parse_layer(table: Table, *, label: str, preset: bool = False) -> Layer:
    """Read one parsed file. Raises `UnknownName`, `WrongValue` or `IllegalCombination`, which name the place."""
    refuse_unknown_keys(table, _PRESET_KEYS if preset else _TOP_KEYS, label)
    version = table.get("version")
    if version != VERSION or isinstance(version, bool):
        raise WrongValue(where=label, key="version", found=version, needed=f"this release reads version = {VERSION}")
    return Layer(
        label=label,
        name=text_at(table, "name", label),
        description=text_at(table, "description", label),
        extends=text_at(table, "extends", label),
        unmatched=name_at(table, "unmatched", ("error", "warn"), label) or "",
        default=_default(table_at(table, "default", label), label),
        training=_training(table_at(table, "training", label), label),
        rules=tuple(_rule(rule, label, number, preset) for number, rule in enumerate(tables_at(table, "rule", label), 1)),
        schedule=tuple(_switch(switch, label, number) for number, switch in enumerate(tables_at(table, "schedule", label), 1)),
        auto=AutoChoice(**table["auto"]) if "auto" in table else None,
        calibration=_calibration(table, label),
    )


def _calibration(table: Table, label: str) -> CalibrationSource | None:
    file, digest = text_at(table, "calibration", label), text_at(table, "calibration_digest", label)
    if digest and not file:
        raise WrongValue(where=label, key="calibration_digest", found=digest, needed='it belongs to a file: calibration = "file.pt"')
    return CalibrationSource(label=file, digest=digest, path=Path(file)) if file else None


def _default(table: Table | None, label: str) -> Setting:
    if table is None:
        return Setting()
    where = f"{label}, [default]"
    refuse_unknown_keys(table, ("origin", *_SETTING_KEYS, *KINDS), where)
    return _setting(table, where, text_at(table, "origin", where) or label, KINDS).spelled_out(KINDS)


def _training(table: Table | None, label: str) -> Training:
    if table is None:
        return Training()
    where = f"{label}, [training]"
    refuse_unknown_keys(table, (*_TRAINED, "backward"), where)
    return _roles(table, where, label)


def _roles(table: Table, place: str, label: str) -> Training:
    given = {str(role): _role(table, role, place, label) for role in _TRAINED if role in table}
    backward = name_at(table, "backward", _BACKWARD, place)
    if backward is None:
        return Training(**given)
    named = [role for role in BACKWARD if role in table]
    if named and backward != "quantized":
        raise IllegalCombination(
            where=place,
            found=f'backward = "{backward}" beside {" and ".join(named)}',
            needed="It decides both roles.",
            advice="Give one of the two: the backward as a whole, or its roles.",
        )
    whole = Setting(precision=_BACKWARD[backward], origin=label)
    return Training(**{**{str(role): whole for role in BACKWARD}, **given})


def _role(table: Table, role: Role, place: str, label: str) -> Setting:
    where = f"{place} {role}"
    if isinstance(table[role], str):
        return Setting(precision=_precision({"precision": table[role]}, where), origin=label)
    given = table_at(table, role, place)
    assert given is not None
    refuse_unknown_keys(given, ("origin", *_SETTING_KEYS, *OPERANDS[role]), where)
    setting = _setting(given, where, text_at(given, "origin", where) or label, OPERANDS[role])
    if setting.is_empty:
        raise WrongValue(where=where, key=role, found=given, needed='a setting is needed, as in precision = "w4a4"')
    return setting.spelled_out(OPERANDS[role])


def _switch(table: Table, label: str, number: int) -> Switch:
    """Roles as in [training], exceptions as in [[rule]], or both."""
    where = f"{label}, schedule {number}"
    refuse_unknown_keys(table, ("from_step", *_TRAINED, "backward", *_RULE_KEYS), where)
    origin, place = _rule_origin(table, where, label, number)
    step = whole_number_at(table, "from_step", where)
    if step is None:
        raise WrongValue(where=where, key="from_step", found=None, needed="its first step is needed, as in from_step = 90_000")
    training = _roles(table, where, origin)
    own = {key: value for key, value in table.items() if key in _RULE_KEYS and key != "origin"}
    rule = None
    if own:
        rule = replace(_rule(own, label, number, preset=False, where=where), number=place, table="schedule")
        rule = replace(rule, setting=replace(rule.setting, origin=origin), reason=rule.reason or f"from step {step} on")
    elif training == Training():
        raise WrongValue(where=where, key="schedule", found=dict(table), needed='something that changes is needed, as fprop = "bf16"')
    return Switch(from_step=step, origin=origin, number=place, training=training, rule=rule)


def _rule(table: Table, label: str, number: int, preset: bool, where: str = "") -> Rule:
    where = where or f"{label}, rule {number}"
    refuse_unknown_keys(table, _RULE_KEYS, where)
    if not any(key in table for key in MATCH_KEYS):
        raise WrongValue(where=where, key="rule", found=dict(table), needed='a key that matches is needed, as match = "**"')
    origin, number = _rule_origin(table, where, label, number)
    setting = _setting(table, where, origin, KINDS)
    if setting.is_empty:
        needed = 'a key that sets something is needed: precision = "w4a4" for the defaults, or "high" to leave the matmul alone'
        raise WrongValue(where=where, key="rule", found=dict(table), needed=needed)
    match = _match(table, where)
    return Rule(
        match=match,
        setting=setting,
        number=number,
        reason=text_at(table, "reason", where),
        optional=preset or flag_at(table, "optional", where),
    )


def _rule_origin(table: Table, where: str, label: str, number: int) -> tuple[str, int]:
    origin = text_at(table, "origin", where)
    if not origin:
        return label, number
    found = _ORIGIN.fullmatch(origin)
    if found is None:
        raise WrongValue(where=where, key="origin", found=origin, needed='one such as "preset nvfp4, rule 2" is needed')
    return found["file"], int(found["number"])


def _match(table: Table, where: str) -> Match:
    match = Match(
        match=texts_at(table, "match", where),
        role=tuple(Role(name) for name in names_at(table, "role", Role, where)),
        op=names_at(_without_namespace(table), "op", OPS, where),
        class_name=texts_at(table, "class", where),
        trait=names_at(table, "trait", TRAITS, where),
        graph=name_at(table, "graph", ("training", "inference"), where) or "",
        depth=_depth(table, where),
        **{bound: whole_number_at(table, bound, where) for bound in _BOUNDS},
    )
    for key, patterns in (("match", match.match), ("class", match.class_name)):
        for pattern in patterns:
            _refuse_bad_syntax(compile_pattern, pattern, where, key)
    for least, most in zip(_BOUNDS[::2], _BOUNDS[1::2], strict=True):
        low, high = getattr(match, least), getattr(match, most)
        if low is not None and high is not None and low > high:
            raise WrongValue(where=where, key=least, found=low, needed=f"it must not be above {most} = {high}")
    if match.graph == "inference" and any(role in BACKWARD for role in match.role):
        raise IllegalCombination(
            where=where,
            found='graph = "inference" with a backward role',
            needed="An inference graph has no backward.",
            advice="Drop one of the two.",
        )
    return match


def _without_namespace(table: Table) -> Table:
    """`aten.bmm` is `bmm`."""
    ops = table.get("op")
    if isinstance(ops, str):
        return {**table, "op": ops.removeprefix("aten.")}
    if isinstance(ops, list):
        return {**table, "op": [op.removeprefix("aten.") if isinstance(op, str) else op for op in ops]}
    return table


def _depth(table: Table, where: str) -> str:
    if "depth" not in table:
        return ""
    found = table["depth"]
    is_number = isinstance(found, int) and not isinstance(found, bool) and abs(found) < 2**31
    spec = str(found) if is_number else found
    if not isinstance(spec, str) or len(spec) > 40:
        raise WrongValue(where=where, key="depth", found=found, needed='"last:4", "last:15%", "first:2", "3..7" or a number is needed')
    _refuse_bad_syntax(lambda s: depth_range(s, 1), spec, where, "depth")
    return spec


def _refuse_bad_syntax(parse: Callable[[str], object], text: str, where: str, key: str) -> None:
    try:
        parse(text)
    except ValueError as error:
        raise WrongValue(where=where, key=key, found=text, needed=str(error)) from None


def _precision(table: Table, where: str) -> Precision | None:
    found = name_at(table, "precision", _PRECISIONS, where)
    return None if found is None else _PRECISIONS[found]


def _setting(table: Table, where: str, origin: str, kinds: tuple[OperandKind, ...]) -> Setting:
    return Setting(
        precision=_precision(table, where),
        format=name_at(table, "format", FORMATS, where),
        hadamard=_hadamard(table, where),
        signs=name_at(table, "signs", Signs, where),
        origin=origin,
        **{str(kind): _operand(table_at(table, kind, where), kind, f"{where}, {kind}") for kind in kinds},
    )


def _operand(table: Table | None, kind: OperandKind, where: str) -> OperandTable:
    if table is None:
        return OperandTable()
    refuse_unknown_keys(table, (f.name for f in fields(OperandTable)), where)
    if not table:
        raise WrongValue(where=where, key="table", found={}, needed='a field is needed, as in { scale_rule = "four_over_six" }')
    if "arc" in table and kind is not OperandKind.ACTIVATION:
        raise WrongValue(where=where, key="arc", found=table["arc"], needed="it belongs to the activation; the weight's columns follow it")
    return OperandTable(
        format=name_at(table, "format", FORMATS, where),
        block=name_at(table, "block", Block, where),
        scale_rule=name_at(table, "scale_rule", ScaleRule, where),
        global_scale=name_at(table, "global_scale", GlobalScale, where),
        rounding=name_at(table, "rounding", Rounding, where),
        hadamard=_hadamard(table, where),
        static_amax=_static_amax(table, where),
        signs=name_at(table, "signs", Signs, where),
        source=name_at(table, "source", Source, where),
        arc=arc_at(table, where),
    )


def _hadamard(table: Table, where: str) -> int | None:
    found = table.get("hadamard", 0)
    if not isinstance(found, int) or isinstance(found, bool) or found not in HADAMARD_SIZES:
        raise WrongValue(where=where, key="hadamard", found=found, needed=f"one of {', '.join(map(str, HADAMARD_SIZES))} is needed")
    return found if "hadamard" in table else None


def _static_amax(table: Table, where: str) -> float | None:
    if "static_amax" not in table:
        return None
    found = table["static_amax"]
    if not isinstance(found, int | float) or isinstance(found, bool) or not 0 < found < FP32_MAX:
        raise WrongValue(where=where, key="static_amax", found=found, needed="a positive finite number is needed")
    return float(found)
