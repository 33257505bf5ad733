"""What may be done with a matmul: a precision, and one table of quantization fields for each kind of operand."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any, Final

from fp4compile.codegen.errors import IllegalCombination
from fp4compile.codegen.formats import EDEN_GROUP, NVFP4, GlobalScale, QuantConfig, Rounding, ScaleRule, Signs, Source
from fp4compile.passes.site import OperandKind, Role
from fp4compile.policy.arc import Arc, refuse_illegal_arc

KINDS: Final = (OperandKind.ACTIVATION, OperandKind.WEIGHT, OperandKind.GRADIENT)
BACKWARD: Final = (Role.DGRAD, Role.WGRAD)
OPERANDS: Final = {
    Role.FPROP: (OperandKind.ACTIVATION, OperandKind.WEIGHT),
    Role.DGRAD: (OperandKind.GRADIENT, OperandKind.WEIGHT),
    Role.WGRAD: (OperandKind.GRADIENT, OperandKind.ACTIVATION),
    Role.MATMUL: (OperandKind.ACTIVATION,),  # both factors
}
# These describe the scales of one format and mean nothing in another.
_OF_FORMAT: Final = ("block", "scale_rule", "global_scale", "static_amax")


class Precision(StrEnum):
    HIGH = "high"  # the model's own dtype
    W4A4 = "w4a4"
    W4A16 = "w4a16"
    DEQUANTIZED = "dequantized"  # backward only: as high, but on the values that the forward multiplied with


@dataclass(frozen=True, kw_only=True)
class OperandTable:
    """The fields of a `QuantConfig` that a policy gives. None: inherited, and in the end `QuantConfig`'s own default."""

    format: str | None = None
    block: str | None = None
    scale_rule: str | None = None
    global_scale: str | None = None
    rounding: str | None = None
    hadamard: int | None = None
    static_amax: float | None = None
    signs: str | None = None
    source: str | None = None
    arc: Arc | None = None  # of the activation alone

    def given(self) -> dict[str, Any]:
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    def plain(self) -> dict[str, Any]:
        """The same as policies spell it."""
        return {name: value.given() if isinstance(value, Arc) else value for name, value in self.given().items()}

    def over(self, base: OperandTable) -> OperandTable:
        """This table's fields, and `base`'s where it gives none; scale settings are inherited within one format only."""
        inherited = base.given()
        if self.format is not None and self.format != (base.format or NVFP4.name):
            inherited = {name: value for name, value in inherited.items() if name not in _OF_FORMAT}
        if self.global_scale is not None and self.global_scale != GlobalScale.STATIC:
            inherited.pop("static_amax", None)
        if self.hadamard == 0:
            inherited.pop("signs", None)
        return OperandTable(**{**inherited, **self.given()})

    @property
    def needs_moments(self) -> bool:
        return self.rounding == Rounding.GPTQ or self.scale_rule == ScaleRule.LOCAL_HESSIAN

    @property
    def needs_amax(self) -> bool:
        return self.global_scale == GlobalScale.STATIC and self.static_amax is None

    def config(self, where: str, calibration: str = "") -> QuantConfig:
        """`calibration` names the artefact, where there is one. Raises `IllegalCombination`, which names `where`."""
        try:
            return QuantConfig(**{name: value for name, value in self.given().items() if name != "arc"}, calibration=calibration)
        except IllegalCombination as error:
            raise IllegalCombination(**{**error.fields, "where": where}) from None

    @classmethod
    def of(cls, config: QuantConfig) -> OperandTable:
        """Every field spelled out, so that nothing below this table shows through."""
        values: dict[str, Any] = {f.name: getattr(config, f.name) for f in fields(cls) if f.name != "arc"}
        plain: dict[str, Any] = {name: str(value) if isinstance(value, StrEnum) else value for name, value in values.items()}
        return cls(**plain)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The setting keys of [default], of a role in [training], and of a rule. None and empty tables: not given."""

    precision: Precision | None = None
    format: str | None = None  # of every operand
    hadamard: int | None = None  # of every operand
    signs: str | None = None  # of every operand
    activation: OperandTable = OperandTable()
    weight: OperandTable = OperandTable()
    gradient: OperandTable = OperandTable()
    origin: str = ""  # file or preset that gave it

    def table(self, kind: OperandKind) -> OperandTable:
        own: OperandTable = getattr(self, kind.value)
        return own.over(OperandTable(format=self.format, hadamard=self.hadamard, signs=self.signs))

    def over(self, base: Setting) -> Setting:
        """What this setting gives, and `base`'s where it gives nothing, field by field."""
        tables: dict[str, Any] = {kind.value: self.table(kind).over(base.table(kind)) for kind in KINDS}
        return Setting(precision=self.precision or base.precision, origin=self.origin or base.origin, **tables)

    def spelled_out(self, kinds: Collection[OperandKind]) -> Setting:
        """The same with `format`, `hadamard` and `signs` written into the tables of `kinds`, and no other tables."""
        tables: dict[str, Any] = {kind.value: self.table(kind) for kind in kinds}
        return Setting(precision=self.precision, origin=self.origin, **tables)

    @property
    def is_empty(self) -> bool:
        return replace(self, origin="") == Setting()

    @property
    def sorts_channels(self) -> bool:
        """Whether outliers of the activation, if there are any, are sorted one by one."""
        arc = self.table(OperandKind.ACTIVATION).arc
        return arc is not None and arc.rule is not None and arc.rule.reorder


_QUANTIZED: Final = {Precision.HIGH: (), Precision.DEQUANTIZED: (), Precision.W4A16: (OperandKind.WEIGHT,)}


def configs_of(setting: Setting, role: Role, where: str, calibration: str = "") -> dict[OperandKind, QuantConfig]:
    """The config of each quantized operand of a matmul in `role`. Raises `IllegalCombination` for pairs that make no sense.

    What needs statistics is legal where `calibration` names an artefact, and keeps that name until the matmul is known.
    """
    kinds = _QUANTIZED.get(setting.precision or Precision.W4A4, OPERANDS[role])
    configs = {kind: _config(setting, kind, role, where, calibration) for kind in kinds if kind in OPERANDS[role]}
    here = f"{where} ({role})"
    if setting.precision is Precision.DEQUANTIZED and role not in BACKWARD:
        raise IllegalCombination(
            where=here,
            found='precision = "dequantized"',
            needed="A forward has no values that were quantized before it.",
            advice='Give it to dgrad and wgrad: backward = "dequantized" in [training], or a rule with role.',
        )
    for kind, config in configs.items():
        if kind is OperandKind.GRADIENT and config.scale_rule.tries_two:
            raise IllegalCombination(
                where=here,
                found=f"scale_rule = {config.scale_rule} on the gradient",
                needed="Four-over-six is for the operands of the forward and their rotations; on a gradient its choice is biased.",
                advice="Use scale_rule = 'amax', or 'amax_17_16' with rounding = 'stochastic'.",
            )
        if role in (Role.FPROP, Role.MATMUL) and config.draws:
            raise IllegalCombination(
                where=here,
                found=f"rounding = {config.rounding} on the {kind} of the forward",
                needed="Training diverges with it (arXiv 2509.25149); only the backward may round stochastically.",
                advice='Use rounding = "nearest" here, and "stochastic" on the gradient of dgrad and wgrad.',
            )
        _refuse_biased_eden(config, kind, here)
        _refuse_foreign_source(config, kind, role, here)
    if role not in BACKWARD:
        refuse_illegal_arc(setting.table(OperandKind.ACTIVATION).arc, configs, role, here, calibration)
    _refuse_unequal_rotation(configs, role, here)
    _refuse_searches_at_run_time(configs, here)
    _refuse_unequal_blocks(configs, here)
    _refuse_lonely_runs(configs, setting.precision, here)
    return configs


def _config(setting: Setting, kind: OperandKind, role: Role, where: str, calibration: str) -> QuantConfig:
    table, here = setting.table(kind), f"{where} ({role} {kind})"
    if calibration and role is not Role.FPROP and (table.needs_moments or table.needs_amax):
        raise IllegalCombination(
            where=here,
            found="it asks for statistics of a calibration",
            needed="Those are of what the weights of the forward are multiplied with; other products see other values.",
            advice=f"Extend a preset for inference, or give the {kind} of {role} a table of its own.",
        )
    if calibration and kind is not OperandKind.ACTIVATION and table.needs_amax:
        raise IllegalCombination(
            where=here,
            found="global_scale = static without static_amax",
            needed="Calibration measures activations; the amax of a weight is its own.",
            advice='Use global_scale = "tensor".',
        )
    return table.config(here, calibration)


def _refuse_biased_eden(config: QuantConfig, kind: OperandKind, where: str) -> None:
    if config.rounding is Rounding.EDEN and (config.hadamard != EDEN_GROUP or config.signs is not Signs.RANDOM):
        raise IllegalCombination(
            where=where,
            found=f"rounding = eden on the {kind} with hadamard = {config.hadamard} and signs = {config.signs}",
            needed=f"It rounds to nearest, which is unbiased only on average over random rotations of its groups of {EDEN_GROUP}.",
            advice=f'Give hadamard = {EDEN_GROUP}, signs = "random" beside it, or use rounding = "stochastic".',
        )


def _refuse_foreign_source(config: QuantConfig, kind: OperandKind, role: Role, where: str) -> None:
    if config.source is Source.FORWARD and (role not in BACKWARD or kind is OperandKind.GRADIENT):
        raise IllegalCombination(
            where=where,
            found=f'source = "forward" on the {kind}',
            needed="It lets the backward quantize the activation or the weight as the forward multiplied with it.",
            advice="Give it to the weight of dgrad or the activation of wgrad.",
        )


def _refuse_searches_at_run_time(configs: dict[OperandKind, QuantConfig], where: str) -> None:
    for kind, config in configs.items():
        if kind is OperandKind.WEIGHT or not config.is_offline:
            continue
        is_format = bool(config.fmt.flagged_values)
        rule = "rounding = gptq" if config.rounding is Rounding.GPTQ else f"scale_rule = {config.scale_rule}"
        raise IllegalCombination(
            where=where,
            found=f"{f'format = {config.format}' if is_format else rule} on the {kind}",
            needed="It has no kernel and runs once per weight; this operand is quantized in every call.",
            advice=f'Give it to the weight alone, as in weight = {{ format = "{config.format}" }}, or use precision = "w4a16".'
            if is_format
            else 'Give it to the weight alone, and use scale_rule = "four_over_six" here.',
        )


def _refuse_unequal_blocks(configs: dict[OperandKind, QuantConfig], where: str) -> None:
    formats = sorted({config.format for config in configs.values()})
    if len({config.fmt.block for config in configs.values()}) > 1:
        raise IllegalCombination(
            where=where,
            found=f"the operands of one matmul have the formats {' and '.join(formats)}",
            needed="Both must have one format: their blocks are contracted with each other.",
            advice="Give both operands the same format, or name the role that the rule is for.",
        )


def _refuse_lonely_runs(configs: dict[OperandKind, QuantConfig], precision: Precision | None, where: str) -> None:
    """A global scale each 1x128 is multiplied in between sums, which only products of two operands in NVFP4 do."""
    kind = next((kind for kind, config in configs.items() if config.by_runs), None)
    other = next((config.format for config in configs.values() if config.format != NVFP4.name), "")
    if kind is not None and (precision is Precision.W4A16 or other):
        raise IllegalCombination(
            where=where,
            found=f"global_scale = 1x128 on the {kind} with {f'format = {other}' if other else 'precision = w4a16'}",
            needed="It is multiplied in between sums, where both operands are in nvfp4.",
            advice="Use global_scale = 'row' or 'tensor' here.",
        )


def _refuse_unequal_rotation(configs: dict[OperandKind, QuantConfig], role: Role, where: str) -> None:
    sizes = {kind: configs[kind].hadamard if kind in configs else 0 for kind in OPERANDS[role]}
    if len({config.signs for config in configs.values()}) > 1:
        raise IllegalCombination(
            where=where,
            found=" and ".join(f"signs = {config.signs} on the {kind}" for kind, config in configs.items()),
            needed="A rotation cancels only if both operands of the matmul have the same one.",
            advice="Set signs beside hadamard, for both operands.",
        )
    if role not in BACKWARD and any(config.signs is Signs.RANDOM for config in configs.values()):
        raise IllegalCombination(
            where=where,
            found="signs = random in the forward",
            needed="They are drawn anew in each backward; a weight that is rotated anew would be quantized in every call.",
            advice='Use signs = "fixed" here.',
        )
    if len(set(sizes.values())) > 1:
        raise IllegalCombination(
            where=where,
            found=" and ".join(
                f"hadamard = {size} on the {kind}{'' if kind in configs else ' in high precision'}" for kind, size in sizes.items()
            ),
            needed="A rotation cancels only if both operands of the matmul have the same one.",
            advice="Set hadamard beside precision, for both operands, or leave it out.",
        )
