"""The measurements as rows: effect, effect per parameter and per FLOP, estimates beside them and how well those rank; table and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from tabulate import tabulate

from fp4compile.isolation.estimate import Estimate, spearman
from fp4compile.isolation.keep import Choice, choose
from fp4compile.isolation.parts import SiteFacts
from fp4compile.isolation.picture import blocks_svg, roles_svg
from fp4compile.isolation.store import read

ESTIMATES: Final = ("first_order", "first_order_magnitude", "curvature")
_SHOWN_SITES: Final = 20


@dataclass(frozen=True, kw_only=True)
class Row:
    """One part, quantized alone. Loss and KL are in nats a token; `flops` is the share of all planned matmuls'; None: not measured."""

    policy: str
    kind: str
    name: str
    matmuls: int
    parameters: int
    flops: float
    loss: float
    loss_error: float  # standard error over batches, NaN for a single one
    kl: float | None
    kl_error: float | None
    first_order: float | None  # estimates, of the sum of the part's matmuls
    curvature: float | None

    @property
    def effect(self) -> float:
        """What rows are ranked by: KL, which rounding luck moves least, or the loss where only that was measured."""
        return self.loss if self.kl is None else self.kl

    @property
    def per_parameter(self) -> float:
        """Effect per million parameters."""
        return 1e6 * self.effect / self.parameters if self.parameters else math.nan

    @property
    def per_flop(self) -> float:
        """Effect per percent of the planned FLOPs."""
        return self.effect / (100 * self.flops) if self.flops else math.nan

    @property
    def first_order_magnitude(self) -> float | None:
        return None if self.first_order is None else abs(self.first_order)


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """Spearman's rank correlation of an estimate with what was measured, over the parts of one kind."""

    policy: str
    kind: str
    estimate: str
    measured: str  # "loss" or "kl"
    parts: int
    rho: float


class Sensitivity:
    """`data` is what the store holds."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data
        self.rows: tuple[Row, ...] = tuple(row for policy in data["policies"] for row in self._rows_of(policy))

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Raises `UnreadableStore`."""
        return cls(read(Path(path)))

    @property
    def policies(self) -> tuple[str, ...]:
        return tuple(self.data["policies"])

    def facts(self, policy: str) -> list[SiteFacts]:
        return [SiteFacts(**fact) for fact in self.data["policies"][policy]["facts"]]

    def estimates(self, policy: str) -> dict[str, Estimate]:
        """By matmul."""
        return {name: Estimate(**found) for name, found in self.data["policies"][policy]["estimates"].items()}

    def rows_of(self, policy: str, kind: str) -> list[Row]:
        return [row for row in self.rows if row.policy == policy and row.kind == kind]

    def correlations(self) -> list[Correlation]:
        """Of every policy, kind of part and estimate, where at least three parts were measured."""
        found = []
        for policy in self.policies:
            for kind in ("role", "block", "site"):
                rows = [row for row in self.rows_of(policy, kind) if row.curvature is not None]
                if len(rows) < 3:
                    continue
                for estimate in ESTIMATES:
                    for measured in ("loss", "kl") if rows[0].kl is not None else ("loss",):
                        rho = spearman([getattr(row, estimate) for row in rows], [getattr(row, measured) for row in rows])
                        found.append(Correlation(policy=policy, kind=kind, estimate=estimate, measured=measured, parts=len(rows), rho=rho))
        return found

    def keep(self, share: float, *, policy: str = "") -> Choice:
        """The matmuls to leave in high precision, at most `share` of the planned FLOPs; default policy: the first one measured.

        Raises `CannotChoose`.
        """
        name = policy or self.policies[0]
        entry = self.data["policies"].get(name, {"rows": [], "facts": []})
        effects = {(row.kind, row.name): row.effect for row in self.rows if row.policy == name}
        estimates = self.estimates(name) if name in self.policies else {}
        return choose([SiteFacts(**f) for f in entry["facts"]], effects, estimates, share, policy=name)

    def to_table(self, *, full: bool = False) -> str:
        """One table a policy and kind; of single matmuls the most sensitive ones, or `full`: all."""
        parts = [_table(self.rows_of(p, k), full) for p in self.policies for k in ("all", "role", "block", "site") if self.rows_of(p, k)]
        if correlations := self.correlations():
            cells = [[c.policy, c.kind, c.estimate, c.measured, c.parts, f"{c.rho:+.2f}"] for c in correlations]
            headers = ("policy", "parts", "estimate", "against", "n", "Spearman's rho")
            parts.append(tabulate(cells, headers=headers, disable_numparse=True))
        return "\n\n".join(parts)

    def to_json(self) -> str:
        """`rows`, `correlations` and the model's loss in high precision; numbers that are not finite are null."""
        rows = [{**asdict(row), "per_parameter": row.per_parameter, "per_flop": row.per_flop} for row in self.rows]
        tables = {"rows": rows, "correlations": [asdict(c) for c in self.correlations()]}
        plain = {key: [{n: _plain(v) for n, v in row.items()} for row in table] for key, table in tables.items()}
        return json.dumps({"settings": self.data["settings"], "baseline": self.data["baseline"], **plain}, indent=1)

    def write(self, folder: str | Path, *, name: str = "sensitivity") -> None:
        """FOLDER/NAME.txt, .json, _roles.svg and _blocks.svg, the pictures where such parts were measured."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / f"{name}.txt").write_text(self.to_table(full=True) + "\n")
        (path / f"{name}.json").write_text(self.to_json() + "\n")
        if any(row.kind == "role" for row in self.rows):
            (path / f"{name}_roles.svg").write_text(roles_svg(self.rows))
        if any(row.kind == "block" for row in self.rows):
            (path / f"{name}_blocks.svg").write_text(blocks_svg(self.rows))

    def __str__(self) -> str:
        return self.to_table()

    def _rows_of(self, policy: str) -> Iterator[Row]:
        entry, facts = self.data["policies"][policy], {fact.name: fact for fact in self.facts(policy)}
        estimates, total = self.estimates(policy), sum(fact.flops for fact in facts.values())
        for row in entry["rows"]:
            sites = [facts[name] for name in row["sites"]]
            own = [estimates[name] for name in row["sites"]] if estimates else None
            (loss, loss_error), (kl, kl_error) = mean_and_error(row["loss"]), mean_and_error(row["kl"])
            yield Row(
                policy=policy, kind=row["kind"], name=row["name"], matmuls=len(sites), parameters=sum(s.parameters for s in sites),
                flops=sum(s.flops for s in sites) / total, loss=loss, loss_error=loss_error,
                kl=kl if row["kl"] else None, kl_error=kl_error if row["kl"] else None,
                first_order=sum(e.first_order for e in own) if own else None, curvature=sum(e.curvature for e in own) if own else None,
            )  # fmt: skip


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """NaN where there are too few."""
    n = len(values)
    mean = sum(values) / n if n else math.nan
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else math.nan
    return mean, error


def _table(rows: Sequence[Row], full: bool) -> str:
    kind, measured = rows[0].kind, "KL" if rows[0].kl is not None else "loss"
    shown = list(rows) if kind in ("all", "block") else sorted(rows, key=lambda row: -row.effect)
    more = "" if full or kind != "site" or len(shown) <= _SHOWN_SITES else f" (the {_SHOWN_SITES} most sensitive of {len(shown)})"
    cells = [
        [
            row.name, str(row.matmuls), f"{row.parameters / 1e6:.2f}", f"{100 * row.flops:.1f}", _with_error(row.loss, row.loss_error),
            _with_error(row.kl, row.kl_error), _number(1e3 * row.per_parameter), _number(1e3 * row.per_flop), _number(row.first_order),
            _number(row.curvature),
        ]
        for row in (shown[:_SHOWN_SITES] if more else shown)
    ]  # fmt: skip
    headers = (
        kind, "matmuls", "M params", "% FLOPs", "nats lost (s.e.)", "KL (s.e.)", f"milli {measured} / M params", "/ % FLOPs",
        "first order", "curvature",
    )  # fmt: skip
    align = ("left", *["right"] * (len(headers) - 1))
    title = f"{rows[0].policy}: {'everything' if kind == 'all' else f'one {kind} at a time'} quantized{more}"
    return f"{title}\n\n{tabulate(cells, headers=headers, disable_numparse=True, colalign=align)}"


def _with_error(value: float | None, error: float | None) -> str:
    if value is None or error is None:
        return "-"
    return f"{value:.5f}" if math.isnan(error) else f"{value:.5f} ({error:.5f})"


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3g}"


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
