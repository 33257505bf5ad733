"""What a compilation did and why, as a view over its records that answers "why not FP4 here?" at a glance."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from fp4compile.passes.record import GraphRecord, SiteDecision
from fp4compile.report import render
from fp4compile.report.coverage import Coverage, Fallback, coverage_of, fallbacks_of


@dataclass(frozen=True, kw_only=True)
class Report:
    """All graphs compiled (or, from `explain`, all that would be) and every matmul in them. `print(report)` shows it."""

    graphs: tuple[GraphRecord, ...]

    @classmethod
    def of(cls, graphs: Iterable[GraphRecord]) -> Report:
        return cls(graphs=tuple(graphs))

    @property
    def sites(self) -> tuple[SiteDecision, ...]:
        """One row a matmul: name, role, op, m, n, k, precision, rule, reason, kernel, bytes_before, bytes_after, fallback."""
        return tuple(row for graph in self.graphs for row in graph.sites)

    @property
    def coverage(self) -> Coverage:
        """Counts of matmuls by what became of them, and the shares of operations and weight bytes that got 4 bits."""
        return coverage_of(self.graphs)

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        """Matmuls that could not follow the policy, grouped by reason."""
        return fallbacks_of(self.graphs)

    def to_table(self, *, folded: bool = True) -> str:
        """Plain text for a terminal. `folded` writes equal layers once: `model.layers.{0..29}.mlp.up_proj x30`."""
        return render.as_text(self.graphs, folded=folded)

    def to_markdown(self, *, folded: bool = True, stable: bool = False) -> str:
        """The same as Markdown. `stable` leaves out what differs between two runs of one program: times and folders."""
        return render.as_markdown(self.graphs, folded=folded, stable=stable)

    def to_json(self, *, stable: bool = False) -> str:
        """Everything, as JSON: `graphs` with `sites` and `passes`, `coverage`, `fallbacks`. Sizes are text, bytes are numbers."""
        content = {
            "coverage": asdict(self.coverage),
            "fallbacks": [asdict(f) for f in self.fallbacks],
            "graphs": [_graph_fields(graph, stable) for graph in self.graphs],
        }
        return json.dumps(content, indent=2)

    def __str__(self) -> str:
        return self.to_table()


def _graph_fields(graph: GraphRecord, stable: bool) -> dict[str, Any]:
    fields = asdict(graph)
    if stable:
        del fields["dump"]
        for each in fields["passes"]:
            del each["milliseconds"]
    return fields
