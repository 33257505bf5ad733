"""Graphs after the real pipeline, for what shows them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fp4compile.codegen.target import target_of
from fp4compile.passes.base import PassContext
from fp4compile.passes.pipeline import PIPELINE, run
from fp4compile.passes.record import GraphRecord
from fp4compile.passes.site import is_backward
from fp4compile.policy.load import load_policy
from tests.captured_graphs import Captured


def transform(captured: Captured, policy: Any = "nvfp4", *, instruments: tuple[Any, ...] = ()) -> tuple[fx.GraphModule, GraphRecord]:
    """Run all passes over the captured graph, in place, watched by `instruments`."""
    gm = captured.gm
    training = any(is_backward(n) for n in gm.graph.nodes)
    target = target_of(torch.device("cpu"))
    loaded = load_policy(policy).resolve_for(target)
    record = GraphRecord(id="0/0", training=training, target=target.name, policy=loaded.name)
    ctx = PassContext(
        decide=lambda sites: loaded.decide(sites, training=training), target=target, record=record, parameters=captured.parameters
    )
    for each in instruments:
        each.start(record.id, gm)
    run(gm, ctx, PIPELINE, instruments=instruments, check=True)
    for each in instruments:
        each.finish(record, loaded.to_toml())
    return gm, record
