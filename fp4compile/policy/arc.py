"""The `arc` table of a policy: which calibrated outliers of an activation are quantized twice, and where that is legal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from fp4compile.calibration.outliers import OutlierRule, Statistic
from fp4compile.codegen.errors import IllegalCombination
from fp4compile.codegen.formats import QuantConfig
from fp4compile.passes.site import OperandKind, Role
from fp4compile.policy.reading import Table, WrongValue, flag_at, name_at, refuse_unknown_keys, whole_number_at

_WAYS: Final = ("threshold", "element_threshold", "token_threshold", "channels", "fraction")
_MULTIPLES: Final = (16, 32, 64, 128)
_KEYS: Final = tuple(f.name for f in fields(OutlierRule))


@dataclass(frozen=True, kw_only=True)
class Arc:
    """`arc = { ... }`, or `arc = false` to have none where a rule or a preset below has one."""

    rule: OutlierRule | None = None

    def given(self) -> bool | dict[str, Any]:
        """As policies spell it, without what is left at its default."""
        if self.rule is None:
            return False
        default = OutlierRule()
        found = {key: getattr(self.rule, key) for key in _KEYS if getattr(self.rule, key) != getattr(default, key)}
        return {key: str(value) if isinstance(value, Statistic) else value for key, value in found.items()}


def arc_at(table: Table, where: str) -> Arc | None:
    """The table `arc` of an operand. Raises `UnknownName` or `WrongValue`."""
    if "arc" not in table:
        return None
    given, where = table["arc"], f"{where}, arc"
    if given is False:
        return Arc()
    if not isinstance(given, Mapping):
        raise WrongValue(where=where, key="arc", found=given, needed="a table is needed, as in { threshold = 0.125 }, or false for none")
    refuse_unknown_keys(given, _KEYS, where)
    ways = [key for key in _WAYS if key in given]
    if len(ways) != 1:
        raise WrongValue(where=where, key="arc", found=given, needed=f"one of {', '.join(_WAYS)} is needed: how many channels are outliers")
    multiple = whole_number_at(given, "multiple", where)
    if multiple is not None and multiple not in _MULTIPLES:
        raise WrongValue(where=where, key="multiple", found=multiple, needed=f"one of {', '.join(map(str, _MULTIPLES))} is needed")
    default = OutlierRule()
    rule = OutlierRule(
        statistic=Statistic(name_at(given, "statistic", Statistic, where) or default.statistic),
        threshold=_share_at(given, "threshold", where),
        element_threshold=_share_at(given, "element_threshold", where),
        token_threshold=_share_at(given, "token_threshold", where),
        channels=whole_number_at(given, "channels", where),
        fraction=_share_at(given, "fraction", where),
        multiple=multiple or default.multiple,
        reorder=flag_at(given, "reorder", where) if "reorder" in given else default.reorder,
        most=_share_at(given, "most", where) or default.most,
    )
    return Arc(rule=rule)


def _share_at(table: Table, key: str, where: str) -> float | None:
    if key not in table:
        return None
    found = table[key]
    if not isinstance(found, int | float) or isinstance(found, bool) or not 0 < found <= 1:
        raise WrongValue(where=where, key=key, found=found, needed="a share is needed, above 0 and up to 1")
    return float(found)


def refuse_illegal_arc(arc: Arc | None, configs: Mapping[OperandKind, QuantConfig], role: Role, where: str, calibration: str) -> None:
    """Raises `IllegalCombination`, with the reason, where the operands of a matmul in `role` cannot have residuals of outliers."""
    activation, weight = configs.get(OperandKind.ACTIVATION), configs.get(OperandKind.WEIGHT)
    if arc is None or arc.rule is None or activation is None:
        return
    if role is not Role.FPROP or weight is None:
        raise IllegalCombination(
            where=where,
            found=f"arc in {role}",
            needed="A residual of the activation needs a weight whose columns are repeated, in a forward.",
            advice="Give the table to rules about layers, or arc = false to this one.",
        )
    for holds, found, needed, advice in _conflicts(arc.rule, activation, weight, calibration):
        if holds:
            raise IllegalCombination(where=where, found=f"arc {found}", needed=needed, advice=advice)


def _conflicts(rule: OutlierRule, activation: QuantConfig, weight: QuantConfig, calibration: str) -> tuple[tuple[bool, str, str, str], ...]:
    return (
        (
            not calibration,
            "without a calibration",
            "Which channels are outliers is known from running the model on data.",
            "Run `fp4compile calibrate` and name its file in the policy: calibration = 'file.pt'.",
        ),
        (
            bool(activation.hadamard),
            f"with hadamard = {activation.hadamard}",
            "A rotation spreads outliers over its group, so no channel is one any more.",
            "Use one of the two: hadamard = 0, or arc = false.",
        ),
        (
            activation.is_tile,
            f"with block = {activation.block}",
            "Residual blocks lie between blocks of one row.",
            "Use block = '1x16' for the activation.",
        ),
        (
            activation.by_runs or weight.by_runs,
            "with global_scale = 1x128",
            "Residuals make rows longer, and share their scale with the row.",
            "Use global_scale = 'row', or arc = false.",
        ),
        (
            bool(rule.multiple % activation.fmt.block),
            f"with multiple = {rule.multiple} and format = {activation.format}",
            f"Residuals come in whole blocks, of {activation.fmt.block} channels.",
            "Use multiple = 64.",
        ),
    )


def refuse_arc_in_training(arc: Arc | None, where: str) -> None:
    """Raises `IllegalCombination` for what is trained."""
    if arc is None or arc.rule is None:
        return
    raise IllegalCombination(
        where=where,
        found="arc in a graph with a backward",
        needed="Outliers are calibrated for weights that stay as they are, and a gradient would need the residual too.",
        advice='Run the model under torch.no_grad(), or give training graphs none: [[rule]] with graph = "training" and arc = false.',
    )
