"""Which matmuls to leave in high precision under a budget of FLOPs: those that lose most a FLOP, as the table has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from fp4compile.codegen.errors import Fp4CompileError
from fp4compile.isolation.estimate import Estimate
from fp4compile.isolation.parts import SiteFacts, part_name

_ROUNDS: Final = 50  # of fitting to margins that need not agree: it settles long before
Effects = Mapping[tuple[str, str], float]  # (kind, name of the part) -> what was measured


class CannotChoose(Fp4CompileError, ValueError):
    template = "sensitivity: {found}. {advice}"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """`modules` stay in high precision; `flops` is their share of what `policy` quantizes. `basis` says what they were chosen by."""

    policy: str
    modules: tuple[str, ...]
    flops: float
    basis: str

    def to_toml(self, *, extends: str = "") -> str:
        """A policy file. `extends` names the policy where it is a file of another folder."""
        names = "".join(f'    "{module}",\n' for module in self.modules)
        rule = f'\n[[rule]]\nmatch = [\n{names}]\nprecision = "high"\nreason = "among the most sensitive a FLOP"\n' if self.modules else ""
        head = f'version = 1\ndescription = "{self.policy}, {self.flops:.1%} of its FLOPs in high precision: chosen by {self.basis}"\n'
        return f'{head}extends = "{extends or self.policy}"\n{rule}'


def choose(facts: Sequence[SiteFacts], effects: Effects, estimates: Mapping[str, Estimate], share: float, *, policy: str) -> Choice:
    """At most `share` of the FLOPs of `facts`, matmuls of one module together. Raises `CannotChoose`."""
    if not 0 <= share < 1:
        raise CannotChoose(found=f"{share} of the FLOPs cannot stay in high precision", advice="Give a share from 0 to below 1.")
    if not facts:
        raise CannotChoose(found=f"nothing was measured under {policy!r}", advice="Measure that policy, or name one that was.")
    scores, basis = site_scores(facts, effects, estimates)
    groups: dict[str, list[SiteFacts]] = {}
    for fact in facts:
        groups.setdefault(fact.module, []).append(fact)
    cost = {module: sum(fact.flops for fact in own) for module, own in groups.items()}
    worth = {module: sum(scores[fact.name] for fact in own) for module, own in groups.items()}
    budget, chosen = share * sum(cost.values()), set[str]()
    for module in sorted(groups, key=lambda m: -worth[m] / cost[m] if cost[m] else 0.0):
        if worth[module] > 0 and cost[module] <= budget:
            chosen.add(module)
            budget -= cost[module]
    spent = sum(cost[module] for module in chosen) / sum(cost.values())
    return Choice(policy=policy, modules=tuple(m for m in groups if m in chosen), flops=spent, basis=basis)


def site_scores(facts: Sequence[SiteFacts], effects: Effects, estimates: Mapping[str, Estimate]) -> tuple[dict[str, float], str]:
    """What each matmul loses, and where that is known from: measured alone; or the estimate, fitted to what roles and blocks lose.

    Raises `CannotChoose` where there is neither.
    """
    if all(("site", fact.name) in effects for fact in facts):
        return {fact.name: max(effects["site", fact.name], 0.0) for fact in facts}, "measuring each matmul alone"
    kinds = [kind for kind in ("role", "block") if all((kind, part_name(fact, kind)) in effects for fact in facts)]
    if not kinds and not estimates:
        raise CannotChoose(found="neither roles, blocks nor single matmuls were measured", advice='Give isolate = ("role", "block").')
    scores = {fact.name: estimates[fact.name].curvature if estimates else fact.flops for fact in facts}
    for _ in range(_ROUNDS):
        for kind in kinds:
            scores = _fitted(facts, scores, effects, kind)
    names = [*(f"{kind}s" for kind in kinds), *(["the estimate by curvature"] if estimates else [])]
    return scores, " and ".join(names)


def _fitted(facts: Sequence[SiteFacts], scores: Mapping[str, float], effects: Effects, kind: str) -> dict[str, float]:
    """Scaled so that the matmuls of each part sum to what the part was measured to lose (iterative proportional fitting)."""
    totals: dict[str, float] = {}
    for fact in facts:
        totals[part_name(fact, kind)] = totals.get(part_name(fact, kind), 0.0) + scores[fact.name]

    def factor(part: str) -> float:
        return max(effects[kind, part], 0.0) / totals[part] if totals[part] else 0.0

    return {fact.name: scores[fact.name] * factor(part_name(fact, kind)) for fact in facts}
