"""The scaled products of a transformed graph whose sizes are known, as searches over tiles want them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from fp4compile.codegen import ops
from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.kernel_spec import KernelSpec
from fp4compile.passes.assign_precision import kernel_spec
from fp4compile.passes.site import fake_of, plan_of, site_of

_BATCHED = ("bmm", "baddbmm")


@dataclass(frozen=True, kw_only=True)
class ProductShape:
    """`m` rows times a weight (n, k); what runs it depends on `spec`."""

    spec: KernelSpec
    m: int
    n: int
    k: int


def static_products(gm: fx.GraphModule) -> list[ProductShape]:
    """Each `fp4::scaled_mm` by one matrix, of known size, once, in the order of the graph."""
    found: dict[ProductShape, None] = {}
    for node in gm.graph.nodes:
        site, plan = site_of(node), plan_of(node)
        if node.target is not ops.SCALED_MM or site is None or plan is None:
            continue
        out, k = fake_of(node), _size(node.args[7])
        if site.op in _BATCHED or not all(isinstance(size, int) for size in (*out.shape, k)):
            continue
        spec = kernel_spec(site, plan)
        spec = replace(spec, lhs=_without_values(spec.lhs), rhs=_without_values(spec.rhs))
        found[ProductShape(spec=spec, m=out.shape[:-1].numel(), n=out.shape[-1], k=k)] = None
    return list(found)


def _without_values(config: QuantConfig | None) -> QuantConfig | None:
    """What calibration gave this layer alone is no concern of a kernel."""
    if config is None:
        return None
    amax = None if config.static_amax is None else 1.0
    return replace(config, static_amax=amax, calibration="of a layer" if config.calibration else "")


def _size(argument: Any) -> Any:
    return fake_of(argument) if isinstance(argument, fx.Node) else argument
