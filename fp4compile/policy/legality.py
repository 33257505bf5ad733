"""Refuse a policy whose settings contradict each other, when it is loaded and not when a model meets it."""

from __future__ import annotations

from fp4compile.codegen.errors import IllegalCombination
from fp4compile.passes.site import OperandKind, Role
from fp4compile.policy.arc import refuse_arc_in_training
from fp4compile.policy.render import setting_text
from fp4compile.policy.rule import Policy, Rule
from fp4compile.policy.setting import BACKWARD, KINDS, OperandTable, Precision, configs_of


def refuse_illegal(policy: Policy) -> None:
    """Build every config that the policy can ask for. Raises `IllegalCombination`, which names file and rule."""
    where = policy.source_of(Role.FPROP, training=False)
    configs_of(policy.setting_for(None, Role.FPROP, training=False), Role.FPROP, where, policy.calibrated_by)
    for role in (Role.FPROP, *BACKWARD):
        own = policy.training.of(role)
        if own is None:
            continue
        where = policy.source_of(role, training=True)
        setting = policy.setting_for(None, role, training=True)
        refuse_arc_in_training(own.activation.arc, where)
        quantized = configs_of(setting, role, where, policy.calibrated_by)
        if own.precision not in (None, Precision.HIGH, Precision.DEQUANTIZED) and not quantized:
            raise _quantizes_nothing(where, f'precision = "{own.precision}"', "Under w4a16 only weights are 4-bit, and it has none.")
    for rule in policy.rules:
        _refuse_illegal_rule(policy, rule)


def _refuse_illegal_rule(policy: Policy, rule: Rule) -> None:
    quantized: set[OperandKind] = set()
    for training in (False, True):
        if not rule.match.covers_graph(training=training):
            continue
        for role in rule.roles:
            if role in BACKWARD and not training:
                continue
            setting = policy.setting_for(rule, role, training=training)
            quantized |= set(configs_of(setting, role, rule.label, policy.calibrated_by))
    if rule.match.graph == "training":
        refuse_arc_in_training(rule.setting.activation.arc, rule.label)
    given = [kind for kind in KINDS if getattr(rule.setting, kind.value) != OperandTable()]
    unused = [kind for kind in given if kind not in quantized]
    if unused:
        raise IllegalCombination(
            where=rule.label,
            found=f"{setting_text(rule.setting)} sets the {unused[0]}, but no matmul that the rule covers has a 4-bit {unused[0]}",
            needed=_why_unused(policy, rule, unused[0]),
            advice="Change that, or leave the table out.",
        )
    if rule.setting.precision not in (Precision.HIGH, Precision.DEQUANTIZED) and not quantized:
        raise _quantizes_nothing(rule.label, setting_text(rule.setting), _why_unused(policy, rule, OperandKind.WEIGHT))
    if rule.setting.precision is Precision.HIGH and (rule.setting.format or rule.setting.hadamard):
        raise _quantizes_nothing(rule.label, setting_text(rule.setting), 'Its precision is "high".')


def _why_unused(policy: Policy, rule: Rule, kind: OperandKind) -> str:
    precision = rule.setting.precision or policy.setting_for(None, Role.FPROP, training=False).precision
    if precision is Precision.HIGH:
        whose = "The rule's own precision" if rule.setting.precision else "The precision it starts from, that of [default],"
        return f'{whose} is "high"; precision = "w4a4" quantizes both operands.'
    if kind is OperandKind.GRADIENT and not rule.match.role:
        return "Gradients are operands of dgrad and wgrad, which are quantized where [training] or the rule's own role names them."
    if precision is Precision.W4A16:
        return 'Its precision is "w4a16", under which only weights are 4-bit; precision = "w4a4" quantizes both operands.'
    return f"No role it covers ({', '.join(rule.roles)}) multiplies a {kind}."


def _quantizes_nothing(where: str, found: str, why: str) -> IllegalCombination:
    advice = 'Use precision = "w4a4", or "high" alone.'
    return IllegalCombination(where=where, found=f"{found} quantizes nothing", needed=why, advice=advice)
