"""From a preset's name, a TOML file or a parsed mapping to a `Policy`: follow `extends`, lay file over file, refuse what is illegal."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

from fp4compile.codegen.errors import Fp4CompileError, IllegalCombination, UnknownName
from fp4compile.passes.site import Role
from fp4compile.policy.layer import Layer, parse_layer
from fp4compile.policy.legality import refuse_illegal
from fp4compile.policy.presets import preset_layer, preset_names
from fp4compile.policy.rule import Choices, Policy, Rule, Training
from fp4compile.policy.setting import OperandTable, Precision, Setting, configs_of

_INLINE = "inline policy"


class InvalidToml(Fp4CompileError, ValueError):
    template = "{path}:{line}:{column}: {found}. Policy files are TOML: see https://toml.io, or start from `fp4compile policy init`."


class UnreadablePolicy(Fp4CompileError, OSError):
    template = "policy file {path} cannot be read: {found}. Give the path of a TOML file in UTF-8, or the name of a preset."


class CircularExtends(Fp4CompileError, ValueError):
    template = "policy files extend each other in a circle: {chain}. Let one of them extend a preset."


class NothingToStartFrom(Fp4CompileError, ValueError):
    template = (
        "{where}: nothing says what a matmul gets that no rule matches. "
        'Write extends = "nvfp4" (or another preset), or give [default] a precision: "w4a4", "w4a16" or "high".'
    )


def load_policy(source: str | os.PathLike[str] | Policy | Mapping[str, Any], *, calibrated: bool = True) -> Policy:
    """The policy that `source` names or holds: a preset's name, the path of a TOML file, a parsed file, or a policy already.

    calibrated: read the calibration artefact that it names, too; without, it can be looked at before there is one.

    Raises `UnknownName` for a name that is neither preset nor file, and for unknown keys and values; `InvalidToml`, `UnreadablePolicy`,
    `WrongValue`, `IllegalCombination`, `CircularExtends`, `NothingToStartFrom`; `NotCalibrated`, `UnreadableCalibration`,
    `AnotherCalibration`. All are `Fp4CompileError`.
    """
    if isinstance(source, Policy):
        return source
    if isinstance(source, str) and source in preset_names():
        return _build(_preset_chain(source), source)
    if isinstance(source, Mapping):
        label, layers = _INLINE, _with_bases(parse_layer(source, label=_INLINE), Path(), ())
    else:
        label, layers = Path(source).name, _file_chain(Path(source), Path(source).name, ())
    return _build(_with_statistics(layers) if calibrated else layers, layers[-1].name or label)


def _with_statistics(layers: list[Layer]) -> list[Layer]:
    """The last artefact that is named holds, and is read."""
    last = next((i for i in reversed(range(len(layers))) if layers[i].calibration is not None), None)
    if last is None or (source := layers[last].calibration) is None:
        return layers
    read = replace(layers[last], calibration=source.read(layers[last].label))
    return [*layers[:last], read, *layers[last + 1 :]]


def _preset_chain(name: str) -> list[Layer]:
    layer = preset_layer(name)
    return [*(_preset_chain(layer.extends) if layer.extends else ()), layer]


def _file_chain(path: Path, label: str, seen: tuple[Path, ...]) -> list[Layer]:
    """The file's layer behind those it extends. `label` is its path as the outermost file sees it."""
    text = _read(path, label)
    resolved = path.resolve()
    if resolved in seen:
        names = (*(p.name for p in seen[seen.index(resolved) :]), path.name)
        raise CircularExtends(chain=" -> ".join(names))
    return _with_bases(parse_layer(_parse(text, label), label=label), Path(label).parent, (*seen, resolved), path.parent)


def _with_bases(layer: Layer, label_folder: Path, seen: tuple[Path, ...], folder: Path = Path()) -> list[Layer]:
    if layer.calibration is not None:
        layer = replace(layer, calibration=layer.calibration.seen_from(label_folder, folder))
    base = layer.extends
    if not base:
        return [layer]
    if base in preset_names():
        return [*_preset_chain(base), layer]
    return [*_file_chain(folder / base, (label_folder / base).as_posix(), seen), layer]


def _read(path: Path, label: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # editors on Windows write a byte order mark
    except (FileNotFoundError, NotADirectoryError):
        raise UnknownName(what="policy (no preset has this name and no such file exists)", found=label, valid=preset_names()) from None
    except UnicodeDecodeError as error:
        raise UnreadablePolicy(path=label, found=f"byte {error.start} is not UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a path that holds a null character
        raise UnreadablePolicy(path=label, found=getattr(error, "strerror", None) or str(error)) from None


def _parse(text: str, label: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: TOMLDecodeError, or a number with thousands of digits
        message = str(error)
        found = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", message)
        lines = text.split("\n")
        line, column = (found[1], found[2]) if found and found[1] else (len(lines), len(lines[-1]) + 1)
        what = message[: found.start()] if found else message
        raise InvalidToml(path=label, line=line, column=column, found=what) from None


def _build(layers: list[Layer], name: str) -> Policy:
    description = layers[-1].description
    if layers[0].auto is not None:
        return _auto(layers[0], layers[1:], name, description)
    policy = _flat(layers, name, description)
    _refuse_illegal_at_any_step(policy)
    return policy


def _refuse_illegal_at_any_step(policy: Policy) -> None:
    refuse_illegal(policy)
    for switch in policy.schedule:
        refuse_illegal(policy.at(switch.from_step))


def _auto(base: Layer, own: list[Layer], name: str, description: str) -> Policy:
    """`own` laid over each preset that `base` chooses from. All of them are checked, whatever device this is."""
    assert base.auto is not None

    def laid_over(preset: str) -> Policy:
        arrow = f"auto -> {preset}"
        return _flat([*_preset_chain(preset), *own], arrow if name == "auto" else f"{name} ({arrow})", description)

    training = laid_over(base.auto.training)
    native, other = (_in_training(laid_over(preset), training) for preset in (base.auto.native, base.auto.other))
    for policy in (native, other, training):
        try:
            _refuse_illegal_at_any_step(policy)
        except IllegalCombination as error:
            raise IllegalCombination(**{**error.fields, "where": f"{policy.name}: {error.fields['where']}"}) from None
    only_own = reduce(lambda below, layer: layer.over(below), own) if own else base
    return replace(_policy(only_own, name, description), choices=Choices(native=native, other=other, training=training))


def _flat(layers: list[Layer], name: str, description: str) -> Policy:
    merged = reduce(lambda base, layer: layer.over(base), layers)
    if merged.default.precision is None:
        raise NothingToStartFrom(where=layers[-1].label)
    return _policy(merged, name, description)


def _policy(layer: Layer, name: str, description: str) -> Policy:
    return Policy(
        name=name,
        description=description,
        default=layer.default,
        training=layer.training,
        rules=layer.rules,
        schedule=tuple(sorted(layer.schedule, key=lambda switch: switch.from_step)),
        unmatched=layer.unmatched or "error",
        calibration=layer.calibration,
    )


def _in_training(inference: Policy, training: Policy) -> Policy:
    """`inference`, which decides graphs with a backward as `training` does."""
    roles = {str(role): _spelled_out(training, role) for role in (Role.FPROP, Role.DGRAD, Role.WGRAD)}
    return replace(inference, training=Training(**roles), rules=_rules_by_graph(inference.rules, training.rules))


def _spelled_out(policy: Policy, role: Role) -> Setting | None:
    own = policy.training.of(role)
    if own is None:
        return None
    setting = policy.setting_for(None, role, training=True)
    where = policy.source_of(role, training=True)
    # A rule may need those that the precision leaves out.
    configs = configs_of(replace(setting, precision=Precision.W4A4), role, where, policy.calibrated_by)
    tables: dict[str, Any] = {str(kind): OperandTable.of(config) for kind, config in configs.items()}
    return Setting(precision=setting.precision, origin=own.origin, **tables)


def _rules_by_graph(inference: tuple[Rule, ...], training: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Rules that both begin or end with hold for every graph, those between for one kind."""
    shorter = min(len(inference), len(training))
    first = next((i for i in range(shorter) if inference[i] != training[i]), shorter)
    rest = shorter - first
    last = next((i for i in range(rest) if inference[-1 - i] != training[-1 - i]), rest)
    between = [
        replace(rule, match=replace(rule.match, graph=graph))
        for graph, rules in (("inference", inference), ("training", training))
        for rule in rules[first : len(rules) - last]
    ]
    return (*inference[:first], *between, *inference[len(inference) - last :])
