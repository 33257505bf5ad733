"""A diagnosis as data: one row for each quantized operand of each matmul; as table, JSON and picture."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from tabulate import tabulate

from fp4compile.diagnosis.watch_graph import OperandFound
from fp4compile.report.chart import Line, Panel, chart_svg

_ROLES: Final = ("fprop", "dgrad", "wgrad", "matmul")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One quantized operand of one matmul. Shares are between 0 and 1; README of the fields: docs/diagnosis.md."""

    matmul: str
    role: str
    operand: str  # activation, weight, gradient
    quantized: str  # as in the report: nvfp4+sr+h16
    depth: int
    calls: int
    elements: int
    not_finite: int
    amax: float
    underflow: float
    saturation: float
    clipped_maxima: float
    clipped_by: float
    flushed_blocks: float
    sqnr_db: float
    bias: float
    gain_bias: float
    gain_error: float
    product_db: float

    @classmethod
    def of(cls, found: OperandFound) -> Row:
        sums = found.sums
        return cls(
            matmul=found.site.name,
            role=str(found.site.role),
            operand=str(found.operand.kind),
            quantized=found.config.describe(),
            depth=found.site.depth,
            calls=sums.calls,
            elements=int(sums.elements),
            not_finite=int(sums.not_finite),
            amax=sums.amax,
            underflow=sums.underflow,
            saturation=sums.saturation,
            clipped_maxima=sums.clipped_maxima,
            clipped_by=sums.clipped_by,
            flushed_blocks=sums.flushed_blocks,
            sqnr_db=sums.sqnr_db,
            bias=sums.bias,
            gain_bias=sums.gain_bias,
            gain_error=sums.gain_error,
            product_db=found.product_db,
        )

    @property
    def kind(self) -> str:
        return f"{self.role} {self.operand}"


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What one step showed. `print(diagnosis)` says the typical and the worst; `rows` holds everything."""

    policy: str
    draws: int
    rows: tuple[Row, ...]

    @classmethod
    def of(cls, policy: str, draws: int, found: Iterable[OperandFound]) -> Diagnosis:
        rows = sorted(map(Row.of, found), key=lambda r: (_ROLES.index(r.role), r.depth, r.matmul, r.operand))
        return cls(policy=policy, draws=draws, rows=tuple(rows))

    def kinds(self) -> dict[str, list[Row]]:
        """Rows by role and operand."""
        by_kind: dict[str, list[Row]] = {}
        for row in self.rows:
            by_kind.setdefault(row.kind, []).append(row)
        return by_kind

    def to_table(self, *, full: bool = False) -> str:
        """Medians of each role and operand and its matmul of least SQNR; `full`: every operand of every matmul."""
        if full:
            cells = [[row.matmul, row.role, row.operand, row.quantized, *_numbers([row])] for row in self.rows]
            return tabulate(cells, headers=("matmul", "role", "operand", "as", *_HEADERS), disable_numparse=True, colalign=_align(4))
        cells = []
        for kind, rows in self.kinds().items():
            worst = min(rows, key=_sqnr)
            cells.append([kind, rows[0].quantized, str(len(rows)), *_numbers(rows), f"{worst.matmul} {worst.sqnr_db:.1f} dB"])
        headers = ("operand", "as", "n", *_HEADERS, "least SQNR")
        title = f"policy {self.policy}, medians over matmuls, {self.draws} draws of stochastic operands"
        table = tabulate(
            cells, headers=headers, disable_numparse=True, colalign=("left", "left", "right", *["right"] * len(_HEADERS), "left")
        )
        return f"{title}\n\n{table}"

    def to_json(self) -> str:
        """`policy`, `draws` and `rows`; numbers that are not finite are null."""
        rows = [{name: _plain(value) for name, value in asdict(row).items()} for row in self.rows]
        return json.dumps({"policy": self.policy, "draws": self.draws, "rows": rows}, indent=1)

    def to_svg(self, *, title: str = "Quantization, matmul by matmul") -> str:
        """Each measure over the depth of the matmul in the model, one line for each role and operand."""
        panels = []
        for name, unit, field, scale in _PANELS:
            lines = tuple(self._line(kind, rows, field, scale) for kind, rows in self.kinds().items())
            panels.append(Panel(title=name, x="matmul, in forward order", y=unit, lines=lines))
        return chart_svg(panels, title=title, subtitle=(f"policy {self.policy}, {self.draws} draws of stochastic operands",))

    def _line(self, kind: str, rows: Sequence[Row], field: str, scale: float) -> Line:
        return Line(label=kind, points=tuple((float(row.depth), scale * getattr(row, field)) for row in rows))

    def write(self, folder: str | Path, *, name: str = "diagnosis") -> None:
        """FOLDER/NAME.txt, .json and .svg."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / f"{name}.txt").write_text(f"{self.to_table()}\n\n{self.to_table(full=True)}\n")
        (path / f"{name}.json").write_text(self.to_json() + "\n")
        (path / f"{name}.svg").write_text(self.to_svg(title=name))

    def __str__(self) -> str:
        return self.to_table()


_PANELS: Final = (
    ("SQNR of the operand", "dB", "sqnr_db", 1.0),
    ("SQNR of the product", "dB", "product_db", 1.0),
    ("underflow: nonzero to zero", "% of elements", "underflow", 100.0),
    ("saturation", "% of elements", "saturation", 100.0),
    ("clipped block maxima", "% of blocks", "clipped_maxima", 100.0),
    ("bias of the gain", "%", "gain_bias", 100.0),
)
_HEADERS: Final = ("SQNR dB", "product dB", "underflow", "saturated", "clipped maxima", "by", "flushed", "gain bias", "+-", "bias")


def _numbers(rows: Sequence[Row]) -> list[str]:
    middle = {name: statistics.median(getattr(row, name) for row in rows) for name in _SHOWN}
    decibels = [f"{middle[name]:.2f}" for name in ("sqnr_db", "product_db")]
    shares = [f"{100 * middle[name]:.2f}%" for name in ("underflow", "saturation", "clipped_maxima", "clipped_by", "flushed_blocks")]
    signed = [f"{100 * middle['gain_bias']:+.3f}%", f"{100 * middle['gain_error']:.3f}%", f"{100 * middle['bias']:+.3f}%"]
    return [*decibels, *shares, *signed]


_SHOWN: Final = (
    "sqnr_db", "product_db", "underflow", "saturation", "clipped_maxima", "clipped_by", "flushed_blocks", "gain_bias", "gain_error", "bias",
)  # fmt: skip


def _align(names: int) -> tuple[str, ...]:
    return tuple(["left"] * names + ["right"] * len(_HEADERS))


def _sqnr(row: Row) -> float:
    return row.sqnr_db if not math.isnan(row.sqnr_db) else math.inf


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
