"""What a policy left to calibration, filled in for each matmul of a graph: an amax, or the name of the second moments of its input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from torch import Tensor, fx

from fp4compile.calibration.check import check_weight
from fp4compile.calibration.record import Calibration, LayerStatistics, MissingStatistics
from fp4compile.codegen.formats import QuantConfig, Rounding
from fp4compile.codegen.statistics import InputMoments, remember
from fp4compile.codegen.target import Target
from fp4compile.passes.assign_precision import plan_for
from fp4compile.passes.match import root_parameters
from fp4compile.passes.site import Decision, Operand, OperandKind, Site, input_of


@dataclass(frozen=True, kw_only=True)
class Resolver:
    """One graph's decisions against one artefact. `names` and `values` are of its parameters, by flat input position."""

    calibration: Calibration
    target: Target
    names: Mapping[int, str]
    values: Mapping[int, Tensor]

    def resolve(self, sites: Sequence[Site], decisions: Sequence[Decision]) -> list[Decision]:
        """The decisions, in which no config needs statistics any more where it will be used.

        Raises `MissingStatistics`, `AnotherModel` or `StaleCalibration`, which name the layer.
        """
        pairs = list(zip(sites, decisions, strict=True))
        calibrated = [self._is_used(site, decision) for site, decision in pairs]
        readers: dict[Any, list[Site]] = {}
        for (site, _), used in zip(pairs, calibrated, strict=True):
            if used:
                self._check(site)
                readers.setdefault(_place(_weight(site)), []).append(site)
        return [
            self._with_statistics(decision, site, readers) if used else decision
            for (site, decision), used in zip(pairs, calibrated, strict=True)
        ]

    def _is_used(self, site: Site, decision: Decision) -> bool:
        needs = decision.outliers is not None or any(config.needs_statistics for config in decision.configs.values())
        return needs and plan_for(site, decision, self.target)[0].quantizes

    def _with_statistics(self, decision: Decision, site: Site, readers: Mapping[Any, list[Site]]) -> Decision:
        configs = dict(decision.configs)
        for kind, config in decision.configs.items():
            if not config.needs_statistics:
                continue
            if kind is OperandKind.WEIGHT:
                in_order = decision.sorts_channels and decision.outliers is not None
                configs[kind] = replace(config, calibration=self._moments(readers[_place(_weight(site))], config, sorts_channels=in_order))
            else:
                configs[kind] = replace(config, static_amax=self._amax(site.name, config.hadamard), calibration="")
        return replace(decision, configs=configs)

    def _amax(self, site: str, rotation: int) -> float:
        found = self.calibration.statistics_for(site)
        if rotation and rotation not in found.rotated_amax:
            raise MissingStatistics(
                site=site,
                found=f"{self.calibration.name} has no amax of its input after hadamard = {rotation}",
                advice="Calibrate for this policy: `fp4compile calibrate MODEL.py --policy POLICY.toml`.",
            )
        amax = found.rotated_amax[rotation] if rotation else found.amax
        if amax == 0:
            raise MissingStatistics(
                site=site,
                found=f"its input was zero throughout when {self.calibration.name} was calibrated",
                advice='Calibrate with other batches, or give it global_scale = "tensor".',
            )
        return amax

    def _moments(self, readers: Sequence[Site], config: QuantConfig, *, sorts_channels: bool) -> str:
        """The key of the moments of all that one weight is multiplied with: a layer that is called twice has one weight."""
        names = list(dict.fromkeys(site.name for site in readers))
        found = [self.calibration.statistics_for(name) for name in names]
        distinct = list({id(statistics): statistics for statistics in found}.values())
        statistics = reduce(LayerStatistics.merged, distinct)
        if statistics.moments is None and needs_all_moments(config, sorts_channels=sorts_channels):
            beside = " beside arc with reorder = true" if sorts_channels else ""
            raise MissingStatistics(
                site=names[0],
                found=f"{self.calibration.name} holds the moments of its input in blocks of 16 channels, "
                f"and {config.describe()}{beside} needs all",
                advice='Calibrate with moments = "full", or for this policy: `fp4compile calibrate MODEL.py --policy POLICY.toml`.',
            )
        print_ = self.calibration.operands.get(names[0])
        checksum = print_.checksum if print_ is not None else None
        # Weights that share an input share its numbers, not the name: each has its own checksum.
        key = f"{names[0]}@{statistics.digest[:16]}{'' if checksum is None else f'-{checksum & 0xFFFFFFFF:08x}'}"
        moments = InputMoments(
            site=names[0], calibration=self.calibration.name, blocks=statistics.block_moments, full=statistics.moments, checksum=checksum
        )
        remember(key, moments)
        return key

    def _check(self, site: Site) -> None:
        for root in root_parameters(_weight(site).source):
            position = input_of(root)
            if position is not None and position in self.names:
                check_weight(self.calibration, site.name, self.names[position], self.values.get(position))


def needs_all_moments(config: QuantConfig, *, sorts_channels: bool) -> bool:
    """Blocks of 16 channels are enough for scales, unless a rotation mixes more of them or `arc` makes blocks of others."""
    return config.rounding is Rounding.GPTQ or (config.needs_moments and (config.hadamard > 16 or sorts_channels))


def _weight(site: Site) -> Operand:
    operand = next((o for o in (site.rhs, site.lhs) if o is not None and o.kind is OperandKind.WEIGHT), None)
    assert operand is not None, "what is calibrated is the forward of a layer"
    return operand


def _place(operand: Operand) -> tuple[fx.Node, int]:
    return operand.source, operand.axis
