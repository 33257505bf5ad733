"""Ask the policy about each site and hold its answer against what the site and the kernels can do.

mm with a Site  ->  the same, with a Plan: one quantization config an operand, the rule and the reason
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.kernel_spec import KernelSpec, Unsupported
from fp4compile.codegen.registry import kernel_for
from fp4compile.codegen.target import Target
from fp4compile.passes.base import Pass, PassContext, PassResult
from fp4compile.passes.errors import SiteFellBack
from fp4compile.passes.record import SiteDecision
from fp4compile.passes.site import Decision, Operand, Plan, Role, Site, Size, fake_of, set_plan, site_of


@dataclass(frozen=True)
class AssignPrecision(Pass):
    """Needs: sites. Leaves: a Plan on each, and a row in the report. Under `strict` a site that cannot follow the policy is an error."""

    name: ClassVar[str] = "assign-precision"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        sites = {node: site for node in gm.graph.nodes if (site := site_of(node)) is not None}
        decisions = ctx.decide(list(sites.values()))
        planned = 0
        for (node, site), decision in zip(sites.items(), decisions, strict=True):
            plan, fell_back = plan_for(site, decision, ctx.target)
            if fell_back and ctx.strict:
                raise SiteFellBack(site=site.name, role=site.role, rule=decision.rule, reason=plan.reason)
            set_plan(node, plan)
            ctx.record.sites.append(_row(site, plan, fell_back, ctx.target))
            planned += plan.quantizes
        return PassResult(changed=planned, notes=(f"{planned} of {len(sites)} matmuls get 4 bits",))


def plan_for(site: Site, decision: Decision, target: Target) -> tuple[Plan, bool]:
    """The plan, and whether the policy asked for 4 bits that this site cannot have."""
    untouched = Plan(lhs=None, rhs=None, rule=decision.rule, reason=decision.reason, dequantized=decision.dequantized)
    if not decision.configs:
        # Decoded values need no blocks along this contraction: what refuses to be quantized may still read them.
        return (untouched if not site.refusal or decision.dequantized else Plan(lhs=None, rhs=None, rule="", reason=site.refusal)), False
    if site.refusal or site.lhs is None or site.rhs is None:
        wanted = site.role is not Role.MATMUL or site.lhs is not None  # attention's fused operator is no broken promise
        return Plan(lhs=None, rhs=None, rule=decision.rule, reason=site.refusal), wanted and not site.is_empty
    plan = Plan(
        lhs=_config(decision, site.lhs), rhs=_config(decision, site.rhs), rule=decision.rule, reason=decision.reason,
        outliers=decision.outliers, sorts_channels=decision.sorts_channels,
    )  # fmt: skip
    if not plan.quantizes:
        return untouched, False
    kernel = kernel_for(kernel_spec(site, plan), target)
    if isinstance(kernel, Unsupported):
        return Plan(lhs=None, rhs=None, rule=decision.rule, reason=kernel.reason), True
    return plan, False


def kernel_spec(site: Site, plan: Plan) -> KernelSpec:
    op = "scaled_grouped_mm" if site.op == "_grouped_mm" else "scaled_mm"
    return KernelSpec(op=op, lhs=plan.lhs, rhs=plan.rhs, dtype=site.dtype)


def _config(decision: Decision, operand: Operand) -> QuantConfig | None:
    return decision.configs.get(operand.kind)


def _row(site: Site, plan: Plan, fell_back: bool, target: Target) -> SiteDecision:
    kernel = kernel_for(kernel_spec(site, plan), target) if plan.quantizes else ""
    before, after = _weight_bytes(site, plan)
    return SiteDecision(
        name=site.name,
        role=str(site.role),
        op=site.op,
        m=_text(site.m if site.batch == 1 else site.batch * site.m),
        n=_text(site.n),
        k=_text(site.k),
        precision=precision_text(site, plan),
        rule=plan.rule,
        reason=plan.reason,
        operands=operands_text(plan),
        kernel=kernel if isinstance(kernel, str) else "",
        bytes_before=before,
        bytes_after=after,
        fallback=fell_back,
        extra_k=plan.outliers.count if plan.outliers else 0,
    )


def precision_text(site: Site, plan: Plan) -> str:
    return plan.precision if plan.quantizes else str(site.dtype).removeprefix("torch.")


def operands_text(plan: Plan) -> str:
    """What the two operands get beyond plain blocks and nearest rounding, left factor first, and how many channels both get twice."""
    given = [config for config in (plan.lhs, plan.rhs) if config is not None]
    plain = all(config.describe() == given[0].format for config in given)
    both = "" if plain else " x ".join("high" if config is None else config.describe() for config in (plan.lhs, plan.rhs))
    return ", ".join(part for part in (both, plan.outliers.describe() if plan.outliers else "") if part)


def _text(size: Size) -> str:
    return str(size)


def _weight_bytes(site: Site, plan: Plan) -> tuple[int, int]:
    """Bytes of the site's weight in its own dtype, and as codes, scales and global scale. Forward only: the backward reads the same."""
    pairs: tuple[tuple[Operand | None, QuantConfig | None], ...] = ((site.lhs, plan.lhs), (site.rhs, plan.rhs))
    measure: Callable[[Operand], int] = lambda o: fake_of(o.source).numel() * fake_of(o.source).element_size()  # noqa: E731
    for operand, config in pairs:
        if operand is None or operand.kind != "weight" or site.role != "fprop":
            continue
        before = int(measure(operand))
        if config is None:
            return before, before
        values = before // fake_of(operand.source).element_size()
        twice = values // int(site.k) * plan.outliers.count if plan.outliers else 0
        return before, int((values + twice) * config.fmt.bits_per_value / 8) + 4
    return 0, 0
