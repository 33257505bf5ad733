"""Loss curves and a table of final gaps out of the logs of pretrain.py.

python examples/pretrain/plot.py runs                              # one folder
python examples/pretrain/plot.py runs/seed0 runs/seed1 runs/seed2  # and, of several seeds, means with their standard errors
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes import RECIPES
from tabulate import tabulate

from fp4compile.report.chart import Line, Panel, chart_svg

BASE = "bf16"
MEASURES = (
    ("SQNR of the operand", "dB", "sqnr_db", 1.0),
    ("SQNR of the product", "dB", "product_db", 1.0),
    ("underflow: nonzero to zero", "% of elements", "underflow", 100.0),
    ("bias of the gain", "%", "gain_bias", 100.0),
)


class NoBase(RuntimeError):
    """A folder without the run that others are held against."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Losses by tokens seen, in nats a token."""

    name: str
    train: dict[int, float]
    heldout: dict[int, float]
    speed: float  # tokens a second, median

    @classmethod
    def read(cls, folder: Path) -> Run:
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        speeds = sorted(row["speed"] for row in rows if "speed" in row)
        return cls(
            name=folder.name,
            train={row["tokens"]: row["loss"] for row in rows if "loss" in row},
            heldout={row["tokens"]: row["heldout"] for row in rows if "heldout" in row},
            speed=speeds[len(speeds) // 2] if speeds else math.nan,
        )

    def smooth(self, share: float = 0.02) -> tuple[tuple[float, float], ...]:
        """Training loss as means over `share` of the run, at least one step each."""
        points = sorted(self.train.items())
        size = max(round(share * len(points)), 1)
        groups = [points[i : i + size] for i in range(0, len(points), size)]
        return tuple((group[-1][0], sum(y for _, y in group) / len(group)) for group in groups)

    def last(self, tokens: int, share: float = 0.05) -> float:
        """Mean training loss over the last `share` of the run up to `tokens`."""
        losses = [y for x, y in sorted(self.train.items()) if x <= tokens]
        tail = losses[-max(round(share * len(losses)), 1) :]
        return sum(tail) / len(tail)


def write_comparison(out: Path) -> str:
    """Write OUT/curves.svg and OUT/table.md from the runs in OUT, and OUT/RUN/diagnosis.svg; returns the table."""
    runs = _runs(out)
    (out / "curves.svg").write_text(_curves(runs, out))
    for run in runs:
        if (out / run.name / "diagnosis").exists():
            (out / run.name / "diagnosis.svg").write_text(_diagnoses(out / run.name / "diagnosis"))
    table = _table(runs)
    (out / "table.md").write_text(table + "\n")
    return table


def _runs(out: Path) -> list[Run]:
    logs = {path.parent.name for path in out.glob("*/log.jsonl") if path.stat().st_size}
    return [Run.read(out / name) for name in (*(n for n in RECIPES if n in logs), *sorted(logs - set(RECIPES)))]


def _base(runs: Sequence[Run]) -> Run | None:
    return next((run for run in runs if run.name == BASE), None)


def _common(run: Run, base: Run) -> int | None:
    """The last number of tokens at which both were held against the held-out text."""
    return max(run.heldout.keys() & base.heldout.keys(), default=None)


def _table(runs: Sequence[Run]) -> str:
    base, rows = _base(runs), []
    for run in runs:
        at = _common(run, base or run)
        if at is None:
            rows.append([run.name, f"{max(run.train, default=0):,}", *["not comparable yet"] * 4, f"{run.speed:,.0f}"])
            continue
        heldout = [f"{run.heldout[at]:.4f}", *(_gap(run.heldout[at], base.heldout[at]) if base else ("", ""))]
        rows.append([run.name, f"{at:,}", f"{run.last(at):.4f}", *heldout, f"{run.speed:,.0f}"])
    headers = ("run", "tokens", "training loss", "held-out loss", "gap, nats", "gap", "tokens/s")
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True, colalign=("left", *["right"] * 6))


def across_seeds(folders: Sequence[Path]) -> str:
    """A row a recipe: held-out losses at the end, and gaps to the bf16 run of the same folder, which has the same seed and order of data.

    Means over the folders; in brackets the standard error of a mean. Runs that have not come to the end are left out.
    """
    losses: dict[str, list[float]] = {}
    gaps: dict[str, list[float]] = {}
    for folder in folders:
        runs = _runs(folder)
        base = _base(runs)
        if base is None or not base.heldout:
            raise NoBase(f"{folder} has no losses of {BASE}, to which gaps are taken: run pretrain.py --recipe {BASE} with its settings.")
        end = max(base.heldout)
        for run in runs:
            if end in run.heldout:
                losses.setdefault(run.name, []).append(run.heldout[end])
                gaps.setdefault(run.name, []).append(run.heldout[end] - base.heldout[end])
    lowest = statistics.mean(losses[BASE])
    rows = [
        [name, len(losses[name]), _mean(losses[name]), *(("", "") if name == BASE else (_mean(gaps[name]), _percent(gaps[name], lowest)))]
        for name in sorted(losses, key=lambda name: statistics.mean(gaps[name]))
    ]
    headers = ("run", "seeds", "held-out loss", "gap, nats", "gap")
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True, colalign=("left", *["right"] * 4))


def _mean(values: Sequence[float]) -> str:
    error = f" ({statistics.stdev(values) / math.sqrt(len(values)):.4f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{error}"


def _percent(gaps: Sequence[float], base: float) -> str:
    return f"{100 * statistics.mean(gaps) / base:+.2f}%"


def _gap(loss: float, base: float) -> tuple[str, str]:
    return f"{loss - base:+.4f}", f"{100 * (loss / base - 1):+.2f}%"


def _curves(runs: Sequence[Run], out: Path) -> str:
    panels = [
        Panel(title="training loss", x="tokens", y="nats a token", lines=tuple(Line(label=r.name, points=r.smooth()) for r in runs)),
        Panel(
            title="held-out loss",
            x="tokens",
            y="nats a token",
            lines=tuple(Line(label=r.name, points=tuple(sorted(r.heldout.items()))) for r in runs),
        ),
    ]
    base = _base(runs)
    if base is not None and len(runs) > 1:
        smooth = dict(base.smooth())
        gaps = [(r, [(x, y - smooth[x]) for x, y in r.smooth() if x in smooth]) for r in runs if r is not base]
        lines = tuple(Line(label=r.name, points=tuple(points)) for r, points in gaps)
        seen = sorted([y for _, points in gaps for _, y in points[len(points) // 5 :]] or [0.0])  # the first steps are all noise
        low, high = min(seen[len(seen) // 50], 0.0), max(seen[-1 - len(seen) // 50], 0.0)
        room = 0.1 * (high - low) or 1.0
        y_range = (low - room, high + room)
        panels.append(Panel(title=f"training loss above {BASE}", x="tokens", y="nats a token", lines=lines, y_range=y_range))
    note = out / "settings.json"
    subtitle = [", ".join(f"{k} {v}" for k, v in json.loads(note.read_text()).items())] if note.exists() else []
    return chart_svg(panels, title="Pretraining", subtitle=subtitle)


def _diagnoses(folder: Path) -> str:
    """Medians over the matmuls, for each role and operand, over the steps that were diagnosed."""
    found: dict[str, dict[int, list[dict[str, float]]]] = {}
    for path in sorted(folder.glob("step_*.json")):
        for row in json.loads(path.read_text())["rows"]:
            by_step = found.setdefault(f"{row['role']} {row['operand']}", {})
            by_step.setdefault(int(path.stem.removeprefix("step_")), []).append(row)
    panels = []
    for title, unit, field, scale in MEASURES:
        lines = []
        for kind, by_step in found.items():
            values = {step: [row[field] for row in rows if row[field] is not None] for step, rows in by_step.items()}
            points = tuple((float(step), scale * statistics.median(each)) for step, each in values.items() if each)
            lines.append(Line(label=kind, points=points))
        panels.append(Panel(title=title, x="step", y=unit, lines=tuple(lines)))
    return chart_svg(panels, title=f"Quantization during training, {folder.parent.name}", subtitle=("medians over matmuls",))


def main(argv: Sequence[str] | None = None) -> str:
    """Returns the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="+", help="the --out of pretrain.py; several: of runs that differ in their seed alone")
    args = parser.parse_args(argv)
    table = "\n\n".join(write_comparison(out) for out in args.out)
    if len(args.out) > 1:
        table += "\n\n" + across_seeds(args.out)
    print(table)
    return table


if __name__ == "__main__":
    main()
