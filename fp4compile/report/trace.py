"""Where users of torch.compile look already: `TORCH_LOGS="+fp4compile"` and tlparse reports show the graph before and after our passes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from torch import fx
from torch._logging import trace_structured

from fp4compile.passes.printer import print_graph
from fp4compile.passes.record import GraphRecord, PassRecord
from fp4compile.report.report import Report

log = logging.getLogger(__name__)


def trace_graph(name: str, text: Callable[[], str]) -> None:
    """Show `text()` under `name` in a tlparse report and in the debug log. It is called only where one of the two is switched on."""
    trace_structured("artifact", metadata_fn=lambda: {"name": f"fp4compile_{name}", "encoding": "string"}, payload_fn=text)
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s\n%s", name, text())


class Trace:
    """Watches a run of the passes; `start` and `finish` frame it."""

    def start(self, graph_id: str, gm: fx.GraphModule, parameters: Mapping[int, str] | None = None) -> None:
        self._gm, self._parameters = gm, parameters
        trace_graph("captured", lambda: print_graph(gm, title=f"graph {graph_id}, captured", parameters=parameters))

    def after_pass(self, index: int, record: PassRecord, gm: fx.GraphModule) -> None:
        self._gm = gm
        log.debug("%d %s: %d changed in %.1f ms %s", index, record.name, record.changed, record.milliseconds, "; ".join(record.notes))

    def finish(self, record: GraphRecord, policy_text: str) -> None:
        trace_graph("transformed", lambda: print_graph(self._gm, title=f"graph {record.id}, after the passes", parameters=self._parameters))
        trace_graph("policy", lambda: policy_text)
        trace_graph("report", Report(graphs=(record,)).to_table)
