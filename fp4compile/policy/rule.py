"""A policy as values: rules, what they match, and the decision for each matmul. The last rule that matches decides alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from torch.fx.experimental.symbolic_shapes import statically_known_true

from fp4compile.calibration.outliers import outliers_of
from fp4compile.calibration.source import CalibrationSource
from fp4compile.codegen.errors import Fp4CompileError
from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.outliers import Outliers
from fp4compile.codegen.target import Target
from fp4compile.passes.site import Decision, OperandKind, Role, Site, Size
from fp4compile.policy.arc import refuse_arc_in_training
from fp4compile.policy.coverage import check_coverage
from fp4compile.policy.pattern import compile_pattern, depth_range
from fp4compile.policy.render import match_text, policy_text
from fp4compile.policy.setting import BACKWARD, OPERANDS, Precision, Setting, configs_of

TRAITS: Final = ("attention", "head", "router", "tied")
OPS: Final = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "convolution")


class PolicyNeedsTarget(Fp4CompileError, RuntimeError):
    template = "policy {name!r} depends on the device and decides nothing by itself. Call policy.resolve_for(target) first."


@dataclass(frozen=True, kw_only=True)
class Match:
    """Which matmuls a rule is about: all keys must hold, and of the values of one key any. Empty and None: not asked."""

    match: tuple[str, ...] = ()  # patterns on the module path
    role: tuple[Role, ...] = ()
    op: tuple[str, ...] = ()
    class_name: tuple[str, ...] = ()  # patterns, as `*Linear`
    trait: tuple[str, ...] = ()
    graph: str = ""  # "training" or "inference"
    depth: str = ""
    min_m: int | None = None
    max_m: int | None = None
    min_n: int | None = None
    max_n: int | None = None
    min_k: int | None = None
    max_k: int | None = None

    def covers_module(self, path: str) -> bool:
        return not self.match or any(compile_pattern(p).fullmatch(path) for p in self.match)

    def covers_graph(self, *, training: bool) -> bool:
        return not self.graph or (self.graph == "training") is training

    def covers(self, site: Site) -> bool:
        """Whether the keys other than `role` and `graph` hold for `site`."""
        return (
            self.covers_module(site.module)
            and (not self.op or site.op in self.op)
            and (not self.class_name or any(compile_pattern(c).fullmatch(site.class_name) for c in self.class_name))
            and (not self.trait or not site.traits.isdisjoint(self.trait))
            and (not self.depth or (site.depth >= 0 and site.layers > 0 and site.depth in depth_range(self.depth, site.layers)))
            and _within(site.m, self.min_m, self.max_m)
            and _within(site.n, self.min_n, self.max_n)
            and _within(site.k, self.min_k, self.max_k)
        )


def _within(size: Size, least: int | None, most: int | None) -> bool:
    """A bound on a dynamic dimension holds only where it holds for every value: the graph serves them all, and asking adds no guard."""
    return (least is None or statically_known_true(size >= least)) and (most is None or statically_known_true(size <= most))


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One [[rule]]. `setting.origin` is its file or preset, `number` its place there, from 1."""

    match: Match
    setting: Setting
    number: int
    reason: str = ""
    optional: bool = False  # may match nothing: rules of presets, and those of policies meant for several models
    table: str = "rule"  # or "schedule"

    @property
    def label(self) -> str:
        return f"{self.setting.origin}, {self.table} {self.number}"

    @property
    def roles(self) -> tuple[Role, ...]:
        """Without `role`, a rule that quantizes is about layers with a weight; one that protects is about every matmul."""
        if self.match.role:
            return self.match.role
        return tuple(Role) if self.setting.precision is Precision.HIGH else (Role.FPROP, *BACKWARD)

    def covers(self, site: Site, *, training: bool) -> bool:
        return site.role in self.roles and self.match.covers_graph(training=training) and self.match.covers(site)


@dataclass(frozen=True, kw_only=True)
class Training:
    """[training]: what the matmuls of a training graph get, by role. None: not named."""

    fprop: Setting | None = None
    dgrad: Setting | None = None
    wgrad: Setting | None = None

    def of(self, role: Role) -> Setting | None:
        return None if role is Role.MATMUL else getattr(self, role.value)

    def over(self, base: Training) -> Training:
        merged: dict[str, Setting | None] = {}
        for role in (Role.FPROP, *BACKWARD):
            own, below = self.of(role), base.of(role)
            merged[role.value] = own.over(below).spelled_out(OPERANDS[role]) if own and below else own or below
        return Training(**merged)


@dataclass(frozen=True, kw_only=True)
class Switch:
    """One [[schedule]]: what is laid over the policy from an optimizer step on. `number` is its place in its file, from 1."""

    from_step: int
    origin: str
    number: int
    training: Training = Training()
    rule: Rule | None = None  # exceptions, as of [[rule]]

    @property
    def label(self) -> str:
        return f"{self.origin}, schedule {self.number}"

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Behind those of the policy. A role in high precision is so everywhere: no earlier rule knows better."""
        high = [role for role in (Role.FPROP, *BACKWARD) if (own := self.training.of(role)) and own.precision is Precision.HIGH]
        setting = Setting(precision=Precision.HIGH, origin=self.origin)
        reason = f"in high precision from step {self.from_step} on"
        by_role = Rule(match=Match(role=tuple(high)), setting=setting, number=self.number, reason=reason, optional=True, table="schedule")
        return (*((by_role,) if high else ()), *((replace(self.rule, optional=True),) if self.rule else ()))


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What every matmul gets. Made by `load_policy`, which refuses illegal ones; equal policies decide equally."""

    name: str
    description: str
    default: Setting
    training: Training
    rules: tuple[Rule, ...]
    unmatched: str = "error"
    schedule: tuple[Switch, ...] = ()  # by step
    choices: Choices | None = None  # set where the device decides; then the other fields hold only what is laid over the choice
    calibration: CalibrationSource | None = None

    @property
    def calibrated_by(self) -> str:
        """Name of the artefact; empty where there is none."""
        return self.calibration.label if self.calibration else ""

    @property
    def base(self) -> dict[OperandKind, QuantConfig]:
        """What a forward matmul gets where no rule matches."""
        setting = self.setting_for(None, Role.FPROP, training=False)
        return configs_of(setting, Role.FPROP, f"{self.default.origin}, [default]", self.calibrated_by)

    def resolve_for(self, target: Target, *, training: bool = False) -> Policy:
        """This policy on `target`. Only `auto`, and what extends it, depends on it; `training` chooses the name that reports show."""
        if self.choices is None:
            return self
        if training:
            return self.choices.training
        return self.choices.native if target.has_fp4_mma else self.choices.other

    def phase(self, step: int) -> int:
        """How many switches of the schedule lie behind optimizer step `step`."""
        return sum(switch.from_step <= step for switch in self.schedule)

    def at(self, step: int) -> Policy:
        """The policy that holds at optimizer step `step`. A rule that a switch hides is no mistake any more."""
        passed = self.schedule[: self.phase(step)]
        if not passed:
            return self
        rules = tuple(replace(rule, optional=True) for rule in self.rules)
        training = self.training
        for switch in passed:
            rules += switch.rules
            training = switch.training.over(training)
        name = f"{self.name} from step {passed[-1].from_step}"
        return replace(self, name=name, rules=rules, training=training, schedule=())

    def decide(self, sites: Sequence[Site], *, training: bool) -> list[Decision]:
        """One decision a site. `training` says that the graph has a backward.

        Raises `RuleMatchesNothing` and `RuleHidden` for rules that cannot mean what they say, or warns where `unmatched = "warn"`.
        """
        if self.choices is not None:
            raise PolicyNeedsTarget(name=self.name)
        matching = [[i for i, rule in enumerate(self.rules) if rule.covers(site, training=training)] for site in sites]
        check_coverage(self, sites, matching, training=training)
        last = [self.rules[found[-1]] if found else None for found in matching]
        return [self._decision(site, rule, training) for site, rule in zip(sites, last, strict=True)]

    def setting_for(self, rule: Rule | None, role: Role, *, training: bool) -> Setting:
        """The whole setting of a matmul in `role` whose last matching rule is `rule`: rule over [training] over [default]."""
        base = self._base_for(role, training)
        if rule is None or self._stays_high(rule, role, base):
            return base
        return rule.setting.over(base)

    def _base_for(self, role: Role, training: bool) -> Setting:
        own = self.training.of(role) if training else None
        base = own.over(self.default) if own else self.default
        if role is Role.FPROP:
            precision = base.precision
        elif own:
            precision = own.precision or Precision.W4A4
        else:
            precision = Precision.HIGH
        return Setting(precision=precision).over(base)

    def _stays_high(self, rule: Rule, role: Role, base: Setting) -> bool:
        """[training] turns the backward on, or a rule that names the role; a rule about a layer as a whole does not."""
        high = base.precision in (Precision.HIGH, Precision.DEQUANTIZED) and rule.setting.precision is not Precision.HIGH
        return role in BACKWARD and role not in rule.match.role and high

    def _decision(self, site: Site, rule: Rule | None, training: bool) -> Decision:
        setting = self.setting_for(rule, site.role, training=training)
        source = rule.label if rule else self.source_of(site.role, training=training)
        configs, dequantized = configs_of(setting, site.role, source, self.calibrated_by), setting.precision is Precision.DEQUANTIZED
        return Decision(
            configs=configs, rule=source, reason=self._reason(site, rule, setting, training), dequantized=dequantized,
            outliers=self._outliers(site, setting, configs, source, training=training),
            sorts_channels=OperandKind.ACTIVATION in configs and setting.sorts_channels,
        )  # fmt: skip

    def _outliers(
        self, site: Site, setting: Setting, configs: Mapping[OperandKind, QuantConfig], where: str, *, training: bool
    ) -> Outliers | None:  # fmt: skip
        """Raises `IllegalCombination` in training, and `MissingStatistics` for a matmul that was not calibrated."""
        arc, activation = setting.table(OperandKind.ACTIVATION).arc, configs.get(OperandKind.ACTIVATION)
        if arc is None or arc.rule is None or activation is None or site.refusal:
            return None
        if training:
            refuse_arc_in_training(arc, where)
        known = self.calibration.found if self.calibration else None
        if known is None:
            return None  # a policy that is looked at before there is an artefact
        return outliers_of(known.statistics_for(site.name), arc.rule, activation.fmt.block, site=site.name, k=site.k)

    def source_of(self, role: Role, *, training: bool) -> str:
        """Where the setting of a matmul comes from that no rule matches."""
        own = self.training.of(role) if training else None
        return f"{own.origin}, [training] {role}" if own else f"{self.default.origin}, [default]"

    def _reason(self, site: Site, rule: Rule | None, setting: Setting, training: bool) -> str:
        if setting.precision is Precision.DEQUANTIZED:
            return "backward in high precision, on the values that the forward multiplied with"
        protects = rule is not None and rule.setting.precision is Precision.HIGH
        if site.role in BACKWARD and setting.precision is Precision.HIGH and not protects:
            how = "leaves out" if self.training.of(site.role) is None else "keeps"
            return f"backward in high precision (straight-through): [training] {how} {site.role}"
        if rule is not None:
            return rule.reason or f"rule on {match_text(rule.match)}"
        if site.role is Role.MATMUL:
            return 'multiplies two activations; only a rule with role = "matmul" quantizes those'
        own = self.training.of(site.role) if training else None
        return f"default of {(own or self.default).origin}"

    def to_toml(self) -> str:
        """The resolved policy, all files in one; loading it gives an equal policy."""
        return policy_text(self)

    def fingerprint(self) -> str:
        """Hash of the resolved text: it changes whenever a decision could."""
        texts = [self.to_toml(), *((p.to_toml() for p in self.choices.all) if self.choices else ())]
        return hashlib.sha256("\n".join(texts).encode(errors="surrogatepass")).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What `auto` may become: by the device in inference, and one recipe in training. Each also decides the other kind of graph."""

    native: Policy
    other: Policy
    training: Policy

    @property
    def all(self) -> tuple[Policy, ...]:
        return self.native, self.other, self.training
