"""The measurement: baseline, every part alone, the estimate; each stored as soon as it is known."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from tqdm import tqdm

from fp4compile.codegen.errors import Fp4CompileError
from fp4compile.isolation.estimate import Estimating
from fp4compile.isolation.loss import Loss, NoLoss, NotFinite, divergence, logits_of, next_token_loss
from fp4compile.isolation.parts import NothingPlanned, Part, Roles, SiteFacts, Survey, check_roles, parts_of
from fp4compile.isolation.planned import Batch, Call, PlannedModel, Product, exactly
from fp4compile.isolation.result import Sensitivity
from fp4compile.isolation.store import Store, settings_of
from fp4compile.policy.load import load_policy
from fp4compile.policy.rule import Policy

_KEPT_BYTES: Final = 2 << 30  # of log-probabilities in high precision; beyond, they are computed again for every part


class NoBatches(Fp4CompileError, ValueError):
    template = "sensitivity: {found}. Give at least one batch, a list of what the model is called with."


def sensitivity(
    model: Any,
    batches: Iterable[Batch],
    *,
    policies: Sequence[str | Path] = ("nvfp4", "mxfp4"),
    isolate: Sequence[str] = ("role", "block"),
    roles: Roles | None = None,
    loss: Loss | None = None,
    estimate: bool = True,
    store: str | Path | None = None,
    progress: bool = True,
) -> Sensitivity:
    """How much of the loss each part of `model` costs when it alone is quantized, under each of `policies`.

    batches: what the model is called with, each a tensor, a tuple of positional or a mapping of keyword arguments, on the model's device.
    isolate: kinds of parts, of "role" (q_proj, ...; all blocks at once), "block" and "site" (a single matmul).
    roles: names and globs on module paths, in place of the last segment of the path. loss: function of (outputs, batch), the mean loss as a
    scalar; by default that of the next token, and then the KL divergence to high precision is measured as well.
    estimate: also the first-order estimate, which takes a backward. store: JSON file written after every part, and read at the start.

    Each policy's graph is captured once; parts are run operator by operator. Raises `NoBatches`, `NoLoss`, `NotFinite`, `ModelTrains`,
    `NothingPlanned`, `RoleMatchesNothing`, `OtherRun`, and what `load_policy` raises.
    """
    batches = list(batches)
    if not batches:
        raise NoBatches(found="no batches")
    for i, batch in enumerate(batches):
        if any(not x.numel() for x in _tensors(batch)):
            raise NoBatches(found=f"batch {i} holds a tensor without elements")
    kept = Store(Path(store) if store is not None else None, settings_of(model, batches, loss or next_token_loss, roles))
    for name in policies:
        policy = load_policy(name)
        entry = kept.policy(policy.name, policy.fingerprint())
        runner = _Run(model=model, batches=batches, policy=policy, entry=entry, store=kept, loss=loss, roles=roles)
        runner.measure(isolate, estimate, progress)
    return Sensitivity(kept.data)


@dataclass(kw_only=True)
class _Run:
    """One policy. `entry` is its part of the store's data."""

    model: Any
    batches: list[Batch]
    policy: Policy
    entry: dict[str, Any]
    store: Store
    loss: Loss | None
    roles: Roles | None
    planned: PlannedModel = field(init=False)
    base: dict[int, Tensor] = field(default_factory=dict)  # log-probabilities in high precision, by batch

    def __post_init__(self) -> None:
        self.planned = PlannedModel(self.model, self.policy)

    def measure(self, isolate: Sequence[str], estimate: bool, progress: bool) -> None:
        self._survey()
        facts = [SiteFacts(**fact) for fact in self.entry["facts"]]
        done = {(row["kind"], row["name"]) for row in self.entry["rows"]}
        todo = [part for part in parts_of(facts, isolate) if (part.kind, part.name) not in done]
        estimating = estimate and not self.entry["estimates"]
        with tqdm(total=(len(todo) + estimating) * len(self.batches), unit="batch", disable=not progress) as bar:
            for part in todo:
                bar.set_description(f"{self.policy.name}: {part.kind} {part.name}")
                self.entry["rows"].append(self._row(part, bar))
                self.store.save()
            if estimating:
                bar.set_description(f"{self.policy.name}: first order")
                self._estimate(bar)

    def _survey(self) -> None:
        """The sites and the loss in high precision. Raises `NothingPlanned`, `RoleMatchesNothing`."""
        base = self.store.data["baseline"]
        if self.entry["facts"] and base:
            return
        survey = Survey(roles=self.roles, found={})
        base["loss"] = list(self._losses(survey, "the model in high precision"))
        facts = list(survey.found.values())
        if not facts:
            sites = sum(len(graph.sites) for graph in self.planned.graphs)
            raise NothingPlanned(policy=self.policy.name, found=f"{sites} matmuls, all in high precision")
        check_roles(self.roles, facts)
        self.entry["facts"] = [asdict(fact) for fact in facts]
        self.store.save()

    def _losses(self, product: Product, where: str) -> Iterator[float]:
        for i, batch in enumerate(self.batches):
            yield self._loss(self.planned(batch, product), batch, i, where).item()

    def _loss(self, outputs: Any, batch: Batch, index: int, where: str) -> Tensor:
        """Raises `NoLoss` or `NotFinite`."""
        found = (self.loss or next_token_loss)(outputs, batch)
        if not isinstance(found, Tensor) or found.numel() != 1:
            raise NoLoss(needed="a scalar tensor from `loss`", batch=type(batch).__name__, found=f"{type(found).__name__}")
        if not math.isfinite(found.item()):
            raise NotFinite(what="loss", where=where, found=found.item(), batch=index)
        return found

    def _row(self, part: Part, bar: tqdm[Any]) -> dict[str, Any]:
        def product(call: Call) -> Tensor:
            return call.quantized() if call.site.name in part.sites else call.exact()

        where = f"{part.kind} {part.name} under {self.policy.name}"
        losses, divergences = [], []
        for i, batch in enumerate(self.batches):
            outputs = self.planned(batch, product)
            losses.append(self._loss(outputs, batch, i, where).item() - self.store.data["baseline"]["loss"][i])
            if self.loss is None:
                logits = logits_of(outputs)
                assert logits is not None, "the next-token loss has read them"
                divergences.append(divergence(self._base(i), logits).item())
            bar.update()
        return {"kind": part.kind, "name": part.name, "sites": sorted(part.sites), "loss": losses, "kl": divergences}

    def _base(self, index: int) -> Tensor:
        if index in self.base:
            return self.base[index]
        logits = logits_of(self.planned(self.batches[index], exactly))
        assert logits is not None, "the next-token loss has read them"
        base = logits.float().log_softmax(-1)
        if sum(x.numel() for x in self.base.values()) * 4 + base.numel() * 4 <= _KEPT_BYTES:
            self.base[index] = base
        return base

    def _estimate(self, bar: tqdm[Any]) -> None:
        estimating = Estimating()
        for i, batch in enumerate(self.batches):
            outputs = self.planned(batch, estimating, grad=True)
            with torch.enable_grad():
                self._loss(outputs, batch, i, "the model in high precision").backward()
            bar.update()
        self.entry["estimates"] = {name: asdict(found) for name, found in estimating.of(len(self.batches)).items()}
        self.store.save()


def _tensors(batch: Batch) -> list[Tensor]:
    values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, tuple) else (batch,)
    return [x for x in values if isinstance(x, Tensor)]
