"""Results as tables and sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final

from tabulate import tabulate

from fp4compile.bench.case import MatmulCase, QuantizeCase
from fp4compile.bench.peers import BASELINE
from fp4compile.bench.results import OURS, Results, Row

_NOTHING: Final = "-"


def as_text(results: Results, style: str = "simple") -> str:
    """Everything that was measured: a head, a table a kind, and why some figures are missing. `style` is one of tabulate's."""
    rows = list(results.rows.values())
    head = [str(results.environment), f"{results.started}{_clocks(results)}", f"floor from {results.speeds}" if results.speeds else ""]
    tables = [_table(kind, [row for row in rows if row.kind == kind], style) for kind in dict.fromkeys(row.kind for row in rows)]
    return "\n\n".join(part for part in ("\n".join(line for line in head if line), *tables, _missing(rows)) if part)


def _table(kind: str, rows: Sequence[Row], style: str) -> str:
    make = {"matmul": _matmul_table, "grouped": _matmul_table, "quantize": _quantize_table, "layer": _layer_table}[kind]
    lines, headers = make(rows)
    text = tabulate(lines, headers=headers, tablefmt=style, disable_numparse=True, colalign=["left", *["right"] * (len(headers) - 1)])
    return f"{_TITLES[kind]}\n\n{text}"


_TITLES: Final = {
    "matmul": "Products, microseconds: ours, how many times as fast as bf16 and as the best other, share of the floor reached, the others",
    "grouped": "Grouped products, as the first table; M rows in all, split unevenly; bf16 is torch._grouped_mm",
    "quantize": "Quantize of bfloat16, microseconds, and the share of the copy bandwidth reached on the bytes that must move",
    "layer": "Decoder layers through torch.compile, microseconds a call, against bf16 in the same mode",
}


def _matmul_table(rows: Sequence[Row]) -> tuple[list[list[str]], list[str]]:
    peers = list(dict.fromkeys(name for row in rows for name in (*row.times, *row.failed) if name != OURS))
    lines = []
    for row in rows:
        case, ours = MatmulCase(**row.case), row.times.get(OURS)
        others = [time for name, time in row.times.items() if name != OURS]
        error = f"{row.errors['float32']:.1e}" if "float32" in row.errors else _NOTHING
        lines.append([
            case.weight, case.scheme, str(case.m), "WRONG" if row.wrong else _time(ours), _times(row.times.get(BASELINE), ours),
            _times(min(others, default=None), ours), _share(row.floor, ours),
            *(_time(row.times.get(peer)) for peer in peers), _time(row.floor or None), error,
        ])  # fmt: skip
    return lines, ["N x K", "scheme", "M", "ours", "x bf16", "x best", "of floor", *peers, "floor", "error"]


def _quantize_table(rows: Sequence[Row]) -> tuple[list[list[str]], list[str]]:
    lines = []
    for row in rows:
        case, ours = QuantizeCase(**row.case), row.times.get(OURS)
        time = "WRONG" if row.wrong else _time(ours)
        lines.append([f"{case.rows} x {case.columns}", case.scheme, time, _share(row.floor, ours), _time(row.times.get("copy"))])
    return lines, ["tensor", "how", "ours", "of copy bandwidth", "copy of the input"]


def _layer_table(rows: Sequence[Row]) -> tuple[list[list[str]], list[str]]:
    base = {_setting(row): row.times[BASELINE] for row in rows if BASELINE in row.times}
    lines = []
    for row in rows:
        time = next(iter(row.times.values()), None)
        ratio = _times(base.get(_setting(row)), time) if row.case["policy"] != BASELINE else ""
        notes = row.notes
        covered = f"{notes['quantized']} of {notes['matmuls']}" if "quantized" in notes else ""
        megabytes = f"{notes['weight_bytes'] / 1e6:.0f}" if "weight_bytes" in notes else _NOTHING
        lines.append([
            f"{row.case['model']} x{row.case['layers']}", row.case["phase"], str(row.case["tokens"]), row.case["mode"], row.case["policy"],
            "WRONG" if row.wrong else _time(time), ratio, _share(row.floor, time), covered, megabytes,
            f"{notes['compile_seconds']:.1f}" if "compile_seconds" in notes else _NOTHING,
        ])  # fmt: skip
    headers = ["layers", "phase", "tokens", "mode", "policy", "us", "x bf16", "of floor", "4-bit matmuls", "weights, MB", "compile, s"]
    return lines, headers


def _setting(row: Row) -> tuple[Any, ...]:
    return tuple(row.case[name] for name in ("model", "phase", "mode", "tokens", "layers"))


def _missing(rows: Iterable[Row]) -> str:
    """One line a reason, with the number of cases it stands for; what is wrong comes first, with its case."""
    rows = list(rows)
    wrong = [f"WRONG, and not timed: {row.key}: {row.wrong}" for row in rows if row.wrong]
    reasons = Counter((name, reason) for row in rows for name, reason in row.failed.items())
    failed = [f"{name}, {count} case{'s' * (count > 1)}: {reason}" for (name, reason), count in reasons.items()]
    return "\n".join([*wrong, *failed])


def _clocks(results: Results) -> str:
    return "".join(f", {name} {value}" for name, value in results.clocks.items())


def _time(microseconds: float | None) -> str:
    if microseconds is None:
        return _NOTHING
    return f"{microseconds:.2f}" if microseconds < 10 else f"{microseconds:.1f}" if microseconds < 1000 else f"{microseconds:.0f}"


def _times(theirs: float | None, ours: float | None) -> str:
    return f"{theirs / ours:.2f}x" if theirs and ours else _NOTHING


def _share(floor: float, time: float | None) -> str:
    return f"{floor / time:.0%}" if floor and time else _NOTHING
