"""One row of the demo: a policy, what was measured of the model compiled with it, and how rows are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from fp4compile.demo.measure import Generation, TextScore, loss_increase


@dataclass(frozen=True, kw_only=True)
class Row:
    """`policy` is empty for the baseline. `weight_bytes` are the parameters as compiled code reads them."""

    name: str
    policy: str
    weight_bytes: int
    text: TextScore
    generation: Generation | None


def quality_table(rows: Sequence[Row]) -> str:
    """Loss and size against the first row."""
    lines = []
    for row in rows:
        increase, error = loss_increase(row.text, rows[0].text)
        change = "" if row is rows[0] else f"{increase:+.4f} ({error:.4f})"
        ratio = "" if row is rows[0] else f"{rows[0].weight_bytes / row.weight_bytes:.2f}x"
        lines.append([row.name, f"{row.text.perplexity:.2f}", change, f"{row.weight_bytes / 1e6:.1f}", ratio])
    return tabulate(lines, headers=["", "perplexity", "loss per token (s.e.)", "weights, MB", "smaller"], **_style(5))


def speed_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        made = row.generation
        compile_seconds = row.text.first_seconds + (made.first_seconds if made else 0)
        decode = f"{made.tokens_per_second:.1f}" if made else "-"
        lines.append([row.name, f"{row.text.steady_seconds * 1e3:.0f}", decode, f"{compile_seconds:.0f}"])
    return tabulate(lines, headers=["", "prefill of 512, ms", "decode, tokens/s", "compile, s"], **_style(4))


def as_json(row: Row, baseline: Row) -> dict[str, Any]:
    increase, error = loss_increase(row.text, baseline.text)
    made = row.generation
    return {
        "name": row.name,
        "policy": row.policy,
        "perplexity": row.text.perplexity,
        "loss_increase": increase,
        "loss_increase_standard_error": error,
        "weight_bytes": row.weight_bytes,
        "prefill_seconds": row.text.steady_seconds,
        "prefill_first_seconds": row.text.first_seconds,
        "decode_tokens_per_second": made.tokens_per_second if made else None,
        "decode_first_seconds": made.first_seconds if made else None,
        "generated": made.text if made else None,
    }


def _style(columns: int) -> dict[str, Any]:
    return {"disable_numparse": True, "colalign": ("left", *["right"] * (columns - 1))}
